//! What a machine is made of: what `testbed run` is told, and what a standby has to be told to build the same.
//!
//! As JSON it is the attach protocol's `config`. A standby gets it from another host: sizes are checked against limits,
//! and nothing in it names a file or an interface of the standby's host.

use romulus_guest_core::abi;
use serde::{Deserialize, Serialize};

use crate::mac::Mac;

/// Version of this description.
const VERSION: u16 = 1;
/// Largest disk, in bytes. What a standby makes for it is sparse.
pub const DISK_BYTES_MAX: u64 = 64 << 30;
/// Most RAM, in bytes.
pub const RAM_BYTES_MAX: u64 = abi::RAM_LOW_END + abi::RAM_HIGH_BYTES_MAX;
/// Size of a page of RAM: memory is given in whole 2 MiB pages, which the guest's tables map.
const RAM_UNIT_BYTES: u64 = 2 << 20;

/// A machine, without anything that only its host knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Version of this description.
    pub version: u16,
    /// The machine's name, for logs.
    pub name: String,
    /// RAM in bytes.
    pub ram_bytes: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Network cards, in the order of their addresses on the bus.
    pub nics: Vec<Mac>,
    /// Sizes of the disks in bytes; they follow the network cards.
    pub disks: Vec<u64>,
    /// What the guest was told to do, for a machine that is reset.
    pub cmdline: String,
    /// CRC-32 of the guest's file: a reset must load the same one.
    pub guest_crc: u32,
}

/// Why there can't be such a machine.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a description.
    #[error("the description of the machine can't be read: {0}")]
    Json(#[from] serde_json::Error),
    /// Of another version of this program.
    #[error(
        "the description of the machine has version {0}, this VMM reads {VERSION}: use the same VMM on both hosts"
    )]
    Version(u16),
    /// RAM.
    #[error(
        "a machine can't have {0} bytes of RAM: take an even number of MiB from {min} to {max}",
        min = abi::RAM_BYTES_MIN >> 20, max = RAM_BYTES_MAX >> 20
    )]
    Ram(u64),
    /// vCPUs.
    #[error("a machine can't have {0} vCPUs: take 1 to {max}", max = abi::VCPUS_MAX)]
    Vcpus(u32),
    /// Devices.
    #[error("a machine can't have {0} network cards and disks: at most {max}", max = abi::DEVICES_MAX)]
    Devices(usize),
    /// A disk.
    #[error("a disk can't have {0} bytes: take 512 to {DISK_BYTES_MAX}")]
    Disk(u64),
    /// A command line.
    #[error("the guest's command line has {0} bytes, at most {max} are possible", max = abi::CMDLINE_BYTES_MAX)]
    CommandLine(usize),
    /// A name.
    #[error("the machine's name has {0} bytes: take 1 to 64")]
    Name(usize),
}

impl MachineConfig {
    /// A machine of that name and size, with one vCPU and without devices.
    #[must_use]
    pub fn new(name: &str, ram_bytes: u64) -> Self {
        MachineConfig {
            version: VERSION,
            name: name.to_owned(),
            ram_bytes,
            vcpus: 1,
            nics: Vec::new(),
            disks: Vec::new(),
            cmdline: String::new(),
            guest_crc: 0,
        }
    }

