//! What every vCPU does: check itself, dirty memory, count work, and sleep until there is more to do.

use core::sync::atomic::Ordering;

use romulus_guest_core::clock::Monotonic;
use romulus_guest_core::dirty::{self, Dirtying, Pacer, Walk};
use romulus_guest_core::page::{self, Content};
use romulus_guest_core::random::Random;
use romulus_guest_core::settings::Check;
use romulus_guest_core::timer::TimerWatch;

use crate::arch::chain::{self, Vectors};
use crate::arch::clock::{Clock, Moment};
use crate::arch::registers::Marks;
use crate::arch::{boot, lapic};
use crate::console::failed;
use crate::memory::{Page, Pages};
use crate::shared::{DIRTYING, DIRTYING_CHANGES, FIGURES, Figures, LATEST_NS};

/// Time between two rounds of checks when the guest is not to be busy with them, in nanoseconds.
const ROUND_NS: u64 = 5_000_000;
/// Longest time for which the timer is armed, in nanoseconds: its counter has 32 bits.
const SLEEP_NS_MAX: u64 = 4_000_000_000;
/// How long one turn may take before a vCPU is missed, in nanoseconds.
const TURN_NS_MAX: u64 = 1_000_000_000;
/// Pages that one turn writes, so that the network does not wait for more.
const PAGES_A_TURN: u64 = 32;
/// Pages for which a guest that writes few of them is content to wake up.
const PAGES_A_WAKE: u32 = 16;
/// Pages of the dirty set that one round checks.
const PAGES_A_ROUND: u64 = 8;

/// What vCPU 0 gives a worker to work with.
pub struct Parts {
    /// Start of the kvmclock areas.
    pub kvmclock: u64,
    /// How busy the checks are.
    pub check: Check,
    /// Whether time left over is spent on countable work.
    pub work: bool,
    /// Pages that are checked and written again, round by round.
    pub blocks: Pages,
    /// The dirty set, for the vCPU that has the dirtier.
    pub dirty_set: Option<Pages>,
}

/// One vCPU's work.
pub struct Worker {
    vcpu: u32,
    figures: &'static Figures,
    /// Its clock.
    pub clock: Clock,
    kvmclock: Monotonic,
    tsc: Monotonic,
    timer: TimerWatch,
    check: Check,
    work: bool,
    words: [u64; 14],
    checks: Checks,
    dirtier: Option<Dirtier>,
    next_round_ns: u64,
}

impl Worker {
    /// Gets this vCPU ready.
    pub fn new(vcpu: u32, parts: Parts) -> Self {
        let clock = Clock::new(parts.kvmclock, vcpu);
        lapic::start(vcpu);
        Worker {
            vcpu,
            figures: &FIGURES[vcpu as usize],
            clock,
            kvmclock: Monotonic::default(),
            tsc: Monotonic::default(),
            timer: TimerWatch::default(),
            check: parts.check,
            work: parts.work,
            words: [1; 14],
            checks: Checks::new(vcpu, parts.blocks),
            dirtier: parts.dirty_set.map(Dirtier::new),
            next_round_ns: 0,
        }
    }

    /// Does what is due. Gives the time now, and when there will be more to do, both by kvmclock in nanoseconds.
    pub fn turn(&mut self) -> (u64, u64) {
        let now_ns = self.look();
        self.figures.due_ns.store(now_ns + TURN_NS_MAX, Ordering::Relaxed);
        let mut wake_ns = u64::MAX;
        if let Some(dirtier) = &mut self.dirtier {
            wake_ns = wake_ns.min(dirtier.turn(now_ns, self.figures));
        }
        if self.check != Check::Off {
            if now_ns >= self.next_round_ns {
                self.round();
                self.next_round_ns = if self.check == Check::Busy {
                    now_ns
                } else {
                    now_ns + ROUND_NS
                };
            }
            wake_ns = wake_ns.min(self.next_round_ns);
        }
        (now_ns, wake_ns)
    }

