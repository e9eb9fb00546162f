//! What this host can back up: memory, the file system of the images, the hypervisor's version, the files that the guest
//! was started with.
//!
//! An image is sparse and grows with its guest, and a commit that was acknowledged must find room whatever the guests
//! do later. So what counts is what all images and checkpoints may come to take, not what they take now.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use romulus_config::VmLimits;
use romulus_hypervisor::launcher::Launcher;
use romulus_hypervisor::spec::MachineSpec;
use romulus_image::Shelf;

use crate::standbys::Standbys;

/// Memory left to the host besides images and checkpoints, in bytes.
const RESERVE_BYTES: u64 = 256 << 20;
/// Two checkpoints can be staged: the one that is applied, and the one that comes in.
const STAGED_CHECKPOINTS: u64 = 2;
/// Device state that a checkpoint may have besides the guest's memory, in bytes.
const DEVICE_STATE_BYTES_MAX: u64 = 64 << 20;

/// The limits of this host.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Bytes of all images together.
    pub image_bytes_max: u64,
    /// Memory of the staging of all VMs together; past it staging is in files.
    pub staging_max: u64,
    /// Where the images lie.
    pub shelf: Arc<dyn Shelf>,
    /// Where they lie if it is a folder, and what belongs to them.
    pub image_dir: PathBuf,
    /// How standbys are made.
    pub standbys: Standbys,
}

/// What the VMs of this agent claim, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// Memory of the guests.
    pub image_bytes: u64,
    /// Their checkpoints, at most.
    pub staging_bytes: u64,
    /// What of all that is in use already.
    pub used_bytes: u64,
}

/// What there is on this host, in bytes.
#[derive(Clone, Copy, Debug)]
struct Room {
    /// Memory that could be used without swapping.
    available_bytes: u64,
    /// Size of the file system of the images, if they lie in one.
    place_bytes: u64,
}

/// What checkpoints of a guest of this size may take.
pub fn staging_bytes(image_bytes: u64, limits: &VmLimits) -> u64 {
    let checkpoint = image_bytes.saturating_add(DEVICE_STATE_BYTES_MAX);
    STAGED_CHECKPOINTS * checkpoint.min(limits.staging_bytes_max.bytes())
}

impl Admission {
    /// Whether a standby of this machine can be had here, short of starting one: rules for its command line, files,
    /// processor.
    ///
    /// # Errors
    /// What is missing, and what to do.
    pub fn check_machine(&self, machine: &MachineSpec) -> anyhow::Result<()> {
        let run_dir = self.image_dir.join(".admission");
        let standby = self
            .standbys
            .prepare(machine, &run_dir, "romchk", Launcher::Session);
        standby.map(drop).context("no standby can be had here")
    }

    /// Whether there is room for a guest of `image_bytes` next to what `others` claim; what this VM has here from earlier
    /// counts as used.
    ///
    /// # Errors
    /// What is short, with the figures and what to do.
    pub fn check_room(&self, image_bytes: u64, limits: &VmLimits, others: &Claims) -> anyhow::Result<()> {
        let available_bytes = available_bytes().context("could not read /proc/meminfo")?;
        let place_bytes = self.shelf.size_bytes();
        let place_bytes = place_bytes
            .with_context(|| format!("could not ask for the size of {}", self.image_dir.display()))?;
        let room = Room {
            available_bytes,
            place_bytes: place_bytes.unwrap_or(u64::MAX),
        };
        self.fits(image_bytes, limits, others, &room)
    }

