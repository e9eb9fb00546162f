//! One case of the sweep: what the guest does, on how many vCPUs, and with how much memory for deltas it is protected.

use super::task::Task;
use crate::parameters::Parameter;

/// Memory for deltas that a replicator has unless it is told otherwise, in MiB.
const USUAL_DELTAS_MIB: u32 = 64;

/// A case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) kind: Kind,
    pub(super) vcpus: u32,
    /// For previous versions of pages; with none, each page is encoded alone.
    pub(super) delta_memory_mib: u32,
}

/// What the guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One of the test VMM writes so many pages of a set in each 25 ms.
    Pages {
        pages: u32,
        set_mib: u32,
        content: String,
    },
    /// A Linux has a program at work.
    Program(String),
}

impl Load {
    pub(super) fn task(&self) -> Task {
        match &self.kind {
            Kind::Pages {
                pages,
                set_mib,
                content,
            } => Task::Dirty(format!("random/{content}:{pages}:25:{set_mib}")),
            Kind::Program(program) => Task::Program(program.clone()),
        }
    }

    pub(super) fn name(&self) -> String {
        let what = match &self.kind {
            Kind::Pages {
                pages,
                set_mib,
                content,
            } => format!("{content}-{pages}-{set_mib}MiB"),
            Kind::Program(program) => format!("linux-{program}"),
        };
        let deltas = match self.delta_memory_mib {
            USUAL_DELTAS_MIB => String::new(),
            0 => "-no-deltas".to_owned(),
            mib => format!("-deltas-{mib}MiB"),
        };
        format!("{what}-{}vcpu{deltas}", self.vcpus)
    }

    pub(super) fn parameters(&self) -> Vec<(&'static str, Parameter)> {
        let mut all = match &self.kind {
            Kind::Pages {
                pages,
                set_mib,
                content,
            } => vec![
                ("dirty_pages", (*pages).into()),
                ("set_mib", (*set_mib).into()),
                ("content", content.into()),
            ],
            Kind::Program(program) => vec![("workload", program.into())],
        };
        all.extend([
            ("vcpus", self.vcpus.into()),
            ("delta_memory_mib", self.delta_memory_mib.into()),
        ]);
        all
    }

    /// The replicator's settings, with epochs of this length.
    pub(super) fn settings(&self, epoch_ms: u32) -> String {
        format!(
            "[epochs]\nlength = \"{epoch_ms}ms\"\n[memory]\ndelta_memory = \"{}MiB\"\n",
            self.delta_memory_mib
        )
    }

    /// Whether a guest that was raised for the other one can be told to do this.
    pub(super) fn has_guest_of(&self, other: &Self) -> bool {
        let same = match (&self.kind, &other.kind) {
            (Kind::Pages { .. }, Kind::Pages { .. }) => true,
            (Kind::Program(one), Kind::Program(other)) => one == other,
            _ => false,
        };
        same && self.vcpus == other.vcpus
    }

    /// A note of a row, and with it why its figures say nothing of how fast a machine is.
    pub(super) fn noted(&self, note: Option<String>) -> Option<String> {
        let caution = match self.kind {
            Kind::Pages { .. } => None,
            Kind::Program(_) => Some("emulated by QEMU's TCG".to_owned()),
        };
        let both = note.into_iter().chain(caution);
        both.reduce(|one, other| format!("{one}; {other}"))
    }
}

#[cfg(test)]
mod tests {
    use romulus_config::{ByteSize, Replicator};

    use super::*;

    fn load(kind: Kind, vcpus: u32, delta_memory_mib: u32) -> Load {
        Load {
            kind,
            vcpus,
            delta_memory_mib,
        }
    }

    fn program(name: &str) -> Kind {
        Kind::Program(name.to_owned())
    }

    #[test]
    fn a_guest_goes_on_with_other_settings_and_not_with_other_programs() {
        let (redis, sqlite) = (load(program("redis"), 1, 64), load(program("sqlite"), 1, 64));
        assert!(redis.has_guest_of(&load(program("redis"), 1, 0)));
        assert!(!redis.has_guest_of(&sqlite) && !redis.has_guest_of(&load(program("redis"), 2, 64)));
        let pages = |content: &str| Kind::Pages {
            pages: 10,
            set_mib: 1,
            content: content.to_owned(),
        };
        assert!(load(pages("text"), 1, 0).has_guest_of(&load(pages("counter"), 1, 64)));
        assert!(!redis.has_guest_of(&load(pages("text"), 1, 64)));
    }

    #[test]
    fn every_row_of_a_linux_says_that_it_is_emulated() {
        let (linux, test_vmm) = (
            load(program("redis"), 1, 64),
            load(
                Kind::Pages {
                    pages: 10,
                    set_mib: 1,
                    content: "text".to_owned(),
                },
                1,
                64,
            ),
        );
        let note = || Some("5 ms".to_owned());
        assert_eq!(linux.noted(note()).unwrap(), "5 ms; emulated by QEMU's TCG");
        assert_eq!(linux.noted(None).unwrap(), "emulated by QEMU's TCG");
        assert_eq!(test_vmm.noted(note()), note());
        assert_eq!(test_vmm.noted(None), None);
    }

    #[test]
    fn memory_for_deltas_is_what_the_replicator_takes_it_for() {
        let read = |load: &Load| toml::from_str::<Replicator>(&load.settings(50)).unwrap();
        let none = read(&load(program("redis"), 1, 0));
        assert_eq!(none.memory.delta_memory, ByteSize::from_mib(0));
        let usual = load(program("redis"), 1, USUAL_DELTAS_MIB);
        assert_eq!(
            read(&usual).memory.delta_memory,
            Replicator::default().memory.delta_memory
        );
        assert_eq!(usual.name(), "linux-redis-1vcpu");
        assert_eq!(load(program("redis"), 1, 0).name(), "linux-redis-1vcpu-no-deltas");
    }
}
