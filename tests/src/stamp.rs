//! Moments that can be compared between processes of one machine.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment by the machine's real-time clock, in microseconds since 1970.
///
/// The clocks of processes, of captured frames and of log lines are all this one. A run is spoilt if somebody sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

impl Stamp {
    /// This moment.
    #[must_use]
    pub fn now() -> Stamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Stamp::from_micros(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    /// A moment given in microseconds since 1970.
    #[must_use]
    pub fn from_micros(micros: u64) -> Stamp {
        Stamp(micros)
    }

    /// A moment as logs write it, such as `2026-01-31T12:00:00.123456Z`.
    #[must_use]
    pub fn parse_rfc3339(text: &str) -> Option<Stamp> {
        let time = humantime::parse_rfc3339(text).ok()?;
        let since = time.duration_since(UNIX_EPOCH).ok()?;
        Some(Stamp(u64::try_from(since.as_micros()).ok()?))
    }

    /// Microseconds since 1970.
    #[must_use]
    pub fn micros(self) -> u64 {
        self.0
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn seconds(self) -> f64 {
        Duration::from_micros(self.0).as_secs_f64()
    }

    /// Milliseconds from `earlier` to this moment; negative when it is not earlier.
    #[must_use]
    pub fn ms_since(self, earlier: Stamp) -> f64 {
        let (big, small, sign) = if self.0 >= earlier.0 {
            (self.0, earlier.0, 1.0)
        } else {
            (earlier.0, self.0, -1.0)
        };
        Duration::from_micros(big - small).as_secs_f64() * 1e3 * sign
    }

    /// This moment, later by so much.
    #[must_use]
    pub fn plus(self, more: Duration) -> Stamp {
        Stamp(
            self.0
                .saturating_add(u64::try_from(more.as_micros()).unwrap_or(u64::MAX)),
        )
    }

    /// This moment, earlier by so much.
    #[must_use]
    pub fn minus(self, less: Duration) -> Stamp {
        Stamp(
            self.0
                .saturating_sub(u64::try_from(less.as_micros()).unwrap_or(u64::MAX)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_time_is_read_to_the_microsecond() {
        let stamp = Stamp::parse_rfc3339("1970-01-01T00:00:02.000345Z").unwrap();
        assert_eq!(stamp.micros(), 2_000_345);
        assert!((Stamp::from_micros(2_001_345).ms_since(stamp) - 1.0).abs() < 1e-9);
        assert!((stamp.ms_since(Stamp::from_micros(2_001_345)) + 1.0).abs() < 1e-9);
    }
}
