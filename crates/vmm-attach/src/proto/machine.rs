//! What a VMM says of its machine: enough for a backup to keep its memory, and for another VMM of the same kind to build it.

use serde::{Deserialize, Serialize};

/// Bytes of a page, and what one bit of the dirty bitmap stands for.
pub const PAGE_BYTES: u64 = 4096;
/// Most memory regions.
pub const REGIONS_MAX: usize = 16;
/// Most network devices.
pub const NICS_MAX: usize = 16;
/// Most disks.
pub const DISKS_MAX: usize = 16;
/// Most vCPUs.
pub const VCPUS_MAX: u16 = 1024;
/// Longest name of anything, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Longest path, in bytes.
pub const PATH_BYTES_MAX: usize = 512;
/// Most outputs that are neither network nor disk.
pub const OUTPUTS_MAX: usize = 16;
/// Longest configuration of the VMM's own, in bytes.
pub const CONFIG_BYTES_MAX: usize = 32 << 10;
/// Most guest memory: 16 TiB.
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;

/// One contiguous piece of guest memory, on a file descriptor of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its name, which no other region has.
    pub name: String,
    /// Where the guest sees it.
    pub gpa: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Where it begins in its file.
    pub fd_offset: u64,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its name, which no other network device has.
    pub name: String,
    /// Its address.
    pub mac: [u8; 6],
    /// The host's interface that it is connected to; empty when it has none.
    pub tap: String,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name, which no other disk has.
    pub id: String,
    /// Its size.
    pub bytes: u64,
    /// The file behind it.
    pub path: String,
}

/// A way by which the guest speaks to its host that is neither a network device nor a disk: a serial line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Its name, which no other output has.
    pub id: String,
    /// Where it goes: a file's path, or a word.
    pub to: String,
}

/// How a VMM learns what the vCPUs write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tracking {
    /// KVM's dirty log, cleared as it is read.
    Log,
    /// The log with manual protection: hot pages stay writable.
    #[default]
    Manual,
    /// KVM's dirty rings.
    Ring,
}

/// A machine, as its VMM describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// The VMM's name: only one with the same name can take the machine over.
    pub vmm: String,
    /// Its version.
    pub vmm_version: String,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Guest memory, ascending by `gpa`.
    pub regions: Vec<Region>,
    /// Network devices.
    pub nics: Vec<Nic>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Other outputs, without those whose words are thrown away.
    pub outputs: Vec<Output>,
    /// How writes are found.
    pub tracking: Tracking,
    /// Whatever else a VMM of this kind needs to build the same machine: opaque to everybody else.
    pub config: Vec<u8>,
}

/// What is wrong with a [`MachineInfo`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// Too many of something, or none where one is needed.
    #[error("the machine has {count} {what}, where {min} to {max} are allowed")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// Fewest.
        min: usize,
        /// Most.
        max: usize,
    },
    /// A name that is empty, too long, or used twice.
    #[error("the name {0:?} is empty, longer than {NAME_BYTES_MAX} bytes, or used twice")]
    Name(String),
    /// A path that is too long.
    #[error("the path of {0:?} is longer than {PATH_BYTES_MAX} bytes")]
    Path(String),
    /// A region that is not made of whole pages, or does not fit in the address space.
    #[error(
        "memory region {0:?} is not made of whole pages of {PAGE_BYTES} bytes, or ends past the address space"
    )]
    Pages(String),
    /// Regions out of order, or one over another.
    #[error("memory region {0:?} does not begin after the end of the one before it")]
    Order(String),
    /// Over [`MEMORY_BYTES_MAX`].
    #[error("the machine's memory is over the limit of {MEMORY_BYTES_MAX} bytes")]
    Memory,
}

impl MachineInfo {
    /// Whether everything is within its limits.
    ///
    /// # Errors
    /// [`MachineError`] names the first thing that is not.
    pub fn check(&self) -> Result<(), MachineError> {
        count("vCPUs", usize::from(self.vcpus), 1, usize::from(VCPUS_MAX))?;
        count("memory regions", self.regions.len(), 1, REGIONS_MAX)?;
        count("network devices", self.nics.len(), 0, NICS_MAX)?;
        count("disks", self.disks.len(), 0, DISKS_MAX)?;
        count("outputs", self.outputs.len(), 0, OUTPUTS_MAX)?;
        count("bytes of configuration", self.config.len(), 0, CONFIG_BYTES_MAX)?;
        names([&self.vmm].into_iter())?;
        if self.vmm_version.len() > NAME_BYTES_MAX {
            return Err(MachineError::Name(self.vmm_version.clone()));
        }
        names(self.regions.iter().map(|region| &region.name))?;
        names(self.nics.iter().map(|nic| &nic.name))?;
        names(self.disks.iter().map(|disk| &disk.id))?;
        names(self.outputs.iter().map(|output| &output.id))?;
        if let Some(nic) = self.nics.iter().find(|nic| nic.tap.len() > NAME_BYTES_MAX) {
            return Err(MachineError::Name(nic.tap.clone()));
        }
        if let Some(disk) = self.disks.iter().find(|disk| disk.path.len() > PATH_BYTES_MAX) {
            return Err(MachineError::Path(disk.id.clone()));
        }
        if let Some(output) = self
            .outputs
            .iter()
            .find(|output| output.to.len() > PATH_BYTES_MAX)
        {
            return Err(MachineError::Path(output.id.clone()));
        }
        self.check_regions()
    }

    fn check_regions(&self) -> Result<(), MachineError> {
        let (mut free_from, mut total) = (0u64, 0u64);
        for region in &self.regions {
            let whole = |value: u64| value.is_multiple_of(PAGE_BYTES);
            let end = region.gpa.checked_add(region.bytes);
            let file_end = region.fd_offset.checked_add(region.bytes);
            let aligned = whole(region.gpa) && whole(region.bytes) && whole(region.fd_offset);
            let (Some(end), Some(_), true, 1..) = (end, file_end, aligned, region.bytes) else {
                return Err(MachineError::Pages(region.name.clone()));
            };
            if region.gpa < free_from {
                return Err(MachineError::Order(region.name.clone()));
            }
            free_from = end;
            total = total.saturating_add(region.bytes);
        }
        if total > MEMORY_BYTES_MAX {
            return Err(MachineError::Memory);
        }
        Ok(())
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, region| sum.saturating_add(region.bytes))
    }

    /// Bytes of the dirty bitmap: one bit a page over all regions in order, in whole 64-bit words.
    pub fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.memory_bytes())
    }
}

/// Bytes of a dirty bitmap for so much memory: one bit a page, in whole 64-bit words.
pub fn bitmap_bytes(memory_bytes: u64) -> u64 {
    memory_bytes.div_ceil(PAGE_BYTES).div_ceil(64) * 8
}

fn count(what: &'static str, count: usize, min: usize, max: usize) -> Result<(), MachineError> {
    if (min..=max).contains(&count) {
        return Ok(());
    }
    Err(MachineError::Count {
        what,
        count,
        min,
        max,
    })
}

/// Each is there, short enough, and different from the others.
fn names<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), MachineError> {
    let mut seen: Vec<&str> = Vec::new();
    for name in names {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || seen.contains(&name.as_str()) {
            return Err(MachineError::Name(name.clone()));
        }
        seen.push(name);
    }
    Ok(())
}
