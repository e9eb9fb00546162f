//! What a gate counts.

/// Buckets of [`HoldTimes`]: the last one takes everything from about 34 s.
pub const HOLD_BUCKETS: usize = 26;

/// How long released frames were held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HoldTimes {
    /// Sum over all released frames, in nanoseconds.
    pub sum_ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
    /// Bucket `i` counts the frames held for at most 2^i microseconds, and longer than bucket `i - 1` takes.
    pub frames_by_log2_us: [u64; HOLD_BUCKETS],
}

impl HoldTimes {
    /// Counts frames that were held equally long.
    pub(crate) fn record(&mut self, held_ns: u64, frames: u64) {
        self.sum_ns = self.sum_ns.saturating_add(held_ns.saturating_mul(frames));
        self.max_ns = self.max_ns.max(held_ns);
        let microseconds = held_ns.div_ceil(1000).max(1);
        let bucket =
            usize::try_from(microseconds.next_power_of_two().trailing_zeros()).unwrap_or(HOLD_BUCKETS);
        self.frames_by_log2_us[bucket.min(HOLD_BUCKETS - 1)] += frames;
    }
}

/// A gate's counters, since it was prepared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GateStats {
    /// Frames held now.
    pub held_frames: usize,
    /// Bytes held now, with 10 bytes of virtio-net header a frame.
    pub held_bytes: usize,
    /// Most frames held at once.
    pub held_frames_peak: usize,
    /// Most bytes held at once.
    pub held_bytes_peak: usize,
    /// Frames released.
    pub released_frames: u64,
    /// Bytes released.
    pub released_bytes: u64,
    /// Frames dropped because the queue was full.
    pub dropped_by_limit_frames: u64,
    /// Bytes dropped because the queue was full.
    pub dropped_by_limit_bytes: u64,
    /// Frames that the kernel dropped before we read them, because its queue of the relay was full.
    pub dropped_by_kernel_frames: u64,
    /// Frames dropped by `discard` or after it.
    pub discarded_frames: u64,
    /// Released frames that the kernel did not take.
    pub write_failed_frames: u64,
    /// How long released frames were held.
    pub hold: HoldTimes,
}

impl GateStats {
    /// Adds what another gate has counted. What is held, and was at most, stays as it is: that is of one gate.
    pub fn add_counts(&mut self, other: &Self) {
        self.released_frames += other.released_frames;
        self.released_bytes += other.released_bytes;
        self.dropped_by_limit_frames += other.dropped_by_limit_frames;
        self.dropped_by_limit_bytes += other.dropped_by_limit_bytes;
        self.dropped_by_kernel_frames += other.dropped_by_kernel_frames;
        self.discarded_frames += other.discarded_frames;
        self.write_failed_frames += other.write_failed_frames;
        self.hold.sum_ns = self.hold.sum_ns.saturating_add(other.hold.sum_ns);
        self.hold.max_ns = self.hold.max_ns.max(other.hold.max_ns);
        let buckets = self.hold.frames_by_log2_us.iter_mut();
        for (sum, count) in buckets.zip(other.hold.frames_by_log2_us) {
            *sum += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_time_falls_into_the_bucket_of_its_upper_bound() {
        let mut times = HoldTimes::default();
        for ns in [0, 1_000, 1_001, 2_000, 25_000_000, u64::MAX] {
            times.record(ns, 1);
        }
        assert_eq!(times.frames_by_log2_us[0], 2);
        assert_eq!(times.frames_by_log2_us[1], 2);
        assert_eq!(times.frames_by_log2_us[15], 1);
        assert_eq!(times.frames_by_log2_us[HOLD_BUCKETS - 1], 1);
    }

    #[test]
    fn the_counts_of_gates_add_up_and_what_they_hold_does_not() {
        let mut one = GateStats {
            released_frames: 3,
            held_frames: 7,
            ..GateStats::default()
        };
        one.hold.record(25_000_000, 1);
        let mut sum = one.clone();
        sum.add_counts(&one);
        assert_eq!((sum.released_frames, sum.held_frames), (6, 7));
        assert_eq!((sum.hold.sum_ns, sum.hold.max_ns), (50_000_000, 25_000_000));
        assert_eq!(sum.hold.frames_by_log2_us[15], 2);
    }
}
