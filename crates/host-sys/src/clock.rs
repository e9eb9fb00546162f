//! The kernel's monotonic clock, as a plain number.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds on CLOCK_MONOTONIC.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).expect("the monotonic clock is never negative");
    let rest = u64::try_from(now.tv_nsec).expect("nanoseconds are never negative");
    seconds * 1_000_000_000 + rest
}
