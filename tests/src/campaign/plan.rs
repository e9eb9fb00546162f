//! Which point is struck when, and how.

use romulus_hypervisor::fault::{AGENT_POINTS, REPLICATOR_POINTS};
use serde::Serialize;

use crate::Vmm;

/// The daemon that is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The primary's replicator.
    Replicator,
    /// The backup's agent.
    Agent,
    /// The witness.
    Witness,
}

/// What happens to it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Blow {
    /// SIGKILL, alone.
    Kill,
    /// SIGSTOP, alone.
    Stop,
    /// SIGKILL, and to the VMM at once, as if the host had died.
    HostDies,
}

/// In which phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// On the way from the start to *protected*.
    Starting,
    /// In the midst of steady protection.
    Protected,
    /// After `romulus unprotect`.
    Leaving,
    /// After the agent was killed.
    BackupLost,
    /// After `romulus failover`.
    Moving,
    /// After the primary's host died.
    TakingOver,
}

/// One trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Trial {
    /// Who is struck.
    pub part: Part,
    /// Where.
    pub point: &'static str,
    /// At which pass, from 1, counted from the beginning of the phase.
    pub pass: u64,
    /// How.
    pub blow: Blow,
    /// When.
    pub when: When,
}

/// The witness's points: `witness/src/fault.rs`. A wrong one would not be reached, and fail.
const WITNESS_POINTS: [&str; 7] = [
    "store.before_write",
    "store.half_written",
    "store.written",
    "store.synced",
    "store.renamed",
    "store.durable",
    "reply.sent",
];

/// Steps that only stock QEMU needs, by the beginning of their names: it is stopped with a stream into a FIFO, and locked and traced from outside.
const QEMU_ONLY: [&str; 14] = [
    "attach.locked",
    "attach.guarded",
    "attach.call_",
    "bootstrap.",
    "arm.after_command",
    "arm.holding",
    "arm.draining",
    "arm.after_drain",
    "precopy.after_command",
    "precopy.holding",
    "precopy.draining",
    "precopy.after_drain",
    "capture.after_command",
    "capture.draining",
];
/// The same, of a standby.
const QEMU_STANDBY_ONLY: &str = "standby.after_stream";

/// Whether a daemon passes this point with guests in this VMM.
fn exists(point: &str, vmm: Vmm) -> bool {
    let of_qemu = point == QEMU_STANDBY_ONLY || QEMU_ONLY.iter().any(|begin| point.starts_with(begin));
    vmm == Vmm::Qemu || !of_qemu
}

/// All trials with guests in this VMM, so ordered that a guest can be used for many: those after which it still is on the primary come
/// first.
#[must_use]
pub fn all(vmm: Vmm) -> Vec<Trial> {
    let mut trials = Vec::new();
    let here = |point: &&&'static str| exists(point, vmm);
    for point in REPLICATOR_POINTS.iter().filter(here) {
        for (when, pass) in of_replicator(point) {
            add(&mut trials, Part::Replicator, point, pass, when);
        }
    }
    for point in AGENT_POINTS.iter().filter(here) {
        for (when, pass) in of_agent(point) {
            add(&mut trials, Part::Agent, point, pass, when);
        }
    }
    for point in WITNESS_POINTS {
        for when in [When::Starting, When::TakingOver] {
            add(&mut trials, Part::Witness, point, 1, when);
        }
    }
    trials.sort_by_key(|trial| {
        let moves = trial.when == When::TakingOver
            || (trial.part == Part::Replicator && matches!(trial.when, When::Protected | When::Moving));
        (moves, trial.part, trial.when)
    });
    trials
}

fn add(trials: &mut Vec<Trial>, part: Part, point: &'static str, pass: u64, when: When) {
    let paired = matches!(when, When::Protected | When::Moving);
    let blows: &[Blow] = match part {
        Part::Replicator if paired => &[Blow::Kill, Blow::Stop, Blow::HostDies],
        _ => &[Blow::Kill, Blow::Stop],
    };
    trials.extend(blows.iter().map(|blow| Trial {
        part,
        point,
        pass,
        blow: *blow,
        when,
    }));
}

