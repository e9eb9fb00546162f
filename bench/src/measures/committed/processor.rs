//! Whose processor time the bytes take: the sender's, that of the receiver's connection, and that of its store.
//!
//! Where the machine has few cores, these three share them, and what they take together bounds how fast checkpoints commit.

use std::fmt;
use std::path::PathBuf;

use romulus_host_sys::process_cpu_ns;

use super::a_mib;

/// The name of the peer's thread that verifies and commits.
pub(super) const STORE: &str = "store";

/// Processor time in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    sender_ns: u64,
    receiver_ns: u64,
    store_ns: u64,
}

/// What some bytes took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    spent: Spent,
    bytes: u64,
}

/// A thread of the peer.
struct Thread {
    schedstat: PathBuf,
    is_store: bool,
}

/// This process, and the threads of the peer.
pub(super) struct Watch {
    threads: Vec<Thread>,
}

impl Watch {
    /// On the peer with this process id, whose threads run already. A kernel that tells no times has none to watch.
    pub(super) fn new(peer: u32) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{peer}/task"));
        let threads = tasks.into_iter().flatten().flatten().map(|task| Thread {
            schedstat: task.path().join("schedstat"),
            is_store: std::fs::read_to_string(task.path().join("comm"))
                .is_ok_and(|name| name.trim_end() == STORE),
        });
        Self {
            threads: threads.collect(),
        }
    }

    fn now(&self) -> Spent {
        let mut spent = Spent {
            sender_ns: process_cpu_ns(),
            ..Spent::default()
        };
        for thread in &self.threads {
            // Its first number is the time on a processor.
            let told = std::fs::read_to_string(&thread.schedstat).unwrap_or_default();
            let time_ns = told.split_whitespace().next().and_then(|ns| ns.parse().ok());
            let sum_ns = if thread.is_store {
                &mut spent.store_ns
            } else {
                &mut spent.receiver_ns
            };
            *sum_ns += time_ns.unwrap_or(0_u64);
        }
        spent
    }

    /// Adds to `cost` what `work` takes, which moves so many bytes.
    pub(super) fn during<T>(&self, cost: &mut Cost, bytes: u64, work: impl FnOnce() -> T) -> T {
        let begun = self.now();
        let done = work();
        let ended = self.now();
        let spent = &mut cost.spent;
        spent.sender_ns += ended.sender_ns.saturating_sub(begun.sender_ns);
        spent.receiver_ns += ended.receiver_ns.saturating_sub(begun.receiver_ns);
        spent.store_ns += ended.store_ns.saturating_sub(begun.store_ns);
        cost.bytes += bytes;
        done
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |time_ns| a_mib(time_ns, self.bytes) / 1000;
        let Spent {
            sender_ns,
            receiver_ns,
            store_ns,
        } = self.spent;
        write!(f, "sender {}, receiver {}", us(sender_ns), us(receiver_ns))?;
        match us(store_ns) {
            0 => Ok(()),
            store_us => write!(f, ", store {store_us}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_told_for_each_mebibyte_and_by_whom() {
        let mut cost = Cost {
            spent: Spent {
                sender_ns: 3_000_000,
                receiver_ns: 2_000_000,
                store_ns: 0,
            },
            bytes: 2 << 20,
        };
        assert_eq!(cost.to_string(), "sender 1500, receiver 1000");
        cost.spent.store_ns = 4_000_000;
        assert_eq!(cost.to_string(), "sender 1500, receiver 1000, store 2000");
    }

    #[test]
    fn what_is_watched_counts_for_the_bytes_that_were_moved() {
        let watch = Watch::new(std::process::id());
        let mut cost = Cost::default();
        assert_eq!(watch.during(&mut cost, 5, || 7), 7);
        watch.during(&mut cost, 6, || ());
        assert_eq!(cost.bytes, 11);
    }
}