    /// Passes the time until `wake_ns`, or until an interrupt comes that was not counted in `seen`: with work, or asleep.
    pub fn rest(&mut self, wake_ns: u64, seen: u64) {
        if self.work {
            while boot::interrupts() == seen && self.clock.ns() < wake_ns {
                chain::work(&mut self.words);
                self.figures.work_units.fetch_add(1, Ordering::Relaxed);
            }
            return;
        }
        let mut now_ns = self.look();
        if wake_ns <= now_ns {
            return;
        }
        let pending = self.timer.deadline();
        if wake_ns != u64::MAX && pending.is_none_or(|deadline| deadline > wake_ns) {
            if pending.is_some() {
                // Otherwise it could fire before it is armed anew, and be taken for the new one.
                lapic::disarm();
                now_ns = self.look();
                self.timer.take_back();
                if wake_ns <= now_ns {
                    return;
                }
            }
            let delay = u32::try_from((wake_ns - now_ns).min(SLEEP_NS_MAX)).unwrap_or(u32::MAX);
            self.timer.arm(now_ns, now_ns + u64::from(delay));
            self.figures.timers.store(self.timer.armed(), Ordering::Relaxed);
            lapic::arm(delay);
        }
        self.figures
            .due_ns
            .store(self.timer.deadline().unwrap_or(u64::MAX), Ordering::Relaxed);
        boot::idle(seen);
    }

    /// Looks at the clocks and at the timer; gives the time.
    fn look(&mut self) -> u64 {
        let (latest_ns, fired) = (LATEST_NS.load(Ordering::Acquire), self.fired());
        let Moment { ns, tsc, stable } = self.clock.moment();
        let vcpu = self.vcpu;
        self.kvmclock
            .observe(ns)
            .unwrap_or_else(|wrong| failed(vcpu, format_args!("kvmclock {wrong}")));
        self.tsc
            .observe(tsc)
            .unwrap_or_else(|wrong| failed(vcpu, format_args!("the time stamp counter {wrong}")));
        if stable && ns < latest_ns {
            failed(
                vcpu,
                format_args!("kvmclock is {} ns behind another vCPU's", latest_ns - ns),
            );
        }
        LATEST_NS.fetch_max(ns, Ordering::AcqRel);
        self.timer
            .observe(ns, fired)
            .unwrap_or_else(|wrong| failed(vcpu, format_args!("{wrong}")));
        ns
    }

    fn fired(&self) -> u64 {
        boot::interrupts_of(lapic::timer_vector(self.vcpu))
    }

    /// One round of checks.
    fn round(&mut self) {
        self.checks.round(self.vcpu);
        if let Some(dirtier) = &mut self.dirtier {
            dirtier.check(self.vcpu);
        }
        self.figures.rounds.fetch_add(1, Ordering::Relaxed);
    }

    /// Spoils something, for a test of the check that must find it.
    pub fn damage(&mut self, what: Damage) {
        match what {
            Damage::Byte => self.checks.blocks.page(0)[100] ^= 0x10,
            Damage::Register => Marks::damage(),
            Damage::Timer => lapic::mask_timer(self.vcpu),
            Damage::Clock => {
                let _ = self.kvmclock.observe(self.clock.ns() + 3_600_000_000_000);
            }
        }
    }
}

/// What can be spoilt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One bit of memory.
    Byte,
    /// A register.
    Register,
    /// The timer: its next interrupts are lost.
    Timer,
    /// The clock, as it was seen before.
    Clock,
}

/// Checks of registers and memory.
struct Checks {
    marks: Marks,
    vectors: Vectors,
    random: Random,
    blocks: Pages,
    next_block: usize,
    round: u64,
}

impl Checks {
    fn new(vcpu: u32, mut blocks: Pages) -> Self {
        (0..blocks.len()).for_each(|index| page::fill(blocks.page(index), Content::Random, index as u64));
        Checks {
            marks: Marks::set(vcpu),
            vectors: Vectors::detect(),
            random: Random::new(u64::from(vcpu) + 1),
            blocks,
            next_block: 0,
            round: 0,
        }
    }

