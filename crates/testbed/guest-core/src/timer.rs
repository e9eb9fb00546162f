//! Every armed timer must fire at last.
//!
//! "At last" needs care, as the guest may be carried to another host at any moment, and its clock then jumps over the
//! time in between. So a timer counts as lost only when it was seen overdue twice, [`GRACE_NS`] and [`LOOKS`] looks
//! apart: no single jump makes both.
//!
//! An interrupt that nobody asked for, or that comes before its time, is wrong as well: a timer that had fired before was
//! restored as if it had not.

use core::fmt;

/// How long an overdue timer is waited for after it was first seen to be overdue, in nanoseconds of kvmclock.
pub const GRACE_NS: u64 = 2_000_000_000;
/// How many times an overdue timer is looked at, at least, before it counts as lost.
pub const LOOKS: u32 = 16;
/// By how much an interrupt may come before its time: this, in nanoseconds, and a hundredth of the time it was armed for.
pub const EARLY_NS: u64 = 100_000;

/// A timer does not do what it was armed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerWrong {
    /// Its interrupt does not come.
    Lost {
        /// For how long it is overdue, in nanoseconds.
        overdue_ns: u64,
    },
    /// An interrupt comes too early for it.
    Early {
        /// How much too early, in nanoseconds.
        early_ns: u64,
    },
    /// An interrupt comes when none is armed.
    Unasked,
}

impl fmt::Display for TimerWrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TimerWrong::Lost { overdue_ns } => write!(f, "the timer interrupt is {overdue_ns} ns overdue"),
            TimerWrong::Early { early_ns } => write!(f, "the timer interrupt is {early_ns} ns early"),
            TimerWrong::Unasked => write!(f, "a timer interrupt came that was not asked for"),
        }
    }
}

/// Tells what is late from what is lost, across jumps of the clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct Overdue {
    first_ns: u64,
    looks: u32,
}

impl Overdue {
    /// Looks at something at `now_ns` that was due before; says whether it must be taken for lost.
    pub fn look(&mut self, now_ns: u64) -> bool {
        if self.looks == 0 {
            self.first_ns = now_ns;
        }
        self.looks = self.looks.saturating_add(1);
        self.looks > LOOKS && now_ns > self.first_ns.saturating_add(GRACE_NS)
    }
}

/// Watches one vCPU's one-shot timer.
#[derive(Debug, Clone, Default)]
pub struct TimerWatch {
    armed: u64,
    /// Interrupts that are accounted for.
    seen: u64,
    pending: Option<Pending>,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    armed_at_ns: u64,
    deadline_ns: u64,
    overdue: Overdue,
}

impl TimerWatch {
    /// Timers that were armed so far.
    #[must_use]
    pub fn armed(&self) -> u64 {
        self.armed
    }

    /// When the pending timer will fire, in nanoseconds of kvmclock.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.pending.map(|pending| pending.deadline_ns)
    }

    /// Notes that the timer was taken back, if it had not fired: [`TimerWatch::observe`] has looked since.
    pub fn take_back(&mut self) {
        self.pending = None;
    }

    /// Notes that the timer, which is not pending, is about to be armed at `now_ns` for `deadline_ns`.
    pub fn arm(&mut self, now_ns: u64, deadline_ns: u64) {
        self.armed += 1;
        self.pending = Some(Pending {
            armed_at_ns: now_ns,
            deadline_ns,
            overdue: Overdue::default(),
        });
    }

    /// Looks at the count of interrupts; `now_ns` must have been read after it.
    ///
    /// # Errors
    /// [`TimerWrong`]; nothing it says afterwards means anything.
    pub fn observe(&mut self, now_ns: u64, fired: u64) -> Result<(), TimerWrong> {
        while self.seen < fired {
            self.seen += 1;
            let pending = self.pending.take().ok_or(TimerWrong::Unasked)?;
            pending.fire(now_ns)?;
        }
        let Some(pending) = &mut self.pending else {
            return Ok(());
        };
        if now_ns >= pending.deadline_ns && pending.overdue.look(now_ns) {
            return Err(TimerWrong::Lost {
                overdue_ns: now_ns - pending.deadline_ns,
            });
        }
        Ok(())
    }
}

impl Pending {
    fn fire(&self, now_ns: u64) -> Result<(), TimerWrong> {
        let early_ns = self.deadline_ns.saturating_sub(now_ns);
        let allowed_ns = EARLY_NS + self.deadline_ns.saturating_sub(self.armed_at_ns) / 100;
        if early_ns > allowed_ns {
            return Err(TimerWrong::Early { early_ns });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn armed() -> TimerWatch {
        let mut watch = TimerWatch::default();
        watch.arm(0, 10 * MS);
        watch
    }

    fn lost(watch: &mut TimerWatch, fired: u64) -> bool {
        (0..10_000).any(|ms| watch.observe(ms * MS, fired).is_err())
    }

    #[test]
    fn a_timer_in_time_is_fine_and_so_is_the_next() {
        let mut watch = armed();
        assert_eq!(watch.observe(5 * MS, 0), Ok(()));
        assert_eq!(watch.observe(10 * MS, 1), Ok(()));
        watch.arm(11 * MS, 12 * MS);
        assert_eq!(watch.observe(13 * MS, 2), Ok(()));
        assert_eq!((watch.armed(), watch.deadline()), (2, None));
    }

    #[test]
    fn an_interrupt_too_many_is_found() {
        assert_eq!(armed().observe(10 * MS, 2), Err(TimerWrong::Unasked));
    }

    #[test]
    fn an_early_interrupt_is_found() {
        assert_eq!(
            armed().observe(5 * MS, 1),
            Err(TimerWrong::Early { early_ns: 5 * MS })
        );
        assert_eq!(armed().observe(10 * MS - EARLY_NS, 1), Ok(()));
    }

    #[test]
    fn a_timer_that_was_taken_back_must_not_fire() {
        let mut watch = armed();
        watch.take_back();
        assert_eq!(watch.observe(60 * MS, 0), Ok(()));
        assert_eq!(watch.observe(61 * MS, 1), Err(TimerWrong::Unasked));
    }

    #[test]
    fn a_lost_interrupt_is_found() {
        assert!(lost(&mut armed(), 0));
    }

    #[test]
    fn one_jump_of_the_clock_loses_nothing() {
        let mut watch = armed();
        assert_eq!(watch.observe(9 * MS, 0), Ok(()));
        assert!((0..1000).all(|_| watch.observe(60_000 * MS, 0).is_ok()));
        assert_eq!(watch.observe(60_001 * MS, 1), Ok(()));
    }
}