    fn fits(&self, image_bytes: u64, limits: &VmLimits, others: &Claims, room: &Room) -> anyhow::Result<()> {
        if let Some(memory_max) = limits.memory_max {
            ensure!(
                image_bytes <= memory_max.bytes(),
                "the backup does not take so large a guest: it needs {} MiB, the limit for this VM is {} MiB \
                 (settings vm_memory_max and [[vm]] memory_max of the agent)",
                image_bytes >> 20,
                memory_max.bytes() >> 20
            );
        }
        let images = others.image_bytes.saturating_add(image_bytes);
        ensure!(
            images <= self.image_bytes_max,
            "the backup has no room: the guest needs {} MiB, {} MiB are free, as other images may take {} MiB of the limit \
             of {} MiB (setting image_bytes_max of the agent)",
            image_bytes >> 20,
            self.image_bytes_max.saturating_sub(others.image_bytes) >> 20,
            others.image_bytes >> 20,
            self.image_bytes_max >> 20
        );
        let staging = others
            .staging_bytes
            .saturating_add(staging_bytes(image_bytes, limits));
        let claimed = images.saturating_add(staging.min(self.staging_max));
        ensure!(
            claimed <= room.place_bytes,
            "the file system of the backup's images is too small: images and checkpoints may come to {} MiB with this \
             guest, {} has {} MiB (enlarge it, name another with image_dir, or lower staging_max of the agent)",
            claimed >> 20,
            self.image_dir.display(),
            room.place_bytes >> 20
        );
        let available = room.available_bytes.saturating_add(others.used_bytes);
        ensure!(
            claimed.saturating_add(RESERVE_BYTES) <= available,
            "the backup's host has too little memory: images and checkpoints may come to {} MiB with this guest, {} MiB \
             can be had, and {} MiB must be left",
            claimed >> 20,
            available >> 20,
            RESERVE_BYTES >> 20
        );
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

#[cfg(test)]
mod tests {
    use super::*;
    use romulus_config::{ByteSize, StandbyKind};

    const GIB: u64 = 1 << 30;

    fn admission() -> Admission {
        Admission {
            image_bytes_max: 16 * GIB,
            staging_max: GIB,
            shelf: Arc::new(romulus_image::FolderShelf::new("/dev/shm")),
            image_dir: "/dev/shm".into(),
            standbys: Standbys { vmms: vec![] },
        }
    }

    fn limits(memory_max: Option<u64>) -> VmLimits {
        VmLimits {
            memory_max: memory_max.map(ByteSize::from_bytes),
            staging_bytes_max: ByteSize::from_bytes(GIB / 4),
            bandwidth_max: None,
            standby: StandbyKind::Warm,
            priority: 0,
        }
    }

    fn claims(image_bytes: u64, used_bytes: u64) -> Claims {
        Claims {
            image_bytes,
            staging_bytes: 0,
            used_bytes,
        }
    }

    fn refusal(others: &Claims, available_bytes: u64, file_system_bytes: u64) -> Option<String> {
        let room = Room {
            available_bytes,
            place_bytes: file_system_bytes,
        };
        let fits = admission().fits(4 * GIB, &limits(None), others, &room);
        fits.err().map(|error| error.to_string())
    }

    #[test]
    fn a_guest_is_admitted_by_what_it_may_touch_and_not_by_what_it_has_touched() {
        assert_eq!(refusal(&claims(0, 0), 8 * GIB, 8 * GIB), None);
        let sparse = claims(4 * GIB, 0);
        let refused = refusal(&sparse, 8 * GIB, 16 * GIB).expect("both may fill up");
        assert!(refused.contains("too little memory"), "{refused}");
        let refused = refusal(&sparse, 16 * GIB, 8 * GIB).expect("both may fill up");
        assert!(refused.contains("/dev/shm has 8192 MiB"), "{refused}");
        assert!(refusal(&claims(13 * GIB, 0), 64 * GIB, 64 * GIB).is_some());
    }

    #[test]
    fn memory_that_images_use_already_is_not_counted_twice() {
        // 4 GiB for its own image of an earlier session, and 4 GiB of another VM.
        let used = claims(4 * GIB, 8 * GIB);
        assert_eq!(refusal(&used, GIB, 16 * GIB), None);
        assert!(refusal(&claims(4 * GIB, 0), GIB, 16 * GIB).is_some());
    }

    #[test]
    fn a_small_guests_checkpoints_are_no_larger_than_it_is() {
        assert_eq!(staging_bytes(32 << 20, &limits(None)), 2 * (96 << 20));
        assert_eq!(staging_bytes(64 * GIB, &limits(None)), GIB / 2);
    }

    #[test]
    fn staging_of_all_vms_takes_no_more_memory_than_its_share() {
        let others = Claims {
            image_bytes: 0,
            staging_bytes: 64 * GIB,
            used_bytes: 0,
        };
        assert_eq!(
            refusal(&others, 6 * GIB, 5 * GIB),
            None,
            "4 GiB, and 1 GiB for staging"
        );
        assert!(refusal(&others, 6 * GIB, 5 * GIB - 1).is_some());
    }

    #[test]
    fn a_vm_that_does_not_fit_is_told_what_it_needs_what_is_free_and_the_limit() {
        let refused = refusal(&claims(13 * GIB, 0), 64 * GIB, 64 * GIB).expect("no room");
        for figure in ["needs 4096 MiB", "3072 MiB are free", "limit of 16384 MiB"] {
            assert!(refused.contains(figure), "{refused}");
        }
        let room = Room {
            available_bytes: 64 * GIB,
            place_bytes: 64 * GIB,
        };
        let own = |memory_max| admission().fits(4 * GIB, &limits(Some(memory_max)), &claims(0, 0), &room);
        assert!(own(4 * GIB).is_ok());
        let refused = own(4 * GIB - 1).unwrap_err().to_string();
        assert!(
            refused.contains("needs 4096 MiB, the limit for this VM is 4095 MiB"),
            "{refused}"
        );
    }
}
