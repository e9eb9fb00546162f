//! What the backup agent allows each VM: what holds for all of them, and what `[[vm]]` says otherwise of one.

use romulus_types::VmId;
use serde::{Deserialize, Serialize};

use crate::backup_agent::{BackupAgent, StandbyKind};
use crate::check::Invalid;
use crate::quantity::ByteSize;

/// Most VMs that have settings of their own.
const OVERRIDES_MAX: usize = 1024;
/// The highest priority.
const PRIORITY_MAX: u16 = 1000;
/// The least bandwidth that can be set, in bytes a second: less would not carry a small guest's first copy in time.
const BANDWIDTH_MIN: ByteSize = ByteSize::from_mib(1);
const MIB: ByteSize = ByteSize::from_mib(1);
const MOST: ByteSize = ByteSize::from_gib(64 * 1024);

/// `[[vm]]` of the backup agent: settings of one VM. What is not given is as for all VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The VM.
    pub name: VmId,
    /// Most memory that its guest may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<ByteSize>,
    /// Bytes of one of its checkpoints while it is being received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staging_bytes_max: Option<ByteSize>,
    /// Bytes a second that are read of its pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_max: Option<ByteSize>,
    /// Warm or cold standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<StandbyKind>,
    /// Of the VMs of a dead host those of a higher priority are started first. Default 0.
    #[serde(default)]
    pub priority: u16,
}

/// What one VM may use, and how it is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmLimits {
    /// Most memory that the guest may have; none: what fits.
    pub memory_max: Option<ByteSize>,
    /// Bytes of one checkpoint.
    pub staging_bytes_max: ByteSize,
    /// Bytes a second that are read of its pages; none: as fast as they come.
    pub bandwidth_max: Option<ByteSize>,
    /// Warm or cold standby.
    pub standby: StandbyKind,
    /// A higher one is started first.
    pub priority: u16,
}

impl BackupAgent {
    /// What this VM may use.
    #[must_use]
    pub fn limits_of(&self, vm: &VmId) -> VmLimits {
        let own = self.vm.iter().find(|own| own.name == *vm);
        VmLimits {
            memory_max: own.and_then(|own| own.memory_max).or(self.vm_memory_max),
            staging_bytes_max: own
                .and_then(|own| own.staging_bytes_max)
                .unwrap_or(self.staging_bytes_max),
            bandwidth_max: own.and_then(|own| own.bandwidth_max).or(self.vm_bandwidth_max),
            standby: own.and_then(|own| own.standby).unwrap_or(self.standby),
            priority: own.map_or(0, |own| own.priority),
        }
    }

    /// Checks what is allowed for all VMs and for each.
    pub(crate) fn check_vms(&self) -> Result<(), Invalid> {
        within("vm_memory_max", self.vm_memory_max, MIB)?;
        within("vm_bandwidth_max", self.vm_bandwidth_max, BANDWIDTH_MIN)?;
        if self.vm.len() > OVERRIDES_MAX {
            let problem = format!("{} VMs are over the limit of {OVERRIDES_MAX}", self.vm.len());
            return Err(Invalid::new("vm", problem));
        }
        for (position, own) in self.vm.iter().enumerate() {
            let name = &own.name;
            if self.vm[..position].iter().any(|other| other.name == *name) {
                return Err(Invalid::new("vm", format!("{name} is there twice")));
            }
            within(&format!("vm {name}: memory_max"), own.memory_max, MIB)?;
            within(
                &format!("vm {name}: staging_bytes_max"),
                own.staging_bytes_max,
                MIB,
            )?;
            within(
                &format!("vm {name}: bandwidth_max"),
                own.bandwidth_max,
                BANDWIDTH_MIN,
            )?;
            if own.priority > PRIORITY_MAX {
                let problem = format!("{} is not within 0 and {PRIORITY_MAX}", own.priority);
                return Err(Invalid::new(format!("vm {name}: priority"), problem));
            }
        }
        Ok(())
    }
}

fn within(key: &str, value: Option<ByteSize>, min: ByteSize) -> Result<(), Invalid> {
    match value {
        Some(value) if !(min..=MOST).contains(&value) => Err(Invalid::new(
            key,
            format!("{value} is not within {min} and {MOST}"),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Settings;

    fn settings(text: &str) -> BackupAgent {
        toml::from_str(text).expect("settings")
    }

    #[test]
    fn a_vm_without_settings_of_its_own_has_those_of_all() {
        let agent = settings(
            "staging_bytes_max = \"64MiB\"\nvm_memory_max = \"2GiB\"\nstandby = \"cold\"\n\
             [[vm]]\nname = \"db\"\nmemory_max = \"8GiB\"\nstandby = \"warm\"\npriority = 10\n",
        );
        agent.check().expect("allowed");
        let (db, web) = (
            agent.limits_of(&VmId::new("db").unwrap()),
            agent.limits_of(&VmId::new("web").unwrap()),
        );
        assert_eq!(web.memory_max, Some(ByteSize::from_gib(2)));
        assert_eq!((web.standby, web.priority), (StandbyKind::Cold, 0));
        assert_eq!(db.memory_max, Some(ByteSize::from_gib(8)));
        assert_eq!((db.standby, db.priority), (StandbyKind::Warm, 10));
        assert_eq!(db.staging_bytes_max, ByteSize::from_mib(64));
        assert_eq!((db.bandwidth_max, web.bandwidth_max), (None, None));
    }

    #[test]
    fn what_is_said_of_a_vm_is_checked_and_named() {
        for (text, word) in [
            ("[[vm]]\nname = \"db\"\n[[vm]]\nname = \"db\"\n", "twice"),
            ("[[vm]]\nname = \"db\"\npriority = 1001\n", "vm db: priority"),
            (
                "[[vm]]\nname = \"db\"\nbandwidth_max = \"1KiB\"\n",
                "vm db: bandwidth_max",
            ),
            ("[[vm]]\nname = \"db\"\nmemory_max = 1\n", "vm db: memory_max"),
            ("vm_memory_max = 1\n", "vm_memory_max"),
        ] {
            let refused = settings(text).check().unwrap_err().to_string();
            assert!(refused.contains(word), "{refused}");
        }
        assert!(toml::from_str::<BackupAgent>("[[vm]]\nname = \"db\"\nmemory = \"1GiB\"\n").is_err());
        assert!(toml::from_str::<BackupAgent>("[[vm]]\npriority = 1\n").is_err());
    }
}
