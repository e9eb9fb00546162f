//! Every armed timer must fire at last.
//!
//! "At last" needs care, as the guest may be carried to another host at any moment, and its clock then jumps over the
//! time in between. So a timer counts as lost only when it was seen overdue twice, [`GRACE_NS`] and [`LOOKS`] looks
//! apart: no single jump makes both.
//!
//! An interrupt that nobody asked for, or that comes before its time, is counted as spurious and taken for no timer's: a
//! restored local APIC of KVM fires a one-shot timer again that had fired before.

use core::fmt;

/// How long an overdue timer is waited for after it was first seen to be overdue, in nanoseconds of kvmclock.
pub const GRACE_NS: u64 = 2_000_000_000;
/// How many times an overdue timer is looked at, at least, before it counts as lost.
pub const LOOKS: u32 = 16;
/// By how much an interrupt may come before its time: this, in nanoseconds, and a hundredth of the time it was armed for.
pub const EARLY_NS: u64 = 100_000;

/// A timer's interrupt does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimerLost {
    /// For how long it is overdue, in nanoseconds.
    pub overdue_ns: u64,
}

impl fmt::Display for TimerLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the timer interrupt is {} ns overdue", self.overdue_ns)
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
    spurious: u64,
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

    /// Interrupts that were no timer's.
    #[must_use]
    pub fn spurious(&self) -> u64 {
        self.spurious
    }

    /// When the pending timer will fire, in nanoseconds of kvmclock.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.pending.map(|pending| pending.deadline_ns)
    }

    /// Notes that the timer is about to be armed at `now_ns` for `deadline_ns`, instead of what is pending.
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
    /// [`TimerLost`] when the pending timer does not fire.
    pub fn observe(&mut self, now_ns: u64, fired: u64) -> Result<(), TimerLost> {
        while self.seen < fired {
            self.seen += 1;
            if self.pending.is_some_and(|pending| pending.may_have_fired(now_ns)) {
                self.pending = None;
            } else {
                self.spurious += 1;
            }
        }
        let Some(pending) = &mut self.pending else {
            return Ok(());
        };
        if now_ns >= pending.deadline_ns && pending.overdue.look(now_ns) {
            return Err(TimerLost {
                overdue_ns: now_ns - pending.deadline_ns,
            });
        }
        Ok(())
    }
}

impl Pending {
    fn may_have_fired(&self, now_ns: u64) -> bool {
        let early_ns = EARLY_NS + self.deadline_ns.saturating_sub(self.armed_at_ns) / 100;
        now_ns.saturating_add(early_ns) >= self.deadline_ns
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
        assert_eq!((watch.armed(), watch.spurious(), watch.deadline()), (2, 0, None));
    }

    #[test]
    fn an_interrupt_too_many_is_counted() {
        let mut watch = armed();
        assert_eq!(watch.observe(10 * MS, 2), Ok(()));
        assert_eq!(watch.spurious(), 1);
    }

    #[test]
    fn an_early_interrupt_is_counted_and_the_timer_still_waited_for() {
        let mut watch = armed();
        assert_eq!(watch.observe(5 * MS, 1), Ok(()));
        assert_eq!((watch.spurious(), watch.deadline()), (1, Some(10 * MS)));
        assert!(lost(&mut watch.clone(), 1));
        assert_eq!(watch.observe(10 * MS, 2), Ok(()));
        assert_eq!(watch.deadline(), None);
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
