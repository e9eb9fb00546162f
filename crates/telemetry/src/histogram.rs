//! Durations, for the status and for metrics at once: percentiles, and buckets that only grow.

use serde::Serialize;

use crate::Buckets;

/// Longest duration that is told apart: an hour. Longer ones count as one.
const NS_MAX: u64 = 3_600 * 1_000_000_000;
/// Significant decimal digits kept.
const DIGITS: u8 = 3;

/// Durations in nanoseconds (or other numbers), at three significant digits, in at most a few hundred KiB.
#[derive(Clone, Debug)]
pub struct Histogram {
    inner: hdrhistogram::Histogram<u64>,
    buckets: Buckets,
}

/// Percentiles in milliseconds. All zero when nothing was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Longest.
    pub max: f64,
    /// How many there were.
    pub count: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram of durations.
    pub fn new() -> Self {
        Self::with(Buckets::durations())
    }

    /// An empty histogram of numbers that are no durations.
    pub fn of_numbers() -> Self {
        Self::with(Buckets::numbers())
    }

    fn with(buckets: Buckets) -> Self {
        let inner = hdrhistogram::Histogram::new_with_bounds(1, NS_MAX, DIGITS);
        Self {
            inner: inner.expect("the bounds are constant and good"),
            buckets,
        }
    }

    /// Adds a duration, or a number.
    pub fn record(&mut self, value: u64) {
        self.inner.saturating_record(value.min(NS_MAX));
        self.buckets.record(value);
    }

    /// How many were added since the last reset.
    pub fn count(&self) -> u64 {
        self.inner.len()
    }

    /// The value that `percentile` percent of all since the last reset do not exceed.
    pub fn percentile(&self, percentile: f64) -> u64 {
        self.inner.value_at_percentile(percentile)
    }

    /// The largest since the last reset.
    pub fn max(&self) -> u64 {
        self.inner.max()
    }

    /// Percentiles of durations in milliseconds, with three decimals.
    pub fn summary_ms(&self) -> Summary {
        #[allow(clippy::cast_precision_loss, reason = "an hour in nanoseconds is below 2^53")]
        let ms = |ns: u64| (ns as f64 / 1000.0).round() / 1000.0;
        if self.inner.is_empty() {
            return Summary::default();
        }
        Summary {
            p50: ms(self.percentile(50.0)),
            p99: ms(self.percentile(99.0)),
            max: ms(self.max()),
            count: self.count(),
        }
    }

    /// Everything that was ever added, by powers of two.
    pub fn buckets(&self) -> &Buckets {
        &self.buckets
    }

    /// Forgets the percentiles. The buckets go on: metrics never go back.
    pub fn reset(&mut self) {
        self.inner.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_thousandth() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.summary_ms(), Summary::default());
        for us in 1..=1000u64 {
            histogram.record(us * 1000);
        }
        let summary = histogram.summary_ms();
        assert!(
            (summary.p50 - 0.5).abs() < 0.002 && (summary.p99 - 0.99).abs() < 0.002,
            "{summary:?}"
        );
        assert_eq!(summary.count, 1000);
    }

    #[test]
    fn a_duration_beyond_the_range_counts_as_the_longest() {
        let mut histogram = Histogram::new();
        histogram.record(u64::MAX);
        histogram.record(0);
        assert_eq!(histogram.count(), 2);
        assert!(histogram.summary_ms().max >= 3_600_000.0);
    }

    #[test]
    fn a_reset_forgets_the_percentiles_and_not_the_buckets() {
        let mut histogram = Histogram::new();
        histogram.record(5_000_000);
        histogram.reset();
        assert_eq!((histogram.count(), histogram.max()), (0, 0));
        assert_eq!(
            (histogram.buckets().count(), histogram.buckets().sum()),
            (1, 5_000_000)
        );
    }
}
