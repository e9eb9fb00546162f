//! Longer epochs for an idle guest: one that wrote little is left alone past its epoch's end, until it says something.
//!
//! Nobody waits for the checkpoint of a guest that says nothing. As soon as output is held one is taken, and that output waits for less
//! than it would in an epoch that had just begun. What the longer epoch risks is a longer pause, when a guest that was idle begins
//! to write: it has written for that much longer.

use romulus_hypervisor::source::CaptureReport;
use romulus_types::Time;

/// Pages that an idle guest would write in its longer epoch, at most: so many the backup commits at once, where it reads them.
const IDLE_PAGES_MAX: u64 = 64;

/// Decides how long an epoch goes on past its end.
pub struct IdleWait {
    /// An idle guest's epoch, in nanoseconds; not longer than other epochs: all are as long as these.
    length_ns: u64,
    /// Output is held: otherwise nothing would tell that the guest speaks.
    gate_closed: bool,
    /// The epoch before was an idle guest's.
    idle: bool,
}

impl IdleWait {
    /// An idle guest's epochs are so long at most, in nanoseconds.
    pub fn new(length_ns: u64) -> Self {
        Self {
            length_ns,
            gate_closed: false,
            idle: false,
        }
    }

    /// A session begins, with an open gate.
    pub fn begin(&mut self) {
        self.gate_closed = false;
        self.idle = false;
    }

    /// An epoch of so many nanoseconds was captured, 0 for the first of a session; with `closed`, output is held since its end.
    pub fn captured(&mut self, closed: bool, interval_ns: u64, report: &CaptureReport) {
        self.gate_closed |= closed;
        let pages = u128::from(report.dirty_pages) * u128::from(self.length_ns);
        self.idle = interval_ns > 0 && pages <= u128::from(IDLE_PAGES_MAX) * u128::from(interval_ns);
    }

    /// Until when an epoch that began at `began` and was to end at `at` may go on, if it may.
    pub fn until(&self, began: Option<Time>, at: Time) -> Option<Time> {
        let until = began?.after_ns(self.length_ns);
        (self.idle && self.gate_closed && until > at).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn at(ms: u64) -> Time {
        Time::from_ns(ms * MS)
    }

    fn report(dirty_pages: u64) -> CaptureReport {
        CaptureReport {
            dirty_pages,
            ..CaptureReport::default()
        }
    }

    #[test]
    fn an_idle_guest_behind_a_closed_gate_is_left_alone_for_longer() {
        let mut idle = IdleWait::new(100 * MS);
        idle.captured(true, 25 * MS, &report(16));
        assert_eq!(idle.until(Some(at(100)), at(125)), Some(at(200)));
        idle.captured(false, 100 * MS, &report(IDLE_PAGES_MAX));
        assert_eq!(idle.until(Some(at(200)), at(225)), Some(at(300)));
        assert_eq!(idle.until(Some(at(200)), at(300)), None, "it is as long already");
        assert_eq!(idle.until(None, at(25)), None, "the first epoch of a session");
    }

    #[test]
    fn others_are_not() {
        let mut idle = IdleWait::new(100 * MS);
        idle.captured(false, 25 * MS, &report(0));
        assert_eq!(
            idle.until(Some(at(0)), at(25)),
            None,
            "nothing tells that it speaks"
        );
        idle.captured(true, 25 * MS, &report(17));
        assert_eq!(
            idle.until(Some(at(25)), at(50)),
            None,
            "it would write to 68 pages"
        );
        idle.captured(false, 25 * MS, &report(0));
        assert!(idle.until(Some(at(25)), at(50)).is_some());
        idle.begin();
        idle.captured(false, 25 * MS, &report(0));
        assert_eq!(
            idle.until(Some(at(25)), at(50)),
            None,
            "another session, its gate is open"
        );
    }
}
