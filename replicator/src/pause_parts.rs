//! Where the time of the pauses goes: a distribution for each part, in the order of time.

use romulus_hypervisor::source::CaptureReport;
use romulus_telemetry::Histogram;
use serde_json::{Map, Value, json};

type Part = (&'static str, fn(&CaptureReport) -> u64);

/// The parts by their names in the status. Together they are the pause.
const PARTS: [Part; 5] = [
    ("stop", |report| report.stop_ns),
    ("barrier", |report| report.barrier_ns),
    ("scan", |report| report.scan_ns),
    ("copy", |report| report.copy_ns),
    ("resume", |report| report.resume_ns),
];

/// The parts of all pauses since the last reset.
pub struct PauseParts([Histogram; PARTS.len()]);

impl PauseParts {
    /// No pause yet.
    pub fn new() -> Self {
        Self(PARTS.map(|_| Histogram::new()))
    }

    /// Adds one pause.
    pub fn add(&mut self, report: &CaptureReport) {
        for (histogram, (_, part_ns)) in self.0.iter_mut().zip(PARTS) {
            histogram.record(part_ns(report));
        }
    }

    /// Forgets them all.
    pub fn reset(&mut self) {
        self.0.iter_mut().for_each(Histogram::reset);
    }

    /// By name, in nanoseconds: of all pauses, whatever was reset.
    pub fn sums_ns(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let parts = PARTS.iter().zip(&self.0);
        parts.map(|((name, _), histogram)| (*name, histogram.buckets().sum()))
    }

    /// By name, in milliseconds.
    pub fn json(&self) -> Value {
        let parts = PARTS.iter().zip(&self.0);
        let named = parts.map(|((name, _), histogram)| ((*name).to_owned(), json!(histogram.summary_ms())));
        Value::Object(named.collect::<Map<_, _>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_pause_add_up_to_it() {
        let report = CaptureReport {
            command_ns: 7_000_000,
            stop_ns: 1_000_000,
            barrier_ns: 2_000_000,
            scan_ns: 3_000_000,
            copy_ns: 4_000_000,
            resume_ns: 5_000_000,
            pause_ns: 15_000_000,
            ..CaptureReport::default()
        };
        let mut parts = PauseParts::new();
        parts.add(&report);
        let json = parts.json();
        let sum_ms: f64 = json
            .as_object()
            .unwrap()
            .values()
            .filter_map(|part| part["max"].as_f64())
            .sum();
        // The histogram keeps three digits.
        assert!((sum_ms - 15.0).abs() < 0.1, "{json}");
        parts.reset();
        assert_eq!(parts.json()["copy"]["count"], 0);
        let copied = parts.sums_ns().find(|(name, _)| *name == "copy");
        assert_eq!(copied, Some(("copy", 4_000_000)), "metrics never go back");
    }
}
