//! Percentiles of durations, for status.

use serde::Serialize;

/// Longest duration that is told apart: an hour. Longer ones count as one.
const NS_MAX: u64 = 3_600 * 1_000_000_000;
/// Significant decimal digits kept.
const DIGITS: u8 = 3;

/// Durations in nanoseconds, at three significant digits, in at most a few hundred KiB.
#[derive(Clone, Debug)]
pub struct Histogram {
    inner: hdrhistogram::Histogram<u64>,
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
    /// An empty histogram.
    pub fn new() -> Self {
        let inner = hdrhistogram::Histogram::new_with_bounds(1, NS_MAX, DIGITS);
        Self {
            inner: inner.expect("the bounds are constant and good"),
        }
    }

    /// Adds a duration.
    pub fn record_ns(&mut self, ns: u64) {
        self.inner.saturating_record(ns.min(NS_MAX));
    }

    /// How many durations were added.
    pub fn count(&self) -> u64 {
        self.inner.len()
    }

    /// The duration that `percentile` percent of all do not exceed, in nanoseconds.
    pub fn percentile_ns(&self, percentile: f64) -> u64 {
        self.inner.value_at_percentile(percentile)
    }

    /// Percentiles in milliseconds.
    pub fn summary_ms(&self) -> Summary {
        #[allow(clippy::cast_precision_loss, reason = "an hour in nanoseconds is below 2^53")]
        let ms = |ns: u64| ns as f64 / 1e6;
        if self.inner.is_empty() {
            return Summary::default();
        }
        Summary {
            p50: ms(self.percentile_ns(50.0)),
            p99: ms(self.percentile_ns(99.0)),
            max: ms(self.inner.max()),
            count: self.count(),
        }
    }

    /// Forgets everything.
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
            histogram.record_ns(us * 1000);
        }
        let summary = histogram.summary_ms();
        assert!(
            (summary.p50 - 0.5).abs() < 0.001 && (summary.p99 - 0.99).abs() < 0.002,
            "{summary:?}"
        );
        assert_eq!(summary.count, 1000);
    }

    #[test]
    fn a_duration_beyond_the_range_counts_as_the_longest() {
        let mut histogram = Histogram::new();
        histogram.record_ns(u64::MAX);
        histogram.record_ns(0);
        assert_eq!(histogram.count(), 2);
        assert!(histogram.summary_ms().max >= 3_600_000.0);
    }
}
