//! `bench compare A B`: which rows changed from one report to another, by how much, and which only seem to.
//!
//! A row is judged by its ratio, which cancels what both runs had in common with their machines, or by its value where it has
//! no reference. Its repetitions are the samples ([`ranks`]). What the runs themselves differ in is a warning, never a verdict.

pub(crate) mod ranks;
mod table;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::report::{Report, Row};
use ranks::Ranks;

pub(crate) use table::of as table;

/// Grows when a field changes its meaning or goes.
const SCHEMA: u32 = 1;

/// What `--json` writes.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) schema: u32,
    /// How sure each verdict is, by itself: rows that did not change are called noise in so many of all cases.
    pub(crate) confidence: f64,
    pub(crate) a: Side,
    pub(crate) b: Side,
    /// What else the two runs differ in.
    pub(crate) warnings: Vec<String>,
    pub(crate) rows: Vec<Compared>,
    /// Rows of only one of them.
    pub(crate) only_a: Vec<String>,
    pub(crate) only_b: Vec<String>,
}

/// One of the two reports.
#[derive(Debug, Serialize)]
pub(crate) struct Side {
    pub(crate) plan: String,
    pub(crate) commit: Option<String>,
    pub(crate) taken_unix_s: Option<u64>,
}

/// A row that both have.
#[derive(Debug, Serialize)]
pub(crate) struct Compared {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) verdict: Verdict,
    /// Why there is none.
    pub(crate) unknown: Option<&'static str>,
    /// Of value / reference; null where one of them has no reference.
    pub(crate) ratio: Option<Change>,
    pub(crate) value: Option<Change>,
}

/// From A to B, as parts of A: 0.1 is a tenth more.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Change {
    pub(crate) a: f64,
    pub(crate) b: f64,
    /// The median change between any repetition of A and any of B.
    pub(crate) change: f64,
    /// The interval that holds it at the confidence; null with too few repetitions for that.
    pub(crate) low: Option<f64>,
    pub(crate) high: Option<f64>,
}

/// Of a size, slower means larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    Faster,
    Slower,
    Noise,
    Unknown,
}

impl Verdict {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Noise => "noise",
            Self::Unknown => "unknown",
        }
    }
}

impl Comparison {
    /// Compares all rows that have the same name; of several with one name the first with the first, and so on.
    pub(crate) fn of(a: &Report, b: &Report, confidence: f64) -> Self {
        let mut left: BTreeMap<(&str, usize), &Row> = numbered(b).collect();
        let mut ranks = Ranks::new(confidence);
        let (mut rows, mut only_a) = (Vec::new(), Vec::new());
        for (key, row) in numbered(a) {
            match left.remove(&key) {
                Some(other) => rows.push(Compared::of(row, other, &mut ranks)),
                None => only_a.push(row.name.clone()),
            }
        }
        let only_b = numbered(b).filter(|(key, _)| left.contains_key(key));
        Self {
            schema: SCHEMA,
            confidence,
            a: Side::of(a),
            b: Side::of(b),
            warnings: warnings(a, b),
            rows,
            only_a,
            only_b: only_b.map(|(_, row)| row.name.clone()).collect(),
        }
    }

    pub(crate) fn count(&self, verdict: Verdict) -> usize {
        self.rows.iter().filter(|row| row.verdict == verdict).count()
    }
}

/// The rows with their names, and which they are of those with the same name.
fn numbered(report: &Report) -> impl Iterator<Item = ((&str, usize), &Row)> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    report.measures.iter().map(move |row| {
        let number = seen.entry(&row.name).or_default();
        *number += 1;
        ((row.name.as_str(), *number), row)
    })
}

impl Side {
    fn of(report: &Report) -> Self {
        Self {
            plan: report.plan.clone(),
            commit: report.versions.commit.clone(),
            taken_unix_s: report.taken_unix_s,
        }
    }
}

