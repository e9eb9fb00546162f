//! What this host can back up: memory, the hypervisor's version, the files that the guest was started with.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use romulus_hypervisor::qemu::standby::{QemuStandby, StandbyOptions};
use romulus_hypervisor::spec::MachineSpec;

/// Memory left to the host besides images and checkpoints, in bytes.
const RESERVE_BYTES: u64 = 256 << 20;

/// The limits of this host.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Bytes of all images together.
    pub image_bytes_max: u64,
    /// A folder that a check may use; nothing is kept in it.
    pub scratch_dir: PathBuf,
}

impl Admission {
    /// Whether a machine can be backed up here, next to images of `held` bytes. An image of its own, of which `own` bytes
    /// are touched, makes room for the new one.
    ///
    /// # Errors
    /// The first thing that is missing, with the figures and what to do.
    pub fn check(&self, machine: &MachineSpec, held: u64, own: u64) -> anyhow::Result<()> {
        let wanted = machine.layout.bytes();
        ensure!(
            held.saturating_add(wanted) <= self.image_bytes_max,
            "the backup has no room: the guest has {} MiB, other images {} MiB, the limit is {} MiB \
             (setting image_bytes_max of the agent)",
            wanted >> 20,
            held >> 20,
            self.image_bytes_max >> 20
        );
        let available = available_bytes()
            .context("could not read /proc/meminfo")?
            .saturating_add(own);
        ensure!(
            wanted.saturating_add(RESERVE_BYTES) <= available,
            "the backup's host has too little memory: the guest has {} MiB, {} MiB are available",
            wanted >> 20,
            available >> 20
        );
        // Everything that a standby needs, short of starting one: rules for its command line, files, processor.
        let options = StandbyOptions::new(&self.scratch_dir, "romchk");
        QemuStandby::prepare(machine, options).context("no standby can be had here")?;
        Ok(())
    }
}

/// The kernel's estimate of memory that can be used without swapping.
fn available_bytes() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))
        .context("no MemAvailable")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
    Ok(kib << 10)
}
