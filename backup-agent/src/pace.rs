//! How fast one VM's pages are read: a limit on bytes a second. What is not read waits at the primary, by the connection's flow
//! control, and no other VM's connection is touched by it.

use std::time::{Duration, Instant};

/// What may come at once after a quiet time, as time at the full rate.
const BURST: Duration = Duration::from_millis(50);

/// Says when the next bytes may be read.
pub struct Pace {
    bytes_per_second: u64,
    /// When all that was read has been paid for.
    paid_at: Instant,
}

impl Pace {
    /// At most so many bytes a second; more than none.
    pub fn new(bytes_per_second: u64, now: Instant) -> Self {
        assert!(bytes_per_second > 0, "a checked setting");
        Self {
            bytes_per_second,
            paid_at: now,
        }
    }

    /// So many bytes were read. Until when to wait before the next are; none: not at all.
    pub fn read(&mut self, bytes: usize, now: Instant) -> Option<Instant> {
        let cost_ns = bytes as u128 * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(cost_ns).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.paid_at = self.paid_at.max(earliest) + cost;
        (self.paid_at > now).then_some(self.paid_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_in_the_long_run_is_the_limit_and_a_burst_is_let_through() {
        let began = Instant::now();
        let mut now = began;
        let mut pace = Pace::new(1 << 20, began);
        let mut read = 0;
        for _ in 0..1000 {
            read += 4096;
            if let Some(until) = pace.read(4096, now) {
                now = until;
            }
        }
        assert_eq!(now - began, Duration::from_nanos((read * 1_000_000_000) >> 20));

        let quiet = now + Duration::from_secs(60);
        assert_eq!(pace.read(16 << 10, quiet), None, "a burst");
        let until = pace.read(1 << 20, quiet).expect("more than a burst");
        assert!(until > quiet && until < quiet + Duration::from_secs(1));
    }
}
