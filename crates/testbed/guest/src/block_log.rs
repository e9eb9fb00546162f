//! The log on the disk: record after record is written, and records of before are read back and checked.

use romulus_guest_core::block_log;
use romulus_guest_core::random::Random;
use romulus_guest_core::timer::Overdue;

use crate::console::failed;
use crate::virtio::blk::{Ask, Blk, REQUESTS};

/// Time between two records, in nanoseconds.
const PERIOD_NS: u64 = 5_000_000;
/// After how long an unanswered request is late, in nanoseconds. A busy host's disk takes seconds for a flush.
const LATE_NS: u64 = 30_000_000_000;
/// Records between two flushes.
const FLUSH_EVERY: u64 = 64;
/// Fewest records that a disk must hold to be used.
const SLOTS_MIN: u64 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Writing(u64),
    Reading(u64),
    Flushing,
}

/// The log.
pub struct BlockLog {
    blk: Blk,
    boot: u64,
    /// Sequence number of the next record.
    next: u64,
    doing: [Doing; REQUESTS],
    asked_ns: [u64; REQUESTS],
    overdue: [Overdue; REQUESTS],
    random: Random,
    next_ns: u64,
    /// Records that were written.
    pub written: u64,
    /// Records that were read back and were right.
    pub verified: u64,
}

impl BlockLog {
    /// A log on a disk; `boot` tells its records from those of another boot. `None` when the disk is too small.
    pub fn new(blk: Blk, boot: u64) -> Option<Self> {
        (blk.slots() >= SLOTS_MIN).then(|| BlockLog {
            blk,
            boot,
            next: 0,
            doing: [Doing::Nothing; REQUESTS],
            asked_ns: [0; REQUESTS],
            overdue: [Overdue::default(); REQUESTS],
            random: Random::new(boot),
            next_ns: 0,
            written: 0,
            verified: 0,
        })
    }

    /// Takes what the disk has done and asks for more; says when it wants to be called again.
    pub fn turn(&mut self, now_ns: u64) -> u64 {
        while let Some((request, status)) = self.blk.done() {
            self.finish(request, status, now_ns);
        }
        if now_ns >= self.next_ns
            && let Some(free) = self.doing.iter().position(|&doing| doing == Doing::Nothing)
        {
            self.next_ns = now_ns + PERIOD_NS;
            let sequence = self.next;
            self.next += 1;
            block_log::write(self.blk.record(free), self.boot, sequence, now_ns);
            self.ask(free, Doing::Writing(sequence), now_ns);
        }
        self.blk.kick();
        self.watch(now_ns);
        self.next_ns.max(now_ns + 1)
    }

    fn finish(&mut self, request: usize, status: u8, now_ns: u64) {
        let doing = core::mem::replace(&mut self.doing[request], Doing::Nothing);
        if doing == Doing::Nothing {
            failed(
                0,
                format_args!("the disk answers request {request}, which was not asked"),
            );
        }
        if status != 0 {
            failed(0, format_args!("the disk answers {doing:?} with status {status}"));
        }
        match doing {
            Doing::Writing(sequence) => {
                self.written += 1;
                let back = self.choose(sequence);
                self.ask(request, Doing::Reading(back), now_ns);
            }
            Doing::Reading(sequence) => {
                block_log::check(self.blk.record(request), self.boot, sequence).unwrap_or_else(|wrong| {
                    failed(0, format_args!("record {sequence} on the disk: {wrong}"))
                });
                self.verified += 1;
                if self.verified.is_multiple_of(FLUSH_EVERY) && self.blk.can_flush() {
                    self.ask(request, Doing::Flushing, now_ns);
                }
            }
            Doing::Flushing | Doing::Nothing => {}
        }
    }

    /// A record to read back: the one just written, or one of before that is surely written and still there.
    fn choose(&mut self, written: u64) -> u64 {
        let reach = written.min(self.blk.slots() / 2);
        let back = written - self.random.below(reach + 1);
        if self.doing.contains(&Doing::Writing(back)) {
            written
        } else {
            back
        }
    }

    fn ask(&mut self, request: usize, doing: Doing, now_ns: u64) {
        let slots = self.blk.slots();
        let ask = match doing {
            Doing::Writing(sequence) => Ask::Write(sequence % slots),
            Doing::Reading(sequence) => Ask::Read(sequence % slots),
            Doing::Flushing | Doing::Nothing => Ask::Flush,
        };
        self.blk.ask(request, ask);
        self.doing[request] = doing;
        self.asked_ns[request] = now_ns;
        self.overdue[request] = Overdue::default();
    }

    fn watch(&mut self, now_ns: u64) {
        for request in 0..REQUESTS {
            let late = now_ns > self.asked_ns[request] + LATE_NS && self.doing[request] != Doing::Nothing;
            if late && self.overdue[request].look(now_ns) {
                failed(
                    0,
                    format_args!("the disk does not answer {:?}", self.doing[request]),
                );
            }
        }
    }
}
