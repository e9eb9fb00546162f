//! The kernel's clocks, as plain numbers.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// How often the two clocks are read to find out how far they are apart.
const OFFSET_TRIES: u32 = 4;
/// Two readings this close are good enough, in nanoseconds.
const OFFSET_GOOD_NS: u64 = 2000;

/// Nanoseconds on CLOCK_MONOTONIC.
pub fn monotonic_ns() -> u64 {
    plain_ns(clock_gettime(ClockId::Monotonic))
}

/// Processor time that all threads of this process have used, in nanoseconds.
pub fn process_cpu_ns() -> u64 {
    plain_ns(clock_gettime(ClockId::ProcessCPUTime))
}

/// Processor time that the calling thread has used, in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    plain_ns(clock_gettime(ClockId::ThreadCPUTime))
}

/// By how much the wall clock (CLOCK_REALTIME, since the epoch of Unix) is ahead of [`monotonic_ns`] right now, in
/// nanoseconds. It jumps when somebody sets the clock: for figures, not for decisions.
pub fn wall_clock_offset_ns() -> u64 {
    let mut best = (u64::MAX, 0);
    // We may be interrupted between the two readings: take the pair that was least.
    for _ in 0..OFFSET_TRIES {
        let before = monotonic_ns();
        let wall = plain_ns(clock_gettime(ClockId::Realtime));
        let apart = monotonic_ns() - before;
        best = best.min((apart, wall.saturating_sub(before)));
        if apart < OFFSET_GOOD_NS {
            break;
        }
    }
    best.1
}

fn plain_ns(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).expect("these clocks are never negative");
    let rest = u64::try_from(time.tv_nsec).expect("nanoseconds are never negative");
    seconds * 1_000_000_000 + rest
}
