//! Samples → percentiles, and how far the repetitions are apart.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Three significant digits: within 0.1 % of what was recorded.
const DIGITS: u8 = 3;

/// What a value is given in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Unit {
    /// As the report has it.
    pub(crate) name: &'static str,
    /// So many nanoseconds, or whatever was recorded, are one of it.
    pub(crate) size: f64,
}

impl Unit {
    /// Microseconds, of nanoseconds.
    pub(crate) const US: Self = Self {
        name: "us",
        size: 1e3,
    };

    /// Nanoseconds a page, of the nanoseconds of a batch of `pages`.
    pub(crate) fn ns_a_page(pages: usize) -> Self {
        Self {
            name: "ns/page",
            size: float(pages as u64),
        }
    }
}

/// Times in nanoseconds, by repetition.
#[derive(Clone, Debug)]
pub(crate) struct Timings {
    repetitions: Vec<Histogram<u64>>,
}

impl Timings {
    pub(crate) fn new() -> Self {
        Self {
            repetitions: Vec::new(),
        }
    }

    /// What is recorded from now on is another repetition.
    pub(crate) fn begin_repetition(&mut self) {
        let histogram = Histogram::new(DIGITS).expect("three digits are allowed");
        self.repetitions.push(histogram);
    }

    /// # Panics
    /// Before the first [`Timings::begin_repetition`].
    pub(crate) fn record(&mut self, time_ns: u64) {
        let histogram = self.repetitions.last_mut().expect("a repetition has begun");
        histogram.record(time_ns).expect("the histogram resizes itself");
    }

    /// `None` when a repetition has no sample.
    pub(crate) fn figure(&self, unit: Unit) -> Option<Figure> {
        let mut all = Histogram::<u64>::new(DIGITS).expect("three digits are allowed");
        for repetition in &self.repetitions {
            if repetition.is_empty() {
                return None;
            }
            all.add(repetition).expect("the histogram resizes itself");
        }
        if all.is_empty() {
            return None;
        }
        let at =
            |histogram: &Histogram<u64>, quantile| float(histogram.value_at_quantile(quantile)) / unit.size;
        let repetitions: Vec<f64> = self.repetitions.iter().map(|one| at(one, 0.5)).collect();
        let p50 = at(&all, 0.5);
        Some(Figure {
            p50,
            p95: at(&all, 0.95),
            p99: at(&all, 0.99),
            min: float(all.min()) / unit.size,
            max: float(all.max()) / unit.size,
            samples: all.len(),
            spread: spread(&repetitions, p50),
            repetitions,
        })
    }
}

/// What the samples come to, in the unit of their row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// The median of all samples: the value of a row.
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) samples: u64,
    /// The median of each repetition.
    pub(crate) repetitions: Vec<f64>,
    /// How far these are apart, as part of the median of all.
    pub(crate) spread: f64,
}

impl Figure {
    /// Of one value for each repetition; `None` when there is none or one of them is no number.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        // The nearest rank, as the histogram has it.
        let at = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).saturating_sub(1)];
        let p50 = at(50);
        Some(Self {
            p50,
            p95: at(95),
            p99: at(99),
            min: at(0),
            max: at(100),
            samples: values.len() as u64,
            repetitions: values.to_vec(),
            spread: spread(values, p50),
        })
    }
}

fn spread(medians: &[f64], of: f64) -> f64 {
    let least = medians.iter().copied().fold(f64::INFINITY, f64::min);
    let most = medians.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if of == 0.0 {
        0.0
    } else {
        ((most - least) / of).abs()
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures of at most 15 digits")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings(repetitions: &[&[u64]]) -> Timings {
        let mut timings = Timings::new();
        for samples in repetitions {
            timings.begin_repetition();
            samples.iter().for_each(|sample| timings.record(*sample));
        }
        timings
    }

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() <= right.abs() / 500.0
    }

    #[test]
    fn percentiles_are_those_of_all_samples_within_the_histograms_digits() {
        let samples: Vec<u64> = (1..=1000).map(|n| n * 1000).collect();
        let (low, high) = samples.split_at(500);
        let figure = timings(&[low, high]).figure(Unit::US).unwrap();
        assert_eq!(figure.samples, 1000);
        assert!(near(figure.p50, 500.0), "{figure:?}");
        assert!(near(figure.p99, 990.0), "{figure:?}");
        assert!(near(figure.min, 1.0) && near(figure.max, 1000.0), "{figure:?}");
        assert!(near(figure.repetitions[0], 250.0) && near(figure.repetitions[1], 750.0));
        assert!(near(figure.spread, 1.0), "{figure:?}");
    }

    #[test]
    fn a_repetition_without_a_sample_is_no_figure() {
        assert_eq!(timings(&[]).figure(Unit::US), None);
        assert_eq!(timings(&[&[1], &[]]).figure(Unit::US), None);
    }

    #[test]
    fn a_batch_is_told_for_each_page() {
        let figure = timings(&[&[4096]]).figure(Unit::ns_a_page(16)).unwrap();
        assert!(near(figure.p50, 256.0), "{figure:?}");
    }

    #[test]
    fn values_of_repetitions_have_a_median_and_a_spread() {
        let figure = Figure::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((figure.p50, figure.min, figure.max), (2.0, 1.0, 3.0));
        assert!(near(figure.spread, 1.0));
        assert_eq!(Figure::of(&[]), None);
        assert_eq!(Figure::of(&[1.0, f64::NAN]), None);
    }
}
