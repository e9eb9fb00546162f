//! What a guest is there for.

use std::time::Duration;

use crate::measures::qemu::PROGRAMS;

/// Clients have Debian's `redis-benchmark` ask the Linux's Redis.
pub(super) const REDIS: &str = "redis";

/// Which guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) memory_mib: u32,
    pub(super) vcpus: u32,
    pub(super) task: Task,
}

/// What it does, and with that which guest it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// That of the test VMM over KVM writes so, and works in what time it has left.
    Dirty(String),
    /// The end-to-end tests' Linux, under QEMU's TCG, has a program at work.
    Program(String),
}

impl Task {
    /// How often its client asks on average: often enough for a median of a short slice, and not so often that the guest does little else.
    /// An answer of an emulated one takes it far longer.
    pub(super) fn asks_every(&self) -> Duration {
        Duration::from_millis(match self {
            Self::Dirty(_) => 4,
            Self::Program(_) => 20,
        })
    }

    /// What the Linux is told to start. Its Redis answers the client, whatever else it does.
    pub(super) fn workload(&self) -> String {
        match self {
            Self::Program(program) if program != REDIS => format!("redis,work:{program}"),
            _ => "redis".to_owned(),
        }
    }

    /// What is wrong with the name of a program.
    pub(super) fn problem(program: &str) -> Option<String> {
        let known = program == REDIS || PROGRAMS.contains(&program);
        (!known).then(|| {
            format!(
                "workloads = {program:?}: there are {REDIS}, {}",
                PROGRAMS.join(", ")
            )
        })
    }
}
