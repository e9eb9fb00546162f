//! Which point is struck when, and how.

use romulus_hypervisor::fault::{AGENT_POINTS, REPLICATOR_POINTS};
use serde::Serialize;

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
    /// SIGKILL, and to QEMU at once, as if the host had died.
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

/// All trials, so ordered that a guest can be used for many: those after which it still is on the primary come first.
#[must_use]
pub fn all() -> Vec<Trial> {
    let mut trials = Vec::new();
    for point in REPLICATOR_POINTS {
        for (when, pass) in of_replicator(point) {
            add(&mut trials, Part::Replicator, point, pass, when);
        }
    }
    for point in AGENT_POINTS {
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

    #[test]
    fn every_point_is_struck_and_in_every_way() {
        let trials = all();
        for point in REPLICATOR_POINTS
            .iter()
            .chain(AGENT_POINTS)
            .chain(&WITNESS_POINTS)
        {
            for blow in [Blow::Kill, Blow::Stop] {
                assert!(
                    trials
                        .iter()
                        .any(|trial| trial.point == *point && trial.blow == blow),
                    "{point} {blow:?}"
                );
            }
        }
    }

    #[test]
    fn a_host_dies_at_every_step_of_an_epoch() {
        for trial in all() {
            let of_epoch = trial.part == Part::Replicator && trial.when == When::Protected;
            let dies = |other: &Trial| {
                Trial {
                    blow: Blow::HostDies,
                    ..trial
                } == *other
            };
            assert_eq!(
                all().iter().any(dies),
                of_epoch || trial.when == When::Moving,
                "{trial:?}"
            );
        }
    }
}
