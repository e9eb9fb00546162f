//! `bench check`: quick runs of plans, compared with their bounds and with a file of what they came to before.
//!
//! How much a ratio moves from run to run by itself is measured: it is the spread of the accepted runs of the same kind. A ratio has
//! moved when it lies outside of where one more such run is to be expected ([`spread`]); with too few runs nothing is said.

mod history;
mod spread;

use std::fmt::Write;

use serde::Serialize;

pub(crate) use history::History;

use crate::report::{BoundOn, Report, Row};
use crate::table::short;

/// With fewer runs in the history nothing is said of a ratio.
const RUNS_MIN: usize = 3;
/// Older runs do not count: the code has moved on.
const RUNS_MAX: usize = 30;
/// Of the JSON; grows when a field changes its meaning or goes.
const SCHEMA: u32 = 1;

/// A run beside its history.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) schema: u32,
    pub(crate) plan: String,
    /// How sure it is that a ratio has moved, for each row by itself.
    pub(crate) confidence: f64,
    /// Accepted runs of the same plan on such a machine.
    pub(crate) runs: usize,
    pub(crate) rows: Vec<Checked>,
}

/// A row beside its history.
#[derive(Debug, Serialize)]
pub(crate) struct Checked {
    pub(crate) name: String,
    pub(crate) ratio: Option<f64>,
    /// Where it was expected; null with too little history.
    pub(crate) low: Option<f64>,
    pub(crate) high: Option<f64>,
    /// Runs that this is told from.
    pub(crate) runs: usize,
    /// The most that it may be, in the plan or in the history's file, whichever is less.
    pub(crate) bound: Option<f64>,
    /// Of the row: what could not be measured, or a bound that does not hold.
    pub(crate) ok: bool,
    pub(crate) verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// It moved up by more than the noise.
    Higher,
    /// It moved down by more than the noise.
    Lower,
    Noise,
    /// There is too little history, or no ratio.
    Unknown,
}

impl Check {
    pub(crate) fn of(report: &Report, history: &History, confidence: f64) -> Self {
        Self {
            schema: SCHEMA,
            plan: report.plan.clone(),
            confidence,
            runs: history.runs_like(report),
            rows: report
                .measures
                .iter()
                .map(|row| Checked::of(row, report, history, confidence))
                .collect(),
        }
    }

    pub(crate) fn any(&self, verdict: Verdict) -> bool {
        self.rows.iter().any(|row| row.verdict == verdict)
    }

    /// Whether a bound does not hold.
    pub(crate) fn over(&self) -> bool {
        self.rows.iter().any(|row| !row.ok)
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let width = self.rows.iter().map(|row| row.name.chars().count()).max();
        let width = width.unwrap_or(0).max(8);
        let mut text = format!("{}: {} runs like this one in the history\n", self.plan, self.runs);
        let _ = writeln!(
            text,
            "{:width$} {:>8} {:>20} {:>5} {:>8}  verdict",
            "measure", "ratio", "expected", "runs", "bound"
        );
        for row in &self.rows {
            let number = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), short);
            let expected = row.low.zip(row.high).map_or_else(
                || "-".to_owned(),
                |(low, high)| format!("{} to {}", short(low), short(high)),
            );
            let _ = writeln!(
                text,
                "{:width$} {:>8} {expected:>20} {:>5} {:>8}  {}",
                row.name,
                number(row.ratio),
                row.runs,
                number(row.bound),
                row.words(),
            );
        }
        let _ = writeln!(
            text,
            "A ratio that did not move is called higher or lower in {:.1} % of all cases, each row by itself.",
            (1.0 - self.confidence) * 100.0
        );
        text
    }
}

impl Checked {
    fn of(row: &Row, report: &Report, history: &History, confidence: f64) -> Self {
        let before = history.ratios(report, &row.name, RUNS_MAX);
        let logarithms: Vec<f64> = before.iter().map(|ratio| ratio.ln()).collect();
        let expected = (before.len() >= RUNS_MIN)
            .then(|| spread::expected(&logarithms, confidence))
            .flatten()
            .map(|(low, high)| (low.exp(), high.exp()));
        let planned = row.bound.filter(|_| row.bound_on == Some(BoundOn::Ratio));
        let kept = history.bound(&report.plan, &row.name);
        let bound = planned.into_iter().chain(kept).reduce(f64::min);
        let holds = bound.is_none_or(|bound| row.ratio.is_some_and(|ratio| ratio <= bound));
        let verdict = match (row.ratio, expected) {
            (Some(ratio), Some((_, high))) if ratio > high => Verdict::Higher,
            (Some(ratio), Some((low, _))) if ratio < low => Verdict::Lower,
            (Some(_), Some(_)) => Verdict::Noise,
            _ => Verdict::Unknown,
        };
        Self {
            name: row.name.clone(),
            ratio: row.ratio,
            low: expected.map(|(low, _)| low),
            high: expected.map(|(_, high)| high),
            runs: before.len(),
            bound,
            ok: row.ok && holds,
            verdict,
        }
    }

    fn words(&self) -> String {
        let moved = match self.verdict {
            Verdict::Higher => "HIGHER than the noise explains",
            Verdict::Lower => "lower than the noise explains",
            Verdict::Noise => "within the noise",
            Verdict::Unknown if self.ratio.is_none() => "no ratio",
            Verdict::Unknown => "too few runs in the history",
        };
        let over = if self.ok { "" } else { ", NOT OK" };
        format!("{moved}{over}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples;

    fn check(before: &[f64], ratio: f64, more: &str) -> Check {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        std::fs::write(&path, more).unwrap();
        for ratio in before {
            History::accept(&path, &samples::report("parts", &[("x", &[*ratio])])).unwrap();
        }
        let history = History::read(&path).unwrap();
        Check::of(&samples::report("parts", &[("x", &[ratio])]), &history, 0.99)
    }

    #[test]
    fn a_ratio_that_moved_by_more_than_the_runs_did_is_told_from_noise() {
        let before = [2.0, 2.04, 1.97, 2.02, 1.99];
        let verdict = |ratio| check(&before, ratio, "").rows[0].verdict;
        assert_eq!(verdict(2.03), Verdict::Noise);
        assert_eq!(verdict(2.5), Verdict::Higher);
        assert_eq!(verdict(1.6), Verdict::Lower);
        let text = check(&before, 2.5, "").table();
        assert!(text.contains("HIGHER") && text.contains("1.0 %"), "{text}");
    }

    #[test]
    fn with_too_little_history_nothing_is_said() {
        let check = check(&[2.0, 2.0], 9.0, "");
        assert_eq!(check.rows[0].verdict, Verdict::Unknown);
        assert!(!check.over() && !check.any(Verdict::Higher));
    }

    #[test]
    fn a_bound_in_the_history_has_to_hold_also_without_runs() {
        let bound = r#"{"kind":"bound","plan":"parts","name":"x","ratio_max":2.0,"why":"it was so"}"#;
        assert!(!check(&[], 1.9, &format!("{bound}\n")).over());
        assert!(check(&[], 2.1, &format!("{bound}\n")).over());
    }

    #[test]
    fn what_could_not_be_measured_is_never_within_the_noise() {
        let mut report = samples::report("parts", &[("x", &[1.0])]);
        (report.measures[0].ratio, report.measures[0].ok) = (None, false);
        let check = Check::of(&report, &History::default(), 0.99);
        assert!(check.over() && check.rows[0].verdict == Verdict::Unknown);
    }
}
