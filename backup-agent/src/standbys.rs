//! Makes the standby of a machine, by whichever hypervisor it is: the only place of the agent that names one.

use std::path::Path;

use anyhow::Context;
use romulus_config::Vmm;
use romulus_hypervisor::kvm::standby::{KvmStandby, StandbyOptions as KvmOptions};
use romulus_hypervisor::launcher::Launcher;
use romulus_hypervisor::qemu::standby::{QemuStandby, StandbyOptions as QemuOptions};
use romulus_hypervisor::spec::{Hypervisor, MachineSpec};
use romulus_hypervisor::standby::Standby;

/// What the operator has set about standbys.
#[derive(Clone, Debug)]
pub struct Standbys {
    /// How those of VMMs other than QEMU are started.
    pub vmms: Vec<Vmm>,
}

impl Standbys {
    /// Checks that this host can be a standby for the machine, and prepares one in `run_dir`, with taps whose names begin
    /// with `tap_prefix` and machines that `launcher` starts.
    ///
    /// # Errors
    /// What is missing or different here, and what to do.
    pub fn prepare(
        &self,
        machine: &MachineSpec,
        run_dir: &Path,
        tap_prefix: &str,
        launcher: Launcher,
    ) -> anyhow::Result<Box<dyn Standby>> {
        match &machine.hypervisor {
            Hypervisor::Qemu(_) => {
                let mut options = QemuOptions::new(run_dir, tap_prefix);
                options.launcher = launcher;
                let standby = QemuStandby::prepare(machine, options).context("the standby's command line")?;
                Ok(Box::new(standby))
            }
            Hypervisor::Kvm(own) => {
                let mut options = KvmOptions::new(run_dir, tap_prefix, self.command(&own.vmm)?);
                options.launcher = launcher;
                Ok(Box::new(KvmStandby::prepare(machine, options)?))
            }
            Hypervisor::Fake => anyhow::bail!("a fake machine has no standby outside of tests"),
        }
    }

    /// The guest that an earlier agent let run from the image, if it still does, as one of `run_dir`; a machine that has never run is ended.
    ///
    /// # Errors
    /// When it can't be told.
    pub fn adopt(
        &self,
        machine: &MachineSpec,
        run_dir: &Path,
        tap_prefix: &str,
    ) -> anyhow::Result<Option<Box<dyn Standby>>> {
        Ok(match &machine.hypervisor {
            Hypervisor::Qemu(_) => {
                let found = QemuStandby::adopt(machine, QemuOptions::new(run_dir, tap_prefix))?;
                found.map(|standby| Box::new(standby) as Box<dyn Standby>)
            }
            Hypervisor::Kvm(_) => {
                let found = KvmStandby::adopt(machine, KvmOptions::new(run_dir, tap_prefix, Vec::new()))?;
                found.map(|standby| Box::new(standby) as Box<dyn Standby>)
            }
            Hypervisor::Fake => None,
        })
    }

    /// The peer's word chooses among the operator's commands and becomes part of none.
    fn command(&self, vmm: &str) -> anyhow::Result<Vec<String>> {
        let known = || {
            let names: Vec<&str> = self.vmms.iter().map(|vmm| vmm.name.as_str()).collect();
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            }
        };
        let found = self.vmms.iter().find(|kind| kind.name == vmm);
        let found = found.with_context(|| {
            format!(
                "the primary's VMM calls itself {vmm:?}, and this agent knows no command for a standby of it (setting vmm; it has {})",
                known()
            )
        })?;
        Ok(found.standby.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standbys() -> Standbys {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Standbys {
            vmms: vec![Vmm {
                name: "testbed".into(),
                standby: words(&["/usr/bin/testbed", "standby"]),
            }],
        }
    }

    #[test]
    fn a_peer_chooses_among_the_operators_commands_and_adds_nothing_to_them() {
        assert_eq!(
            standbys().command("testbed").unwrap(),
            ["/usr/bin/testbed", "standby"]
        );
        for word in ["testbed --privileged", "/bin/sh", ""] {
            let refused = standbys().command(word).unwrap_err().to_string();
            assert!(refused.contains("it has testbed"), "{refused}");
        }
    }
}