impl Compared {
    fn of(a: &Row, b: &Row, ranks: &mut Ranks) -> Self {
        let mut compared = Self {
            name: a.name.clone(),
            unit: a.unit.clone(),
            verdict: Verdict::Unknown,
            unknown: None,
            ratio: None,
            value: None,
        };
        let [Some(value_a), Some(value_b)] = [a, b].map(|row| row.value.zip(row.value_figure.as_ref()))
        else {
            compared.unknown = Some("it was not measured in both");
            return compared;
        };
        if a.unit != b.unit {
            compared.unknown = Some("the units differ");
            return compared;
        }
        compared.value = Change::between(
            (value_a.0, &value_a.1.repetitions),
            (value_b.0, &value_b.1.repetitions),
            ranks,
        );
        compared.ratio = a.ratio.zip(b.ratio).and_then(|(ratio_a, ratio_b)| {
            Change::between(
                (ratio_a, &a.ratio_repetitions),
                (ratio_b, &b.ratio_repetitions),
                ranks,
            )
        });
        let has_ratio = a.ratio.is_some() || b.ratio.is_some();
        let judged = if has_ratio { compared.ratio } else { compared.value };
        match judged {
            None => compared.unknown = Some("there is no change to tell of what is not above 0"),
            Some(change) => match change.low.zip(change.high) {
                None => compared.unknown = Some("too few repetitions for this confidence"),
                Some((low, _)) if low > 0.0 => compared.verdict = Verdict::Slower,
                Some((_, high)) if high < 0.0 => compared.verdict = Verdict::Faster,
                Some(_) => compared.verdict = Verdict::Noise,
            },
        }
        compared
    }
}

impl Change {
    fn between(a: (f64, &[f64]), b: (f64, &[f64]), ranks: &mut Ranks) -> Option<Self> {
        let logarithms = |values: &[f64]| -> Option<Vec<f64>> {
            let positive = values.iter().all(|value| *value > 0.0);
            positive.then(|| values.iter().map(|value| value.ln()).collect())
        };
        let shift = ranks.shift(&logarithms(a.1)?, &logarithms(b.1)?)?;
        Some(Self {
            a: a.0,
            b: b.0,
            change: shift.middle.exp_m1(),
            low: shift.interval.map(|(low, _)| low.exp_m1()),
            high: shift.interval.map(|(_, high)| high.exp_m1()),
        })
    }
}

