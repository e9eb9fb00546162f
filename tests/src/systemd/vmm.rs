//! Hosts that run guests: with what the lab's VMM needs of this machine. The container's QEMU is this machine's; both are of the same release.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Container;
use crate::lab::word;
use crate::{Host, Lab, Vmm};

/// What a QEMU of Debian's reads beside its libraries; not all of them are on every machine.
const FOLDERS: [&str; 4] = [
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/lib/ipxe",
    "/usr/lib/x86_64-linux-gnu/qemu",
];
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

impl Container {
    /// Boots a host on which the lab's VMM can run: as a guest's ([`Container::start_guest`]), or as a standby's.
    ///
    /// # Errors
    /// As [`Container::boot`], and when QEMU is not installed.
    pub fn boot_for_vmm(lab: &Lab, host: Host) -> Result<Container> {
        // Command lines name these.
        let own = [&lab.paths.release, &lab.paths.assets, &lab.run, &lab.logs];
        let mut names: Vec<String> = own.iter().map(|folder| word(folder)).collect();
        let qemu = lab.vmm == Vmm::Qemu;
        if qemu {
            let there = FOLDERS.iter().filter(|folder| Path::new(folder).exists());
            names.extend(there.map(|folder| (*folder).to_owned()));
        }
        let shared: Vec<(&Path, &str)> = names
            .iter()
            .map(|name| (Path::new(name.as_str()), name.as_str()))
            .collect();
        let container = Container::boot_with(lab, host, &shared)?;
        if qemu {
            container.copy_qemu()?;
        }
        Ok(container)
    }

    /// Copies QEMU and the libraries that the container lacks.
    fn copy_qemu(&self) -> Result<()> {
        self.copy_in(Path::new(QEMU), QEMU)?;
        let listed = Command::new("ldd").arg(QEMU).output().context("cannot run ldd")?;
        ensure!(listed.status.success(), "ldd does not know {QEMU}");
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        // `libx.so.1 => /lib/x86_64-linux-gnu/libx.so.1 (0x…)`
        let libraries = listed
            .lines()
            .filter_map(|line| line.split_once("=> ")?.1.split_whitespace().next());
        for library in libraries.filter(|library| library.starts_with('/')) {
            if !self.path(library).exists() {
                self.copy_in(Path::new(library), library)?;
            }
        }
        Ok(())
    }
}
