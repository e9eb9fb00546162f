//! The simulated fleets for people.

use std::fmt::Write;

use crate::parameters::Parameter;
use crate::report::{Report, Row};
use crate::table::short;

fn what(row: &Row) -> &str {
    match row.parameters.get("what") {
        Some(Parameter::Text(what)) => what,
        _ => "",
    }
}

fn number(row: &Row, name: &str) -> Option<f64> {
    row.parameters.get(name)?.number()
}

/// Costs, a line for each fleet, and where it saturates; `None` when the report has none.
pub(crate) fn table(report: &Report) -> Option<String> {
    let rows: Vec<&Row> = report
        .measures
        .iter()
        .filter(|row| row.name.starts_with("scale/"))
        .collect();
    if rows.is_empty() {
        return None;
    }
    let mut text = String::from("what a checkpoint costs, in us:\n");
    for row in rows.iter().filter(|row| what(row) == "cost") {
        let step = row.name.rsplit('/').next().unwrap_or_default();
        let _ = writeln!(
            text,
            "  {step:8} {:>9}  {}",
            row.value.map_or_else(String::new, short),
            row.note.as_deref().unwrap_or_default()
        );
    }
    let _ = writeln!(
        text,
        "{:>7} {:>7} {:>5} {:>9} {:>10} {:>10}  in the way",
        "backups", "Gbit/s", "VMs", "on time", "lag p50", "lag p99"
    );
    for row in rows.iter().filter(|row| what(row) == "late") {
        let lag = |name: &str| {
            let same = |other: &&&Row| {
                what(other) == name
                    && ["backups", "link_gbit", "vms"]
                        .iter()
                        .all(|key| number(other, key) == number(row, key))
            };
            let value = rows.iter().find(same).and_then(|row| row.value);
            value.map_or_else(|| "-".to_owned(), |ms| format!("{} ms", short(ms)))
        };
        let _ = writeln!(
            text,
            "{:>7} {:>7} {:>5} {:>8.1}% {:>10} {:>10}  {}",
            number(row, "backups").unwrap_or(1.0),
            number(row, "link_gbit").unwrap_or_default(),
            number(row, "vms").unwrap_or_default(),
            100.0 - row.value.unwrap_or(100.0),
            lag("lag p50"),
            lag("lag p99"),
            row.note.as_deref().unwrap_or_default()
        );
    }
    for row in rows.iter().filter(|row| what(row) == "most") {
        let _ = writeln!(
            text,
            "backups {} at {} Gbit/s: at most {} VMs (the links alone: {}): {}",
            number(row, "backups").unwrap_or(1.0),
            number(row, "link_gbit").unwrap_or_default(),
            row.value.unwrap_or_default(),
            row.reference.unwrap_or_default(),
            row.note.as_deref().unwrap_or_default()
        );
    }
    for row in report.measures.iter().filter(|row| row.error.is_some()) {
        let _ = writeln!(
            text,
            "{} FAILED: {}",
            row.name,
            row.error.as_deref().unwrap_or_default()
        );
    }
    Some(text)
}
