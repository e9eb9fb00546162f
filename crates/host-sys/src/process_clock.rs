//! The clock that the daemons feed to the deterministic parts.

use std::time::{Duration, Instant};

use romulus_types::Time;

/// A process's one clock: [`Time`]s count from when it was started.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that begins now, at one nanosecond, so that zero can stand for "never".
    pub fn start() -> Self {
        Self {
            origin: Instant::now(),
        }
    }

    /// The time now.
    pub fn now(&self) -> Time {
        let ns = u64::try_from(self.origin.elapsed().as_nanos()).expect("584 years have not passed");
        Time::from_ns(ns + 1)
    }

    /// The same moment as the standard library counts it.
    pub fn instant(&self, time: Time) -> Instant {
        self.origin + Duration::from_nanos(time.ns.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_and_its_instant_are_the_same_moment() {
        let clock = Clock::start();
        let now = clock.now();
        assert!(clock.instant(now) <= Instant::now());
        assert_eq!(
            clock.instant(now.after_ns(5)) - clock.instant(now),
            Duration::from_nanos(5)
        );
    }
}