fn of_replicator(point: &str) -> Vec<(When, u64)> {
    let (step, name) = point.split_once('.').unwrap_or_default();
    match (step, name) {
        ("detach", _) => vec![(When::Leaving, 1)],
        ("capture", "stopped") => vec![(When::Moving, 1)],
        // The second pass is that of the pairing.
        ("replicator", "before_ask" | "answered" | "before_remember" | "after_remember") => {
            vec![(When::Starting, 1), (When::Starting, 2), (When::BackupLost, 1)]
        }
        ("replicator", "before_open" | "after_open") => vec![(When::Starting, 1), (When::BackupLost, 1)],
        ("replicator", "first_copy") => vec![(When::Starting, 20)],
        // Nothing is released before the pair.
        ("replicator", "before_release" | "after_release") => vec![(When::Protected, 3)],
        ("capture", _) | ("replicator", "captured" | "encoded" | "commit_queued" | "sent") => {
            vec![(When::Starting, 1), (When::Protected, 3)]
        }
        _ => vec![(When::Starting, 1)],
    }
}

fn of_agent(point: &str) -> Vec<(When, u64)> {
    match point.split_once('.').unwrap_or_default() {
        ("standby", "verified" | "running")
        | (
            "agent",
            "before_ask" | "answered" | "before_consumed" | "after_consumed" | "joined" | "activated",
        ) => {
            vec![(When::TakingOver, 1)]
        }
        ("standby", "started") => vec![(When::Starting, 1)],
        ("standby", _) | ("agent", "before_remember" | "after_remember") => {
            vec![(When::Starting, 1), (When::TakingOver, 1)]
        }
        (
            "agent",
            "staged" | "before_commit" | "after_commit" | "before_ack" | "after_ack" | "before_apply"
            | "in_apply" | "after_apply",
        ) => vec![(When::Starting, 1), (When::Protected, 3)],
        _ => vec![(When::Starting, 1)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_struck(trials: &[Trial], point: &str) -> bool {
        let blows = [Blow::Kill, Blow::Stop];
        blows.iter().all(|blow| {
            trials
                .iter()
                .any(|trial| trial.point == point && trial.blow == *blow)
        })
    }

    #[test]
    fn every_point_is_struck_and_in_every_way() {
        let (qemu, testbed) = (all(Vmm::Qemu), all(Vmm::Testbed));
        for point in REPLICATOR_POINTS
            .iter()
            .chain(AGENT_POINTS)
            .chain(&WITNESS_POINTS)
        {
            assert!(is_struck(&qemu, point), "{point}");
            assert_eq!(is_struck(&testbed, point), exists(point, Vmm::Testbed), "{point}");
        }
    }

    #[test]
    fn what_is_left_out_with_other_vmms_is_a_step() {
        let all = || REPLICATOR_POINTS.iter().chain(AGENT_POINTS);
        for begin in QEMU_ONLY.iter().chain([&QEMU_STANDBY_ONLY]) {
            assert!(all().any(|point| point.starts_with(begin)), "{begin}");
        }
    }

    #[test]
    fn a_host_dies_at_every_step_of_an_epoch() {
        for vmm in [Vmm::Qemu, Vmm::Testbed] {
            for trial in all(vmm) {
                let of_epoch = trial.part == Part::Replicator && trial.when == When::Protected;
                let dies = |other: &Trial| {
                    Trial {
                        blow: Blow::HostDies,
                        ..trial
                    } == *other
                };
                assert_eq!(
                    all(vmm).iter().any(dies),
                    of_epoch || trial.when == When::Moving,
                    "{trial:?}"
                );
            }
        }
    }
}
