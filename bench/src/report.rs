//! The report: one row for each value, with its reference, its bound and whether that holds.

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::host::{self, Host, Versions};
use crate::parameters::Parameters;
use crate::plan::{Bounds, Plan};
use crate::run::{Effort, Finding, Run, Settings, Unable};
use crate::series::Series;
use crate::stats::Figure;

/// Grows when a field changes its meaning or goes.
pub(crate) const SCHEMA: u32 = 1;

/// What `--json` writes. A reader passes over fields that it does not know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) schema: u32,
    pub(crate) plan: String,
    /// The plan's own words; empty in reports of before it was told.
    #[serde(default)]
    pub(crate) about: String,
    /// When the run began, in seconds since 1970; null in reports of before it was told.
    #[serde(default)]
    pub(crate) taken_unix_s: Option<u64>,
    pub(crate) quick: bool,
    pub(crate) seed: u64,
    pub(crate) repetitions: u32,
    pub(crate) host: Host,
    pub(crate) versions: Versions,
    /// Whether all rows are.
    pub(crate) ok: bool,
    pub(crate) measures: Vec<Row>,
}

/// One value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    /// The measure, and a slash and the case where it has several.
    pub(crate) name: String,
    /// What it was measured at, by name.
    #[serde(default)]
    pub(crate) parameters: Parameters,
    /// The median; null when it could not be measured.
    pub(crate) value: Option<f64>,
    pub(crate) unit: String,
    /// The median of what it is compared with, in the same unit.
    pub(crate) reference: Option<f64>,
    /// What that is.
    pub(crate) reference_name: Option<String>,
    /// value / reference.
    pub(crate) ratio: Option<f64>,
    /// The ratio of each repetition.
    pub(crate) ratio_repetitions: Vec<f64>,
    /// The most that the ratio may be; if only the value has a bound, the most that that may be.
    pub(crate) bound: Option<f64>,
    /// What `bound` is for.
    pub(crate) bound_on: Option<BoundOn>,
    /// The most that the value may be, where both have a bound.
    pub(crate) value_bound: Option<f64>,
    /// Whether it was measured and every bound holds.
    pub(crate) ok: bool,
    /// Why it could not be measured.
    pub(crate) error: Option<String>,
    pub(crate) note: Option<String>,
    /// All that is known of the two.
    pub(crate) value_figure: Option<Figure>,
    pub(crate) reference_figure: Option<Figure>,
    /// How it went over time, where that says more than a value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) series: Option<Series>,
}

/// What has a bound: in JSON `"ratio"` or `"value"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BoundOn {
    Ratio,
    Value,
}

