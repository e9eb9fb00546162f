//! Reports from files, which anybody may have written: limits on everything, and a name for what is wrong.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::report::{Report, Row, SCHEMA};
use crate::series::{LINES_MAX, POINTS_MAX};

/// Largest file, in bytes.
pub(crate) const FILE_BYTES_MAX: u64 = 16 << 20;
/// Most rows of a report.
pub(crate) const ROWS_MAX: usize = 10_000;
/// Most repetitions of a row, as a plan allows.
pub(crate) const REPETITIONS_MAX: usize = 100;
/// Most parameters of a row.
pub(crate) const PARAMETERS_MAX: usize = 16;

/// Why a file is not a report that can be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("cannot read {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is longer than {FILE_BYTES_MAX} bytes", path.display())]
    TooLong { path: PathBuf },
    #[error("{} is no report of `bench run --json`", path.display())]
    NoReport {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{} is of schema {found}; this bench reads schema {SCHEMA}", path.display())]
    Schema { path: PathBuf, found: u64 },
    #[error("{} has {found} {what}; at most {most} are read", path.display())]
    TooMany {
        path: PathBuf,
        what: &'static str,
        found: usize,
        most: usize,
    },
}

/// What every report has had, whatever else it has.
#[derive(Deserialize)]
struct Head {
    schema: u64,
    #[serde(rename = "measures")]
    _measures: IgnoredAny,
}

/// Reads the report in a file.
///
/// # Errors
/// [`ReadError`]
pub(crate) fn report(path: &Path) -> Result<Report, ReadError> {
    let bytes = bounded(path)?;
    let no_report = |source| ReadError::NoReport {
        path: path.to_owned(),
        source,
    };
    let head: Head = serde_json::from_slice(&bytes).map_err(no_report)?;
    if head.schema != u64::from(SCHEMA) {
        return Err(ReadError::Schema {
            path: path.to_owned(),
            found: head.schema,
        });
    }
    let report: Report = serde_json::from_slice(&bytes).map_err(no_report)?;
    within(path, "rows", report.measures.len(), ROWS_MAX)?;
    for row in &report.measures {
        within(path, "repetitions in a row", repetitions(row), REPETITIONS_MAX)?;
        within(path, "parameters in a row", row.parameters.len(), PARAMETERS_MAX)?;
        if let Some(series) = &row.series {
            within(path, "lines in a series", series.lines.len(), LINES_MAX)?;
            within(path, "points in a series", series.points(), POINTS_MAX)?;
        }
    }
    Ok(report)
}

/// All of a file, unless it is too long. Also of one that has no length, such as a pipe.
///
/// # Errors
/// [`ReadError::Open`], [`ReadError::TooLong`]
pub(crate) fn bounded(path: &Path) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Err(source) => Err(ReadError::Open {
            path: path.to_owned(),
            source,
        }),
        Ok(length) if length as u64 > FILE_BYTES_MAX => Err(ReadError::TooLong {
            path: path.to_owned(),
        }),
        Ok(_) => Ok(bytes),
    }
}

fn repetitions(row: &Row) -> usize {
    let figures = [&row.value_figure, &row.reference_figure];
    let figures = figures
        .into_iter()
        .flatten()
        .map(|figure| figure.repetitions.len());
    figures.fold(row.ratio_repetitions.len(), usize::max)
}

fn within(path: &Path, what: &'static str, found: usize, most: usize) -> Result<(), ReadError> {
    if found <= most {
        return Ok(());
    }
    Err(ReadError::TooMany {
        path: path.to_owned(),
        what,
        found,
        most,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::report::samples;

    fn written(value: &Value) -> Result<Report, ReadError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), value.to_string()).unwrap();
        report(file.path())
    }

    fn sample() -> Value {
        serde_json::to_value(samples::report("test", &[("x/1", &[1.0, 1.5])])).unwrap()
    }

    #[test]
    fn a_report_comes_back_as_it_was_written() {
        let back = written(&sample()).unwrap();
        assert_eq!(serde_json::to_value(&back).unwrap(), sample());
    }

    #[test]
    fn a_report_of_before_some_fields_and_one_with_more_of_them_can_be_read() {
        let mut value = sample();
        for key in ["about", "taken_unix_s"] {
            value.as_object_mut().unwrap().remove(key).unwrap();
        }
        let row = value["measures"][0].as_object_mut().unwrap();
        row.remove("parameters").unwrap();
        row.insert("colour".to_owned(), "green".into());
        assert_eq!(written(&value).unwrap().taken_unix_s, None);
    }

    #[test]
    fn what_is_no_report_or_another_schemas_is_named() {
        assert!(matches!(written(&json!([1])), Err(ReadError::NoReport { .. })));
        assert!(matches!(written(&json!("x")), Err(ReadError::NoReport { .. })));
        assert!(matches!(
            written(&json!({"schema": 1})),
            Err(ReadError::NoReport { .. })
        ));
        let other = written(&json!({"schema": 2, "measures": "somewhere else"}));
        assert!(
            matches!(other, Err(ReadError::Schema { found: 2, .. })),
            "{other:?}"
        );
        let mut wrong = sample();
        wrong["measures"][0]["value"] = "fast".into();
        assert!(matches!(written(&wrong), Err(ReadError::NoReport { .. })));
        let nowhere = report(Path::new("/nowhere/report.json"));
        assert!(matches!(nowhere, Err(ReadError::Open { .. })));
    }

    #[test]
    fn limits_hold_also_for_a_file_without_an_end() {
        assert!(matches!(
            report(Path::new("/dev/zero")),
            Err(ReadError::TooLong { .. })
        ));
        let mut many = sample();
        let row = many["measures"][0].clone();
        many["measures"] = Value::Array(vec![row.clone(); ROWS_MAX + 1]);
        assert!(matches!(
            written(&many),
            Err(ReadError::TooMany { what: "rows", .. })
        ));
        let mut long = sample();
        long["measures"][0]["ratio_repetitions"] = json!(vec![1.0; REPETITIONS_MAX + 1]);
        assert!(matches!(written(&long), Err(ReadError::TooMany { .. })));
        // Deep nesting is an error of the parser and not of the stack.
        let deep = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(deep.path(), "[".repeat(1 << 20)).unwrap();
        assert!(matches!(report(deep.path()), Err(ReadError::NoReport { .. })));
    }
}
