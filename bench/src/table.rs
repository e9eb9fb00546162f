//! The report for people.

use std::fmt::Write;

use crate::report::{BoundOn, Report, Row};
use crate::run::Finding;

/// A line for each row, what was measured on, and the verdict.
pub(crate) fn of(report: &Report) -> String {
    let mut text = String::new();
    let host = &report.host;
    let _ = writeln!(
        text,
        "{} · {} · {} cores · Linux {} · {} MiB · load {:.2} before, {:.2} after{}",
        report.plan,
        host.cpu,
        host.cores,
        host.kernel,
        host.memory_bytes >> 20,
        host.load_before,
        host.load_after,
        if report.quick {
            " · QUICK: no figures to quote"
        } else {
            ""
        },
    );
    let width = report
        .measures
        .iter()
        .map(|row| row.name.len())
        .max()
        .unwrap_or(0)
        .max(8);
    let _ = writeln!(
        text,
        "{:width$} {:>12} {:>12} {:8} {:>7} {:>15} {:>9}  reference",
        "measure", "value", "reference", "unit", "ratio", "repetitions", "bound"
    );
    for row in &report.measures {
        let _ = writeln!(text, "{}", line(row, width));
    }
    let failed = report.measures.iter().filter(|row| !row.ok).count();
    let _ = match failed {
        0 => writeln!(text, "all bounds hold"),
        _ => writeln!(text, "{failed} of {} rows are not ok", report.measures.len()),
    };
    text
}

fn line(row: &Row, width: usize) -> String {
    if let Some(error) = &row.error {
        return format!("{:width$} FAILED: {error}", row.name);
    }
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
    let least = row.ratio_repetitions.iter().copied().reduce(f64::min);
    let most = row.ratio_repetitions.iter().copied().reduce(f64::max);
    let spread = match least.zip(most) {
        Some((least, most)) => format!("{least:.2} to {most:.2}"),
        None => "-".to_owned(),
    };
    let bound = match (row.bound, row.bound_on) {
        (Some(bound), Some(BoundOn::Value)) => format!("{bound} {}", row.unit),
        (Some(bound), _) => format!("{bound} x"),
        (None, _) => "-".to_owned(),
    };
    let verdict = if row.ok { "" } else { "  TOO MUCH" };
    format!(
        "{:width$} {:>12} {:>12} {:8} {:>7} {:>15} {:>9}  {}{verdict}",
        row.name,
        number(row.value),
        number(row.reference),
        row.unit,
        row.ratio
            .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
        spread,
        bound,
        row.reference_name.as_deref().unwrap_or("-"),
    )
}

/// A finished row, while the run goes on.
pub(crate) fn progress(measure: &str, finding: &Finding) -> String {
    let slash = if finding.case.is_empty() { "" } else { "/" };
    let value = short(finding.value.p50);
    let beside = finding
        .reference
        .as_ref()
        .map_or_else(String::new, |(name, figure)| {
            let ratio = finding.value.p50 / figure.p50;
            match ratio.is_finite() {
                true => format!(", {ratio:.2} x {name}"),
                // Of what is nothing there is no multiple.
                false => format!(", {name} {}", short(figure.p50)),
            }
        });
    format!(
        "  {measure}{slash}{}: {value} {}{beside}",
        finding.case, finding.unit
    )
}

/// Four digits or so.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.6}"),
    }
}
