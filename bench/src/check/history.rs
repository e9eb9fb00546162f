//! The file that `bench check` compares with: JSON lines, only ever appended to.
//!
//! ```text
//!   {"kind":"run", "schema":1, "plan":"parts", "quick":true, "host":{…}, "versions":{…}, "ratios":[{"name":…, "ratio":…}, …]}
//!   {"kind":"bound", "plan":"parts", "name":"codec.page/encode/same", "ratio_max":3.0, "why":"…"}
//! ```
//!
//! A run is added by `--accept`. A bound is written by hand; of several for one row the last one holds, and the earlier ones stay
//! as its history.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::host::{Host, Versions};
use crate::read::{self, ReadError};
use crate::report::Report;

/// Of a line; grows when a field changes its meaning or goes.
const SCHEMA: u32 = 1;

/// Why a history cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HistoryError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{}, line {line}: this is no line of a history", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        #[source]
        source: serde_json::Error,
    },
    #[error("{}, line {line}: schema {found}; this bench reads schema {SCHEMA}", path.display())]
    Schema { path: PathBuf, line: usize, found: u32 },
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// What has been accepted so far.
#[derive(Debug, Default)]
pub(crate) struct History {
    runs: Vec<Accepted>,
    bounds: Vec<Bound>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    Run(Accepted),
    Bound(Bound),
}

/// A run of a plan.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Accepted {
    schema: u32,
    plan: String,
    quick: bool,
    taken_unix_s: Option<u64>,
    host: Host,
    versions: Versions,
    ratios: Vec<Ratio>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Ratio {
    name: String,
    ratio: f64,
}

/// The most that a ratio may be.
#[derive(Debug, Serialize, Deserialize)]
struct Bound {
    plan: String,
    name: String,
    ratio_max: f64,
    /// For whoever reads it.
    why: String,
}

impl History {
    /// Of a file; a file that is not there yet has none.
    ///
    /// # Errors
    /// When it cannot be read or a line is wrong: nothing is judged by half of a history.
    pub(crate) fn read(path: &Path) -> Result<Self, HistoryError> {
        let bytes = match read::bounded(path) {
            Ok(bytes) => bytes,
            Err(ReadError::Open { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Vec::new()
            }
            Err(error) => return Err(error.into()),
        };
        let mut history = Self::default();
        for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let (path, number) = (path.to_owned(), number + 1);
            match serde_json::from_slice(line) {
                Err(source) => {
                    return Err(HistoryError::Line {
                        path,
                        line: number,
                        source,
                    });
                }
                Ok(Line::Run(run)) if run.schema != SCHEMA => {
                    return Err(HistoryError::Schema {
                        path,
                        line: number,
                        found: run.schema,
                    });
                }
                Ok(Line::Run(run)) => history.runs.push(run),
                Ok(Line::Bound(bound)) => history.bounds.push(bound),
            }
        }
        Ok(history)
    }

    /// Adds the ratios of a run to the file.
    ///
    /// # Errors
    /// [`HistoryError::Write`]
    pub(crate) fn accept(path: &Path, report: &Report) -> Result<(), HistoryError> {
        let ratios = report.measures.iter().filter_map(|row| {
            Some(Ratio {
                name: row.name.clone(),
                ratio: row.ratio?,
            })
        });
        let run = Line::Run(Accepted {
            schema: SCHEMA,
            plan: report.plan.clone(),
            quick: report.quick,
            taken_unix_s: report.taken_unix_s,
            host: report.host.clone(),
            versions: report.versions.clone(),
            ratios: ratios.collect(),
        });
        let failed = |source| HistoryError::Write {
            path: path.to_owned(),
            source,
        };
        let mut line = serde_json::to_string(&run).map_err(|error| failed(error.into()))?;
        line.push('\n');
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(failed)?;
        // At once, so that two runs at a time do not end up in one line.
        file.write_all(line.as_bytes()).map_err(failed)
    }

    /// The ratios of a row in the last `most` runs that can be compared with this one, the oldest first.
    pub(super) fn ratios(&self, report: &Report, name: &str, most: usize) -> Vec<f64> {
        let alike = self.runs.iter().filter(|run| run.is_like(report));
        let mut ratios: Vec<f64> = alike
            .filter_map(|run| run.ratios.iter().find(|ratio| ratio.name == name))
            .map(|ratio| ratio.ratio)
            .filter(|ratio| *ratio > 0.0)
            .collect();
        ratios.split_off(ratios.len().saturating_sub(most))
    }

    /// How many runs can be compared with this one.
    pub(super) fn runs_like(&self, report: &Report) -> usize {
        self.runs.iter().filter(|run| run.is_like(report)).count()
    }

    /// The bound of a row in this file.
    pub(super) fn bound(&self, plan: &str, name: &str) -> Option<f64> {
        let mut bounds = self.bounds.iter().rev();
        bounds
            .find(|bound| bound.plan == plan && bound.name == name)
            .map(|bound| bound.ratio_max)
    }
}

impl Accepted {
    /// The same plan, as thoroughly, on such a machine, of such a build.
    fn is_like(&self, report: &Report) -> bool {
        (&self.plan, self.quick, &self.versions.build) == (&report.plan, report.quick, &report.versions.build)
            && (&self.host.cpu, self.host.cores) == (&report.host.cpu, report.host.cores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples;

    #[test]
    fn what_is_accepted_is_found_again_only_for_runs_of_the_same_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        assert_eq!(History::read(&path).unwrap().runs.len(), 0);
        for ratio in [1.0, 2.0, 3.0] {
            History::accept(
                &path,
                &samples::report("parts", &[("x", &[ratio]), ("y", &[1.0])]),
            )
            .unwrap();
        }
        let history = History::read(&path).unwrap();
        let report = samples::report("parts", &[("x", &[9.0])]);
        assert_eq!(history.ratios(&report, "x", 2), [2.0, 3.0]);
        assert_eq!(history.ratios(&report, "z", 2), [0.0; 0]);
        assert_eq!(history.runs_like(&report), 3);
        let mut other = report.clone();
        other.host.cpu = "another".to_owned();
        assert_eq!(history.runs_like(&other), 0);
        let mut quick = report.clone();
        quick.quick = true;
        assert_eq!(history.runs_like(&quick), 0);
    }

    #[test]
    fn the_last_bound_of_a_row_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let line = |most: f64| {
            format!(r#"{{"kind":"bound","plan":"parts","name":"x","ratio_max":{most},"why":"it was so"}}"#)
        };
        std::fs::write(&path, format!("{}\n\n{}\n", line(2.0), line(1.5))).unwrap();
        let history = History::read(&path).unwrap();
        assert_eq!(history.bound("parts", "x"), Some(1.5));
        assert_eq!(history.bound("kvm", "x"), None);
    }

    #[test]
    fn a_wrong_line_is_named_and_nothing_is_judged_by_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let bound = r#"{"kind":"bound","plan":"parts","name":"x","ratio_max":2,"why":"so"}"#;
        std::fs::write(&path, format!("{bound}\n{{\"kind\":\"run\"\n")).unwrap();
        let error = History::read(&path).unwrap_err();
        assert!(matches!(error, HistoryError::Line { line: 2, .. }), "{error}");
        assert!(matches!(
            History::read(Path::new("/dev/zero")),
            Err(HistoryError::Read(_))
        ));
    }

    #[test]
    fn the_history_that_is_shipped_can_be_read() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("history/check.jsonl");
        History::read(&path).unwrap();
    }
}