impl Report {
    /// Measures everything in the plan.
    pub(crate) fn of(plan: &Plan, settings: Settings) -> Self {
        let mut host = Host::this();
        let taken_unix_s = host::unix_s();
        let bar = ProgressBar::new(plan.measures.len() as u64);
        if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} {bar:24} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        let mut rows: Vec<Row> = Vec::new();
        for (number, planned) in plan.measures.iter().enumerate() {
            let mut run = Run::new(settings, planned.name, bar.clone());
            run.say("");
            run.began(number + 1, plan.measures.len());
            let done = planned.measure.run(&mut run);
            let series = run.take_series();
            let found = run.into_findings();
            let nothing = done.is_ok() && found.is_empty();
            rows.extend(found.into_iter().map(|found| match found {
                Ok((finding, at)) => Row::of(planned.name, planned.bounds, finding, at),
                Err(missed) => Row::unable(&named(planned.name, &missed.case), &missed.why),
            }));
            for (case, series) in series {
                let name = named(planned.name, &case);
                if let Some(row) = rows.iter_mut().rfind(|row| row.name == name) {
                    row.series = Some(series);
                }
            }
            match done {
                Err(error) => {
                    bar.suspend(|| eprintln!("{}: FAILED: {error}", planned.name));
                    rows.push(Row::unable(planned.name, &error));
                }
                Ok(()) if nothing => {
                    let error = Unable::Wrong("it measured nothing".to_owned());
                    rows.push(Row::unable(planned.name, &error));
                }
                Ok(()) => {}
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        host.load_after = host::load();
        Self {
            schema: SCHEMA,
            plan: plan.name.clone(),
            about: plan.about.clone(),
            taken_unix_s: Some(taken_unix_s),
            quick: settings.effort != Effort::Full,
            seed: settings.seed,
            repetitions: settings.repetitions,
            host,
            versions: Versions::this(),
            ok: !rows.is_empty() && rows.iter().all(|row| row.ok),
            measures: rows,
        }
    }

    /// Whether something could not be measured.
    pub(crate) fn has_errors(&self) -> bool {
        self.measures.iter().any(|row| row.error.is_some())
    }
}

impl Row {
    fn of(measure: &str, bounds: Bounds, finding: Finding, parameters: Parameters) -> Self {
        let name = named(measure, &finding.case);
        let value = finding.value.p50;
        let (reference_name, reference_figure) = finding.reference.unzip();
        let ratio_to = |value: f64, reference: f64| Some(value / reference).filter(|ratio| ratio.is_finite());
        let ratio = reference_figure
            .as_ref()
            .and_then(|figure| ratio_to(value, figure.p50));
        let ratio_repetitions = reference_figure.as_ref().map_or_else(Vec::new, |figure| {
            let pairs = finding.value.repetitions.iter().zip(&figure.repetitions);
            pairs
                .filter_map(|(value, reference)| ratio_to(*value, *reference))
                .collect()
        });
        // A bound on a ratio that does not exist does not hold.
        let holds = |most: Option<f64>, actual: Option<f64>| match most {
            Some(most) => actual.is_some_and(|actual| actual <= most),
            None => true,
        };
        Self {
            name,
            parameters,
            value: Some(value),
            unit: finding.unit.to_owned(),
            reference: reference_figure.as_ref().map(|figure| figure.p50),
            reference_name,
            ratio,
            ratio_repetitions,
            bound: bounds.ratio_max.or(bounds.value_max),
            bound_on: match bounds {
                Bounds {
                    ratio_max: Some(_), ..
                } => Some(BoundOn::Ratio),
                Bounds {
                    value_max: Some(_), ..
                } => Some(BoundOn::Value),
                _ => None,
            },
            value_bound: bounds.ratio_max.and(bounds.value_max),
            ok: holds(bounds.ratio_max, ratio) && holds(bounds.value_max, Some(value)),
            error: None,
            note: finding.note,
            value_figure: Some(finding.value),
            reference_figure,
            series: None,
        }
    }

    fn unable(name: &str, error: &Unable) -> Self {
        let mut words = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            words.push_str(&format!(": {error}"));
            cause = error.source();
        }
        Self {
            name: name.to_owned(),
            parameters: Parameters::default(),
            value: None,
            unit: String::new(),
            reference: None,
            reference_name: None,
            ratio: None,
            ratio_repetitions: Vec::new(),
            bound: None,
            bound_on: None,
            value_bound: None,
            ok: false,
            error: Some(words),
            note: None,
            value_figure: None,
            reference_figure: None,
            series: None,
        }
    }
}

/// The name of a row.
fn named(measure: &str, case: &str) -> String {
    match case {
        "" => measure.to_owned(),
        case => format!("{measure}/{case}"),
    }
}