/// What the two runs differ in besides the code that was measured.
fn warnings(a: &Report, b: &Report) -> Vec<String> {
    let mut all = Vec::new();
    let mut differ = |what: &str, a: String, b: String| {
        if a != b {
            all.push(format!("{what}: {a} and {b}"));
        }
    };
    differ("another plan", a.plan.clone(), b.plan.clone());
    differ("another processor", a.host.cpu.clone(), b.host.cpu.clone());
    differ(
        "another number of cores",
        a.host.cores.to_string(),
        b.host.cores.to_string(),
    );
    differ(
        "another memory, in bytes",
        a.host.memory_bytes.to_string(),
        b.host.memory_bytes.to_string(),
    );
    differ("another kernel", a.host.kernel.clone(), b.host.kernel.clone());
    differ(
        "another build",
        a.versions.build.clone(),
        b.versions.build.clone(),
    );
    differ("another seed", a.seed.to_string(), b.seed.to_string());
    for (name, report) in [("A", a), ("B", b)] {
        if report.quick {
            all.push(format!("{name} was a quick run: its figures mean little"));
        }
        if report.versions.build != "release" {
            all.push(format!(
                "{name} is of a {} build: its figures mean nothing",
                report.versions.build
            ));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples;

    fn compare(a: &[(&str, &[f64])], b: &[(&str, &[f64])]) -> Comparison {
        Comparison::of(&samples::report("a", a), &samples::report("a", b), 0.95)
    }

    const STEADY: [f64; 5] = [1.0, 1.01, 0.99, 1.02, 0.98];

    #[test]
    fn faster_slower_and_noise_are_told_apart() {
        let by = |factor: f64| STEADY.map(|ratio| ratio * factor);
        let (slower, faster, noise) = (by(1.2), by(0.8), by(1.005));
        let a: [(&str, &[f64]); 3] = [("s", &STEADY), ("f", &STEADY), ("n", &STEADY)];
        let b: [(&str, &[f64]); 3] = [("n", &noise), ("f", &faster), ("s", &slower)];
        let comparison = compare(&a, &b);
        let verdicts: Vec<Verdict> = comparison.rows.iter().map(|row| row.verdict).collect();
        assert_eq!(verdicts, [Verdict::Slower, Verdict::Faster, Verdict::Noise]);
        let change = comparison.rows[0].ratio.unwrap();
        assert!((change.change - 0.2).abs() < 0.01, "{change:?}");
        assert!(
            change.low.unwrap() > 0.1 && change.high.unwrap() < 0.3,
            "{change:?}"
        );
        assert_eq!(
            (comparison.count(Verdict::Slower), comparison.warnings.len()),
            (1, 0)
        );
    }

    #[test]
    fn rows_of_only_one_report_are_named_and_names_may_be_there_twice() {
        let comparison = compare(
            &[("x", &STEADY), ("x", &STEADY), ("gone", &STEADY)],
            &[("x", &STEADY), ("new", &STEADY)],
        );
        assert_eq!(comparison.rows.len(), 1);
        assert_eq!(
            (comparison.only_a, comparison.only_b),
            (vec!["x".to_owned(), "gone".to_owned()], vec!["new".to_owned()])
        );
    }

    #[test]
    fn what_cannot_be_compared_is_unknown_and_never_noise() {
        let few = compare(&[("x", &[1.0, 1.1])], &[("x", &[2.0, 2.1])]);
        assert_eq!(few.rows[0].verdict, Verdict::Unknown);
        assert!(few.rows[0].unknown.unwrap().contains("few"));
        assert!(few.rows[0].ratio.unwrap().low.is_none());
        let zero = compare(&[("x", &[0.0; 5])], &[("x", &STEADY)]);
        assert_eq!(zero.rows[0].verdict, Verdict::Unknown);
        let mut broken = samples::report("a", &[("x", &STEADY)]);
        broken.measures[0].value = None;
        let broken = Comparison::of(&broken, &samples::report("a", &[("x", &STEADY)]), 0.95);
        assert_eq!(broken.rows[0].verdict, Verdict::Unknown);
    }

    #[test]
    fn a_value_without_a_reference_is_judged_by_itself() {
        let bare = |factor: f64| {
            let mut report = samples::report("a", &[("x", &STEADY.map(|value| value * factor))]);
            let row = &mut report.measures[0];
            (row.ratio, row.reference, row.reference_figure) = (None, None, None);
            row.ratio_repetitions.clear();
            report
        };
        let comparison = Comparison::of(&bare(1.0), &bare(2.0), 0.95);
        assert_eq!(comparison.rows[0].verdict, Verdict::Slower);
        assert!(comparison.rows[0].ratio.is_none());
        let mixed = Comparison::of(&samples::report("a", &[("x", &STEADY)]), &bare(2.0), 0.95);
        assert_eq!(
            mixed.rows[0].verdict,
            Verdict::Unknown,
            "a ratio is not compared with a value"
        );
    }

    #[test]
    fn what_else_differs_is_warned_of() {
        let a = samples::report("a", &[("x", &STEADY)]);
        let mut b = a.clone();
        b.quick = true;
        b.host.cpu = "another".to_owned();
        b.versions.build = "debug".to_owned();
        let warnings = Comparison::of(&a, &b, 0.95).warnings.join("\n");
        for word in [
            "another processor",
            "another build",
            "B was a quick run",
            "B is of a debug",
        ] {
            assert!(warnings.contains(word), "{warnings}");
        }
    }
}