    fn round(&mut self, vcpu: u32) {
        if let Some(register) = self.marks.wrong() {
            failed(vcpu, format_args!("{register} has changed"));
        }
        if let Some(word) = chain::check_general(self.random.number()) {
            failed(
                vcpu,
                format_args!("general registers: word {word} of the chain is wrong"),
            );
        }
        if let Some(word) = chain::check_vectors(self.vectors, self.random.number()) {
            failed(
                vcpu,
                format_args!(
                    "vector registers ({:?}): word {word} of the chain is wrong",
                    self.vectors
                ),
            );
        }
        self.block(vcpu);
    }

    /// Checks one block and fills it anew. What a block holds follows from how often all of them were filled.
    fn block(&mut self, vcpu: u32) {
        let (index, blocks) = (self.next_block, self.blocks.len() as u64);
        let seed = index as u64 + self.round * blocks;
        let block: &mut Page = self.blocks.page(index);
        page::check(block, content_of(self.round), seed)
            .unwrap_or_else(|wrong| failed(vcpu, format_args!("block {index} at {block:p}: {wrong}")));
        page::fill(block, content_of(self.round + 1), seed + blocks);
        self.next_block = index + 1;
        if self.next_block as u64 == blocks {
            (self.next_block, self.round) = (0, self.round + 1);
        }
    }
}

fn content_of(round: u64) -> Content {
    if round.is_multiple_of(2) {
        Content::Random
    } else {
        Content::Text
    }
}

/// The dirtier and its set.
struct Dirtier {
    set: Pages,
    changes: u32,
    dirtying: Option<(Dirtying, Pacer)>,
    walk: Walk,
    next_check: usize,
}

impl Dirtier {
    fn new(set: Pages) -> Self {
        Dirtier {
            set,
            changes: u32::MAX,
            dirtying: None,
            walk: Walk::new(1),
            next_check: 0,
        }
    }

    /// Writes what is due, at most a few pages. Says when there will be more.
    fn turn(&mut self, now_ns: u64, figures: &Figures) -> u64 {
        let changes = DIRTYING_CHANGES.load(Ordering::Acquire);
        if changes != self.changes {
            self.changes = changes;
            self.dirtying = DIRTYING
                .with(|wanted| *wanted)
                .map(|wanted| (wanted, Pacer::new(&wanted, now_ns)));
        }
        let Some((dirtying, pacer)) = &mut self.dirtying else {
            return u64::MAX;
        };
        let wanted = dirtying.set_mib.map_or(usize::MAX, |mib| mib as usize * 256);
        let pages = self.set.len().min(wanted) as u64;
        if pages == 0 {
            return u64::MAX;
        }
        let (due, skipped) = (pacer.due(now_ns), pacer.skipped);
        let now = due.min(PAGES_A_TURN);
        for _ in 0..now {
            let index = self.walk.next(dirtying.pattern, pages);
            dirty::write_page(self.set.page(index as usize), index, dirtying.content);
        }
        pacer.done(now);
        figures.pages_written.fetch_add(now, Ordering::Relaxed);
        figures.dirty_rounds.store(pacer.rounds(), Ordering::Relaxed);
        figures.pages_skipped.store(skipped, Ordering::Relaxed);
        // Not for each page by itself: the guest would do nothing but wake up. What is due in a millisecond, or of a few pages a
        // quarter.
        if due > now {
            now_ns
        } else {
            let a_ms = dirtying.pages / dirtying.period_ms.max(1);
            let a_quarter = (dirtying.pages / 4).min(PAGES_A_WAKE);
            pacer.when(a_ms.max(a_quarter).max(1).into())
        }
    }

    /// Checks the next pages of the set, whether they were ever written or not.
    fn check(&mut self, vcpu: u32) {
        for _ in 0..PAGES_A_ROUND.min(self.set.len() as u64) {
            let index = self.next_check;
            let page = self.set.page(index);
            dirty::check_page(page, index as u64).unwrap_or_else(|wrong| {
                failed(vcpu, format_args!("dirty page {index} at {page:p}: {wrong}"))
            });
            self.next_check = if index + 1 < self.set.len() { index + 1 } else { 0 };
        }
    }
}
