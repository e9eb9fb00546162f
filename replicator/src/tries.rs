//! How long to wait before the next try to begin a session with the backup.
//!
//! A backup that can't be reached is often one that is started again: it is asked soon, and less often as it stays away. One that
//! refuses, though it was told all about the guest, has a reason that seldom goes away by itself, and for each try the guest stands
//! still to be described.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The first wait for a backup that can't be reached; doubled by each further one, up to [`WAIT_UNREACHED_MAX`].
const WAIT_UNREACHED: Duration = Duration::from_millis(100);
const WAIT_UNREACHED_MAX: Duration = Duration::from_secs(1);
/// The first wait after a refusal; doubled by each further one, so often at most.
const WAIT_REFUSED: Duration = Duration::from_secs(1);
const REFUSED_DOUBLINGS_MAX: u32 = 3;

/// Tries that failed since the last session that was accepted.
#[derive(Debug, Default)]
pub struct Tries {
    unreached: AtomicU32,
    refused: AtomicU32,
}

impl Tries {
    /// The backup could not be reached. Returns how long to wait.
    pub fn unreached(&self) -> Duration {
        let before = self.unreached.fetch_add(1, Ordering::Relaxed);
        WAIT_UNREACHED
            .saturating_mul(2_u32.saturating_pow(before))
            .min(WAIT_UNREACHED_MAX)
    }

    /// The guest was described for a session that was not accepted. Returns how long to wait.
    pub fn refused(&self) -> Duration {
        let before = self.refused.fetch_add(1, Ordering::Relaxed);
        WAIT_REFUSED * 2_u32.pow(before.min(REFUSED_DOUBLINGS_MAX))
    }

    /// A session was accepted.
    pub fn accepted(&self) {
        self.unreached.store(0, Ordering::Relaxed);
        self.refused.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_away_is_asked_soon_and_less_often_as_it_stays_away_until_it_was_there() {
        let tries = Tries::default();
        let waits_ms = |count| -> Vec<u128> { (0..count).map(|_| tries.unreached().as_millis()).collect() };
        assert_eq!(waits_ms(6), [100, 200, 400, 800, 1000, 1000]);
        tries.unreached.store(40, Ordering::Relaxed);
        assert_eq!(waits_ms(1), [1000]);
        tries.accepted();
        assert_eq!(waits_ms(1), [100]);
    }

    #[test]
    fn who_refuses_is_asked_ever_less_often_up_to_a_limit() {
        let tries = Tries::default();
        let waits_s: Vec<u64> = (0..6).map(|_| tries.refused().as_secs()).collect();
        assert_eq!(waits_s, [1, 2, 4, 8, 8, 8]);
        tries.accepted();
        assert_eq!(tries.refused().as_secs(), 1);
    }
}