/// Reports that nobody measured, for tests of what is made of reports.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    /// A row for each name, with a value of so many times its reference in each repetition.
    pub(crate) fn report(plan: &str, rows: &[(&str, &[f64])]) -> Report {
        let row = |(name, ratios): &(&str, &[f64])| {
            let finding = Finding {
                case: String::new(),
                unit: "us",
                value: Figure::of(&ratios.iter().map(|ratio| ratio * 8.0).collect::<Vec<_>>()).unwrap(),
                reference: Some(("memcpy".to_owned(), Figure::of(&vec![8.0; ratios.len()]).unwrap())),
                note: None,
            };
            Row::of(name, Bounds::default(), finding, Parameters::default())
        };
        Report {
            schema: SCHEMA,
            plan: plan.to_owned(),
            about: "what it is for".to_owned(),
            taken_unix_s: Some(1_700_000_000),
            quick: false,
            seed: 1,
            repetitions: 5,
            host: Host {
                cpu: "a processor".to_owned(),
                cores: 2,
                kernel: "6.1".to_owned(),
                memory_bytes: 8 << 30,
                kvm: true,
                load_before: 0.1,
                load_after: 0.2,
            },
            versions: Versions {
                romulus: "0.1.0".to_owned(),
                commit: Some("abc".to_owned()),
                build: "release".to_owned(),
            },
            ok: true,
            measures: rows.iter().map(row).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measures::Measure;
    use crate::parameters::Parameter;
    use crate::plan::Planned;

    struct Found(Vec<(f64, Option<f64>)>, bool);

    impl Measure for Found {
        fn run(&self, run: &mut Run) -> Result<(), Unable> {
            for (value, reference) in &self.0 {
                let at = [("pages", Parameter::Number(*value))];
                let finding = Finding {
                    case: format!("{value}"),
                    unit: "us",
                    value: Figure::of(&[*value, *value]).unwrap(),
                    reference: reference
                        .map(|value| ("memcpy".to_owned(), Figure::of(&[value, value]).unwrap())),
                    note: None,
                };
                run.found_at(at, finding);
            }
            if self.1 {
                return Err(Unable::Failed {
                    doing: "opening /dev/kvm",
                    source: Box::new(std::io::Error::other("it is not there")),
                });
            }
            Ok(())
        }
    }

    fn report(bounds: Bounds, measure: impl Measure + 'static) -> Report {
        let plan = Plan {
            name: "test".to_owned(),
            about: String::new(),
            seed: 1,
            repetitions: 1,
            measures: vec![Planned {
                name: "x",
                bounds,
                measure: Box::new(measure),
            }],
        };
        Report::of(&plan, Settings::of(&plan, Effort::Quick))
    }

    #[test]
    fn bounds_on_ratio_and_value_both_have_to_hold() {
        let judge = |ratio_max, value_max| {
            let bounds = Bounds { ratio_max, value_max };
            report(bounds, Found(vec![(3.0, Some(2.0))], false)).ok
        };
        assert!(judge(None, None), "no bound, only told");
        assert!(judge(Some(1.5), None) && judge(None, Some(3.0)) && judge(Some(1.5), Some(3.0)));
        assert!(!judge(Some(1.4), None) && !judge(None, Some(2.9)));
        assert!(!judge(Some(1.4), Some(3.0)) && !judge(Some(1.5), Some(2.9)));
    }

    #[test]
    fn a_bound_on_a_ratio_without_a_reference_does_not_hold() {
        let bounds = Bounds {
            ratio_max: Some(9.0),
            value_max: None,
        };
        assert!(!report(bounds, Found(vec![(3.0, None)], false)).ok);
        assert!(!report(bounds, Found(vec![(3.0, Some(0.0))], false)).ok);
    }

    #[test]
    fn what_cannot_run_is_an_error_and_never_a_pass_and_earlier_rows_stay() {
        let report = report(Bounds::default(), Found(vec![(1.0, Some(1.0))], true));
        assert!(!report.ok && report.measures.len() == 2);
        assert!(report.measures[0].ok);
        let error = report.measures[1].error.clone().unwrap();
        assert_eq!(error, "opening /dev/kvm failed: it is not there");
        assert!(!report.measures[1].ok && report.measures[1].value.is_none());
    }

    #[test]
    fn a_case_that_is_missed_is_an_error_row_of_its_own_among_the_others() {
        struct Half;
        impl Measure for Half {
            fn run(&self, run: &mut Run) -> Result<(), Unable> {
                run.missed("fast", Unable::Wrong("no time left".to_owned()));
                Found(vec![(1.0, None)], false).run(run)
            }
        }
        let report = report(Bounds::default(), Half);
        let names: Vec<&str> = report.measures.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["x/fast", "x/1"]);
        assert!(!report.ok && !report.measures[0].ok && report.measures[1].ok);
    }

    #[test]
    fn a_measure_without_a_row_is_no_pass() {
        let report = report(Bounds::default(), Found(Vec::new(), false));
        assert!(!report.ok && report.measures[0].error.is_some());
    }

    #[test]
    fn the_json_has_the_fields_that_were_promised() {
        let bounds = Bounds {
            ratio_max: Some(2.0),
            value_max: None,
        };
        let report = report(bounds, Found(vec![(3.0, Some(2.0))], false));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], 1);
        for key in ["cpu", "cores", "kernel", "memory_bytes"] {
            assert!(!json["host"][key].is_null(), "{key}");
        }
        let row = &json["measures"][0];
        assert_eq!(row["name"], "x/3");
        assert_eq!(
            (&row["value"], &row["reference"], &row["ratio"]),
            (&3.0.into(), &2.0.into(), &1.5.into())
        );
        assert_eq!((&row["bound"], &row["ok"]), (&2.0.into(), &true.into()));
        assert_eq!(row["ratio_repetitions"], serde_json::json!([1.5, 1.5]));
        assert_eq!(
            (&row["bound_on"], &row["parameters"]["pages"]),
            (&"ratio".into(), &3.0.into())
        );
    }
}
