//! Every interrupt of an armed timer must arrive: once, not before its time, and at last.
//!
//! "At last" needs care, as the guest may be carried to another host at any moment, and its clock then jumps over the
//! time in between. So a timer counts as lost only when it was seen overdue twice, [`GRACE_NS`] and [`LOOKS`] looks
//! apart: no single jump makes both.

use core::fmt;

/// How long an overdue timer is waited for after it was first seen to be overdue, in nanoseconds of kvmclock.
pub const GRACE_NS: u64 = 2_000_000_000;
/// How many times an overdue timer is looked at, at least, before it counts as lost.
pub const LOOKS: u32 = 16;
/// By how much an interrupt may come before its time: this, in nanoseconds, and a hundredth of the time it was armed for.
pub const EARLY_NS: u64 = 100_000;

/// What is wrong with a timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerError {
    /// More interrupts came than timers were armed.
    Twice {
        /// Interrupts that came.
        fired: u64,
        /// Timers that were armed.
        armed: u64,
    },
    /// The interrupt came before its time.
    Early {
        /// By how much, in nanoseconds.
        by_ns: u64,
    },
    /// The interrupt does not come.
    Lost {
        /// For how long it is overdue, in nanoseconds.
        overdue_ns: u64,
    },
}

impl fmt::Display for TimerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TimerError::Twice { fired, armed } => {
                write!(f, "{fired} timer interrupts came, {armed} were armed")
            }
            TimerError::Early { by_ns } => write!(f, "the timer interrupt came {by_ns} ns early"),
            TimerError::Lost { overdue_ns } => write!(f, "the timer interrupt is {overdue_ns} ns overdue"),
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
    pending: Option<Pending>,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    /// Interrupts counted before this one.
    fired_before: u64,
    armed_at_ns: u64,
    deadline_ns: u64,
    /// An earlier timer was still pending when this one was armed, and either of them may be the one that fires.
    replaced: bool,
    overdue: Overdue,
}

impl TimerWatch {
    /// Interrupts that were asked for so far.
    #[must_use]
    pub fn armed(&self) -> u64 {
        self.armed
    }

    /// When the pending timer will fire, in nanoseconds of kvmclock.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.pending.map(|pending| pending.deadline_ns)
    }

    /// Notes that the timer is about to be armed at `now_ns` for `deadline_ns`, when `fired` interrupts have come.
    /// Whether the timer that it replaces has fired is found by [`TimerWatch::observe`] before.
    pub fn arm(&mut self, now_ns: u64, deadline_ns: u64, fired: u64) {
        self.armed += 1;
        let replaced = self.pending.is_some();
        self.pending = Some(Pending {
            fired_before: fired,
            armed_at_ns: now_ns,
            deadline_ns,
            replaced,
            overdue: Overdue::default(),
        });
    }

    /// Looks at the count of interrupts; `now_ns` must have been read after it.
    ///
    /// # Errors
    /// [`TimerError`] when an interrupt came twice, early or not at all.
    pub fn observe(&mut self, now_ns: u64, fired: u64) -> Result<(), TimerError> {
        if fired > self.armed {
            return Err(TimerError::Twice {
                fired,
                armed: self.armed,
            });
        }
        let Some(pending) = &mut self.pending else {
            return Ok(());
        };
        if fired > pending.fired_before {
            let early = pending.deadline_ns.saturating_sub(now_ns);
            let tolerated = EARLY_NS + pending.deadline_ns.saturating_sub(pending.armed_at_ns) / 100;
            if early > tolerated && !pending.replaced {
                return Err(TimerError::Early { by_ns: early });
            }
            self.pending = None;
            return Ok(());
        }
        if now_ns < pending.deadline_ns {
            return Ok(());
        }
        if pending.overdue.look(now_ns) {
            return Err(TimerError::Lost {
                overdue_ns: now_ns - pending.deadline_ns,
            });
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
        watch.arm(0, 10 * MS, 0);
        watch
    }

    #[test]
    fn a_timer_in_time_is_fine_and_so_is_the_next() {
        let mut watch = armed();
        assert_eq!(watch.observe(5 * MS, 0), Ok(()));
        assert_eq!(watch.observe(10 * MS, 1), Ok(()));
        watch.arm(11 * MS, 12 * MS, 1);
        assert_eq!(watch.observe(13 * MS, 2), Ok(()));
    }

    #[test]
    fn an_interrupt_too_many_is_found() {
        let mut watch = armed();
        assert_eq!(
            watch.observe(10 * MS, 2),
            Err(TimerError::Twice { fired: 2, armed: 1 })
        );
    }

    #[test]
    fn an_early_interrupt_is_found() {
        assert_eq!(
            armed().observe(5 * MS, 1),
            Err(TimerError::Early { by_ns: 5 * MS })
        );
    }

    #[test]
    fn an_interrupt_of_the_timer_before_is_no_early_one() {
        let mut watch = armed();
        watch.arm(9 * MS, 30 * MS, 0);
        assert_eq!(watch.observe(11 * MS, 1), Ok(()));
    }

    #[test]
    fn a_lost_interrupt_is_found() {
        let mut watch = armed();
        let found = (0..10_000).find_map(|ms| watch.observe(ms * MS, 0).err());
        assert!(matches!(found, Some(TimerError::Lost { .. })));
    }

    #[test]
    fn one_jump_of_the_clock_loses_nothing() {
        let mut watch = armed();
        assert_eq!(watch.observe(9 * MS, 0), Ok(()));
        assert!((0..1000).all(|_| watch.observe(60_000 * MS, 0).is_ok()));
        assert_eq!(watch.observe(60_001 * MS, 1), Ok(()));
    }
}
