//! What cannot be protected: every way by which a guest speaks is gated, replicated, declared disposable by the operator, or refused.

use romulus_vmm_attach::proto::{MachineInfo, Role, Welcome};

use crate::source::Allowances;

/// One thing that is in the way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has no guest.
    #[error("the VMM waits as a standby and runs no guest")]
    Standby,
    /// Another host runs the VM.
    #[error("its guest was stopped for good because another host speaks for the VM: end this VMM")]
    Stopped,
    /// Nobody would see what the guest writes.
    #[error("the VMM does not track what its guest writes")]
    NoTracking,
    /// A network device that no gate holds.
    #[error(
        "network device {name} is on {on}, which no gate holds; name its tap with --tap, or declare {name:?} disposable"
    )]
    Nic {
        /// The device.
        name: String,
        /// What it is connected to, in words.
        on: String,
    },
    /// A tap that is none of the guest's.
    #[error("tap {0} is no network device's of this VMM; correct --tap")]
    Tap(String),
    /// A disk whose contents would be lost.
    #[error(
        "disk {id} ({path}) is not replicated; remove it, or declare {id:?} disposable: after a takeover it is empty"
    )]
    Disk {
        /// The disk.
        id: String,
        /// Its file.
        path: String,
    },
    /// Another way out of the guest.
    #[error(
        "output {id} leads to {to} without a gate; have the VMM throw it away, or declare {id:?} disposable"
    )]
    Output {
        /// The output.
        id: String,
        /// Where it goes.
        to: String,
    },
}

/// Everything that keeps this machine from being protected; `taps` are those that a gate holds.
pub(super) fn check(welcome: &Welcome, taps: &[String], allow: &Allowances) -> Vec<Refusal> {
    let Some(machine) = &welcome.machine else {
        return vec![Refusal::Standby];
    };
    let mut refusals = match welcome.role {
        Role::Running => Vec::new(),
        Role::Halted => vec![Refusal::Stopped],
        Role::Empty | Role::Prepared => return vec![Refusal::Standby],
    };
    if welcome.bitmap_bytes == 0 {
        refusals.push(Refusal::NoTracking);
    }
    refusals.extend(ways_out(machine, taps, allow));
    refusals
}

fn ways_out(machine: &MachineInfo, taps: &[String], allow: &Allowances) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    for nic in &machine.nics {
        let gated = taps.contains(&nic.tap);
        if !gated && !allow.covers([nic.name.as_str()]) {
            let on = if nic.tap.is_empty() { "no tap" } else { &nic.tap };
            refusals.push(Refusal::Nic {
                name: nic.name.clone(),
                on: on.to_owned(),
            });
        }
    }
    for tap in taps {
        if machine.nics.iter().all(|nic| nic.tap != *tap) {
            refusals.push(Refusal::Tap(tap.clone()));
        }
    }
    for disk in &machine.disks {
        if !allow.covers([disk.id.as_str()]) {
            refusals.push(Refusal::Disk {
                id: disk.id.clone(),
                path: disk.path.clone(),
            });
        }
    }
    for output in &machine.outputs {
        if !allow.covers([output.id.as_str()]) {
            refusals.push(Refusal::Output {
                id: output.id.clone(),
                to: output.to.clone(),
            });
        }
    }
    refusals
}

#[cfg(test)]
mod tests {
    use romulus_vmm_attach::proto::{Disk, Nic, Output};

    use super::*;

    fn welcome() -> Welcome {
        let machine = MachineInfo {
            vmm: "testbed".into(),
            nics: vec![Nic {
                name: "net0".into(),
                mac: [2; 6],
                tap: "tap0".into(),
            }],
            disks: vec![Disk {
                id: "disk0".into(),
                bytes: 1 << 20,
                path: "/srv/disk".into(),
            }],
            outputs: vec![Output {
                id: "serial".into(),
                to: "/var/log/serial".into(),
            }],
            ..MachineInfo::default()
        };
        Welcome {
            version: 1,
            vmm: "testbed".into(),
            vmm_version: "1".into(),
            role: Role::Running,
            machine: Some(machine),
            bitmap_bytes: 8,
            state_bytes_max: 1,
            pause_limit_ns_max: 1,
            halt_limit_ns: 1,
        }
    }

    fn allowing(ids: &[&str]) -> Allowances {
        Allowances {
            disposable: ids.iter().map(|id| (*id).to_owned()).collect(),
        }
    }

    fn said(welcome: &Welcome, taps: &[&str], allow: &[&str]) -> Vec<String> {
        let taps: Vec<String> = taps.iter().map(|tap| (*tap).to_owned()).collect();
        let refusals = check(welcome, &taps, &allowing(allow));
        refusals.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_way_out_is_gated_or_declared_disposable_or_refused_and_all_are_named_at_once() {
        let all = said(&welcome(), &["tap9"], &[]);
        for (refusal, word) in all.iter().zip(["net0", "tap9", "disk0", "serial"]) {
            assert!(refusal.contains(word), "{refusal}");
        }
        assert_eq!(all.len(), 4);
        assert_eq!(said(&welcome(), &["tap0"], &["disk0", "serial"]), [""; 0]);
        assert_eq!(said(&welcome(), &[], &["net0", "disk0", "serial"]), [""; 0]);
        let mut unplugged = welcome();
        unplugged.machine.as_mut().unwrap().nics[0].tap.clear();
        let refused = said(&unplugged, &[], &["disk0", "serial"]);
        assert!(refused[0].contains("no tap"), "{refused:?}");
    }

    #[test]
    fn only_a_guest_that_runs_and_is_tracked_can_be_protected() {
        let (taps, allow) = (["tap0".to_owned()], allowing(&["disk0", "serial"]));
        let refused = |change: &dyn Fn(&mut Welcome)| {
            let mut welcome = welcome();
            change(&mut welcome);
            check(&welcome, &taps, &allow)
        };
        assert_eq!(
            refused(&|welcome| welcome.bitmap_bytes = 0),
            [Refusal::NoTracking]
        );
        assert_eq!(
            refused(&|welcome| welcome.role = Role::Halted),
            [Refusal::Stopped]
        );
        for role in [Role::Empty, Role::Prepared] {
            assert_eq!(refused(&|welcome| welcome.role = role), [Refusal::Standby]);
        }
        assert_eq!(refused(&|welcome| welcome.machine = None), [Refusal::Standby]);
    }
}