    /// Reads what [`MachineConfig::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`ConfigError`] when the bytes describe no machine.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u16,
        }
        let Versioned { version } = serde_json::from_slice(bytes)?;
        if version != VERSION {
            return Err(ConfigError::Version(version));
        }
        serde_json::from_slice::<MachineConfig>(bytes)?.check()
    }

    /// The description that goes to a standby: the same bytes for the same machine.
    ///
    /// # Panics
    /// Never: numbers and text can be written as JSON.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and text")
    }

    /// RAM from address 0, in bytes.
    #[must_use]
    pub fn ram_low_bytes(&self) -> u64 {
        self.ram_bytes.min(abi::RAM_LOW_END)
    }

    /// RAM from 4 GiB, in bytes; 0 when everything fits under the hole.
    #[must_use]
    pub fn ram_high_bytes(&self) -> u64 {
        self.ram_bytes - self.ram_low_bytes()
    }

    /// Each part of RAM: name, guest-physical address, size in bytes.
    #[must_use]
    pub fn ram(&self) -> Vec<(&'static str, u64, u64)> {
        let mut parts = vec![("ram-low", 0, self.ram_low_bytes())];
        if self.ram_high_bytes() > 0 {
            parts.push(("ram-high", abi::RAM_HIGH_START, self.ram_high_bytes()));
        }
        parts
    }

    /// Whether there can be such a machine.
    ///
    /// # Errors
    /// [`ConfigError`], which says what to change.
    pub fn check(self) -> Result<Self, ConfigError> {
        let ram = abi::RAM_BYTES_MIN..=RAM_BYTES_MAX;
        if !ram.contains(&self.ram_bytes) || !self.ram_bytes.is_multiple_of(RAM_UNIT_BYTES) {
            return Err(ConfigError::Ram(self.ram_bytes));
        }
        if !(1..=abi::VCPUS_MAX).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if self.nics.len() + self.disks.len() > abi::DEVICES_MAX {
            return Err(ConfigError::Devices(self.nics.len() + self.disks.len()));
        }
        if let Some(bytes) = self
            .disks
            .iter()
            .find(|bytes| !(512..=DISK_BYTES_MAX).contains(*bytes))
        {
            return Err(ConfigError::Disk(*bytes));
        }
        if self.cmdline.len() > abi::CMDLINE_BYTES_MAX {
            return Err(ConfigError::CommandLine(self.cmdline.len()));
        }
        if !(1..=64).contains(&self.name.len()) {
            return Err(ConfigError::Name(self.name.len()));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> MachineConfig {
        let mac = "02:00:00:00:00:02".parse().unwrap();
        let config = MachineConfig::new("demo", 256 << 20);
        MachineConfig {
            vcpus: 2,
            nics: vec![mac],
            disks: vec![1 << 20],
            cmdline: "check=on".into(),
            ..config
        }
    }

    #[test]
    fn a_machine_survives_its_description() {
        assert_eq!(MachineConfig::from_bytes(&sample().to_bytes()).unwrap(), sample());
    }

    #[test]
    fn a_description_of_another_version_is_refused_by_name() {
        let text = String::from_utf8(sample().to_bytes())
            .unwrap()
            .replace("\"version\":1", "\"version\":7");
        assert!(matches!(
            MachineConfig::from_bytes(text.as_bytes()),
            Err(ConfigError::Version(7))
        ));
    }

    #[test]
    fn memory_beyond_three_gib_goes_above_the_hole() {
        let machine = MachineConfig::new("big", 5 << 30).check().unwrap();
        assert_eq!(
            machine.ram(),
            [("ram-low", 0, 3 << 30), ("ram-high", 4 << 30, 2 << 30)]
        );
        assert_eq!(sample().ram(), [("ram-low", 0, 256 << 20)]);
    }

    #[test]
    fn impossible_machines_are_refused() {
        let mac: Mac = "02:00:00:00:00:02".parse().unwrap();
        let new = |ram, vcpus, nics: usize, disks| {
            let config = MachineConfig {
                vcpus,
                nics: vec![mac; nics],
                disks,
                ..MachineConfig::new("m", ram)
            };
            config.check()
        };
        assert!(matches!(new(1 << 20, 1, 0, vec![]), Err(ConfigError::Ram(_))));
        assert!(matches!(new(u64::MAX, 1, 0, vec![]), Err(ConfigError::Ram(_))));
        assert!(matches!(
            new((64 << 20) + 4096, 1, 0, vec![]),
            Err(ConfigError::Ram(_))
        ));
        assert!(matches!(new(64 << 20, 0, 0, vec![]), Err(ConfigError::Vcpus(0))));
        assert!(matches!(new(64 << 20, 5, 0, vec![]), Err(ConfigError::Vcpus(5))));
        assert!(matches!(
            new(64 << 20, 1, 5, vec![]),
            Err(ConfigError::Devices(5))
        ));
        assert!(matches!(
            new(64 << 20, 1, 0, vec![u64::MAX]),
            Err(ConfigError::Disk(_))
        ));
    }
}
