//! The rows of a report: a table for each measure, and the plots that its rows can be drawn in.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::escaped;
use super::svg::{self, LINES_MAX, Line, Pair, Ratio, Spread, number_words};
use crate::report::{BoundOn, Report, Row};

/// More rows become another plot.
const ROWS_A_PLOT: usize = 40;
/// Fewer points make no line worth drawing.
const POINTS_MIN: usize = 3;

/// All rows of a report; their plots are added to `plots` with names for their files.
pub(super) fn of(number: usize, report: &Report, plots: &mut Vec<(String, String)>) -> String {
    let mut drawn = Drawn {
        prefix: format!("{number}-{}", file_name(&report.plan)),
        plots,
    };
    let mut text = String::new();
    let ratios: Vec<Ratio> = report.measures.iter().filter_map(ratio).collect();
    for (part, rows) in ratios.chunks(ROWS_A_PLOT).enumerate() {
        let title = format!("{}: ratios and their bounds", report.plan);
        text.push_str(&drawn.figure(&format!("ratios-{}", part + 1), svg::ratios(&title, rows)));
    }
    for (name, rows) in by_measure(&report.measures) {
        let _ = writeln!(text, "<h3>{}</h3>", escaped(name));
        text.push_str(&table(name, &rows));
        for row in &rows {
            text.push_str(&over_time(row, &mut drawn));
        }
        for (unit, rows) in by_unit(&rows) {
            text.push_str(&beside(name, unit, &rows, &mut drawn));
            text.push_str(&sweeps(name, unit, &rows, &mut drawn));
        }
    }
    text
}

/// The plots of a report.
struct Drawn<'a> {
    prefix: String,
    plots: &'a mut Vec<(String, String)>,
}

impl Drawn<'_> {
    fn figure(&mut self, name: &str, plot: String) -> String {
        let count = self.plots.len() + 1;
        let file = format!("{}-{count:03}-{}.svg", self.prefix, file_name(name));
        self.plots.push((file, svg::alone(&plot)));
        format!("<figure>{plot}</figure>\n")
    }
}

/// Only what every file system takes.
fn file_name(text: &str) -> String {
    text.chars()
        .take(40)
        .map(|letter| {
            if letter.is_ascii_alphanumeric() || letter == '-' {
                letter
            } else {
                '_'
            }
        })
        .collect()
}

/// The measure, and the case.
fn parts(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or((name, ""))
}

fn label(row: &Row) -> &str {
    match parts(&row.name) {
        (measure, "") => measure,
        (_, case) => case,
    }
}

/// In the order in which they come first.
fn grouped<'a>(
    rows: impl Iterator<Item = &'a Row>,
    key: impl Fn(&'a Row) -> &'a str,
) -> Vec<(&'a str, Vec<&'a Row>)> {
    let mut groups: Vec<(&str, Vec<&Row>)> = Vec::new();
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows {
        let place = *places.entry(key(row)).or_insert_with(|| {
            groups.push((key(row), Vec::new()));
            groups.len() - 1
        });
        groups[place].1.push(row);
    }
    groups
}

fn by_measure(rows: &[Row]) -> Vec<(&str, Vec<&Row>)> {
    grouped(rows.iter(), |row| parts(&row.name).0)
}

/// Those that were measured, with the same unit.
fn by_unit<'a>(rows: &[&'a Row]) -> Vec<(&'a str, Vec<&'a Row>)> {
    grouped(rows.iter().copied().filter(|row| row.value.is_some()), |row| {
        &row.unit
    })
}

fn ratio(row: &Row) -> Option<Ratio> {
    Some(Ratio {
        label: row.name.clone(),
        ratio: Spread::of(row.ratio?, &row.ratio_repetitions),
        bound: row.bound.filter(|_| row.bound_on == Some(BoundOn::Ratio)),
    })
}

fn value(row: &Row) -> Option<Spread> {
    let repetitions = row
        .value_figure
        .as_ref()
        .map_or(&[][..], |figure| &figure.repetitions);
    Some(Spread::of(row.value?, repetitions))
}

fn reference(row: &Row) -> Option<Spread> {
    let repetitions = row
        .reference_figure
        .as_ref()
        .map_or(&[][..], |figure| &figure.repetitions);
    Some(Spread::of(row.reference?, repetitions))
}

/// Values beside their references.
fn beside(name: &str, unit: &str, rows: &[&Row], drawn: &mut Drawn<'_>) -> String {
    let pairs: Vec<Pair> = rows
        .iter()
        .filter_map(|row| {
            Some(Pair {
                label: label(row).to_owned(),
                value: value(row)?,
                reference: reference(row),
            })
        })
        .collect();
    let mut names: Vec<&str> = rows
        .iter()
        .filter_map(|row| row.reference_name.as_deref())
        .collect();
    names.dedup();
    let reference = match names[..] {
        [one] => one,
        _ => "see the table",
    };
    let mut text = String::new();
    for rows in pairs.chunks(ROWS_A_PLOT) {
        let title = format!("{name}: value beside reference");
        text.push_str(&drawn.figure(
            &format!("{name}-values"),
            svg::pairs(&title, unit, reference, rows),
        ));
    }
    text
}

/// How a row's value went, where the row has that.
fn over_time(row: &Row, drawn: &mut Drawn<'_>) -> String {
    let Some(series) = &row.series else {
        return String::new();
    };
    let lines: Vec<Line> = series
        .lines
        .iter()
        .map(|line| Line {
            label: line.label.clone(),
            points: line
                .points
                .iter()
                .map(|(x, y)| (*x, Spread::of(*y, &[])))
                .collect(),
            references: Vec::new(),
        })
        .collect();
    let mut text = String::new();
    for lines in lines.chunks(LINES_MAX) {
        let title = format!("{} over {}", row.name, series.across);
        text.push_str(&drawn.figure(
            &format!("{}-went", row.name),
            svg::lines(&title, &series.across, &series.unit, lines),
        ));
    }
    text
}

/// A plot over each numeric parameter with enough values, with a line for each combination of what else varies.
fn sweeps(name: &str, unit: &str, rows: &[&Row], drawn: &mut Drawn<'_>) -> String {
    let mut values: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut numeric: BTreeMap<&str, bool> = BTreeMap::new();
    for (key, parameter) in rows.iter().flat_map(|row| row.parameters.iter()) {
        values.entry(key).or_default().push(parameter.to_string());
        *numeric.entry(key).or_insert(true) &= parameter.number().is_some();
    }
    for values in values.values_mut() {
        values.sort_unstable();
        values.dedup();
    }
    let mut text = String::new();
    for (across, _) in numeric.iter().filter(|(_, numeric)| **numeric) {
        if values[across].len() < POINTS_MIN {
            continue;
        }
        let others = |row: &Row| {
            let others = row
                .parameters
                .iter()
                .filter(|(key, _)| key != across && values[key].len() > 1);
            others
                .map(|(key, value)| format!("{key} = {value}"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        // In the order of the plan, which is the one that its author thinks in.
        let mut lines: Vec<Line> = Vec::new();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for row in rows {
            let x = row
                .parameters
                .get(across)
                .and_then(|parameter| parameter.number());
            let Some((x, y)) = x.zip(value(row)) else { continue };
            let key = others(row);
            let place = *places.entry(key).or_insert_with_key(|key| {
                lines.push(Line {
                    label: if key.is_empty() { name } else { key.as_str() }.to_owned(),
                    points: Vec::new(),
                    references: Vec::new(),
                });
                lines.len() - 1
            });
            let line = &mut lines[place];
            line.points.push((x, y));
            line.references
                .extend(row.reference.map(|reference| (x, reference)));
        }
        if lines.iter().all(|line| line.points.len() < POINTS_MIN) {
            continue;
        }
        for line in &mut lines {
            line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
            line.references.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        // As many in each plot.
        let plots = lines.len().div_ceil(LINES_MAX);
        for lines in lines.chunks(lines.len().div_ceil(plots)) {
            let title = format!("{name} over {across}");
            text.push_str(&drawn.figure(
                &format!("{name}-over-{across}"),
                svg::lines(&title, across, unit, lines),
            ));
        }
    }
    text
}

const COLUMNS: [(&str, &str); 9] = [
    ("", "case"),
    ("n", "value"),
    ("n", "p99"),
    ("n", "reference"),
    ("", "which is"),
    ("n", "ratio"),
    ("n", "repetitions"),
    ("n", "bound"),
    ("", "verdict"),
];

fn table(name: &str, rows: &[&Row]) -> String {
    let mut text = String::from("<div class=\"scroll\"><table class=\"wide\"><thead><tr>");
    for (class, column) in COLUMNS {
        let _ = write!(text, "<th class=\"{class}\">{column}</th>");
    }
    text.push_str("</tr></thead><tbody>\n");
    for row in rows {
        let case = match label(row) {
            case if case == name => "",
            case => case,
        };
        line(&mut text, case, row);
    }
    text.push_str("</tbody></table></div>\n");
    text
}

fn line(text: &mut String, case: &str, row: &Row) {
    let number = |number: Option<f64>| number.map_or_else(|| "–".to_owned(), number_words);
    let with_unit = |value: Option<f64>| match value {
        Some(value) => format!("{} {}", number_words(value), escaped(&row.unit)),
        None => "–".to_owned(),
    };
    let least = row.ratio_repetitions.iter().copied().reduce(f64::min);
    let most = row.ratio_repetitions.iter().copied().reduce(f64::max);
    let spread = least.zip(most).map_or_else(
        || "–".to_owned(),
        |(least, most)| format!("{} to {}", number_words(least), number_words(most)),
    );
    let mut bounds: Vec<String> = Vec::new();
    match row.bound_on {
        Some(BoundOn::Ratio) => bounds.extend(row.bound.map(|bound| format!("≤ {} ×", number_words(bound)))),
        Some(BoundOn::Value) => bounds.extend(row.bound.map(|bound| format!("≤ {}", with_unit(Some(bound))))),
        None => {}
    }
    bounds.extend(
        row.value_bound
            .map(|bound| format!("≤ {}", with_unit(Some(bound)))),
    );
    let verdict = match (row.ok, &row.error, bounds.is_empty()) {
        (_, Some(_), _) => "<span class=\"bad\">not measured</span>",
        (false, ..) => "<span class=\"bad\">too much</span>",
        (true, _, false) => "<span class=\"good\">holds</span>",
        (true, _, true) => "told",
    };
    let cells = [
        escaped(case),
        with_unit(row.value),
        number(row.value_figure.as_ref().map(|figure| figure.p99)),
        number(row.reference),
        escaped(row.reference_name.as_deref().unwrap_or("–")),
        row.ratio
            .map_or_else(|| "–".to_owned(), |ratio| format!("{} ×", number_words(ratio))),
        spread,
        if bounds.is_empty() {
            "–".to_owned()
        } else {
            bounds.join(", ")
        },
        verdict.to_owned(),
    ];
    let remark = row.error.as_deref().or(row.note.as_deref());
    text.push_str(if remark.is_some() {
        "<tr class=\"remarked\">"
    } else {
        "<tr>"
    });
    for ((class, _), cell) in COLUMNS.iter().zip(cells) {
        let class = if class.is_empty() { "name" } else { class };
        let _ = write!(text, "<td class=\"{class}\">{cell}</td>");
    }
    text.push_str("</tr>\n");
    if let Some(remark) = remark {
        let class = if row.error.is_some() { "bad" } else { "note" };
        let remark = escaped(remark);
        let _ = writeln!(
            text,
            "<tr class=\"remark\"><td colspan=\"{}\"><span class=\"{class}\">{remark}</span></td></tr>",
            COLUMNS.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::samples;

    /// A row for each epoch and number of vCPUs.
    fn sweep(epochs: &[u64], vcpus: &[u64]) -> Report {
        let mut report = samples::report("sweep", &[("x/1", &[1.0, 1.2])]);
        let row = report.measures.remove(0);
        for epoch in epochs {
            for vcpus in vcpus {
                let mut row = row.clone();
                row.name = format!("x/{epoch}/{vcpus}");
                row.parameters = serde_json::from_value(
                    json!({"epoch_ms": epoch, "vcpus": vcpus, "dirty": "random:1:25", "memory_mib": 64}),
                )
                .unwrap();
                report.measures.push(row);
            }
        }
        report
    }

    #[test]
    fn a_sweep_is_drawn_over_its_parameter_with_a_line_for_each_of_the_others() {
        let mut plots = Vec::new();
        of(1, &sweep(&[5, 25, 100], &[1, 2]), &mut plots);
        let over: Vec<&String> = plots
            .iter()
            .map(|(name, _)| name)
            .filter(|name| name.contains("over"))
            .collect();
        assert_eq!(over.len(), 1, "{over:?}");
        assert!(over[0].contains("epoch_ms"));
        let plot = &plots.last().unwrap().1;
        assert!(
            plot.contains(">vcpus = 1<") && plot.contains(">vcpus = 2<"),
            "{plot}"
        );
        assert!(!plot.contains("memory_mib"), "what does not vary names no line");
    }

    #[test]
    fn more_lines_than_colours_are_drawn_in_several_plots_and_none_is_left_out() {
        let mut plots = Vec::new();
        of(
            1,
            &sweep(&[5, 25, 100], &(1..=20).collect::<Vec<_>>()),
            &mut plots,
        );
        let all: String = plots
            .iter()
            .filter(|(name, _)| name.contains("over-epoch"))
            .map(|(_, plot)| plot.as_str())
            .collect();
        for vcpus in 1..=20 {
            assert!(all.contains(&format!(">vcpus = {vcpus}<")), "{vcpus}");
        }
    }

    #[test]
    fn how_a_value_went_is_drawn_with_all_its_lines_and_what_is_in_them_escaped() {
        let mut report = samples::report("x", &[("auto/up", &[1.0, 1.2])]);
        let line =
            |label: &str| json!({"label": label, "points": [[0.0, 25.0], [1.0, 50.0], [2.0, f64::MAX]]});
        let series = json!({"across": "time_s", "unit": "ms", "lines": [line("light"), line("<b>")]});
        report.measures[0].series = serde_json::from_value(series).unwrap();
        let mut plots = Vec::new();
        let text = of(1, &report, &mut plots);
        let (_, plot) = plots.iter().find(|(name, _)| name.contains("went")).unwrap();
        assert_eq!(plot.matches("<polyline").count(), 2, "{plot}");
        assert!(plot.contains(">time_s<") && plot.contains(">light<"), "{plot}");
        assert!(!text.contains("<b>"));
    }

    #[test]
    fn two_values_of_a_parameter_are_no_sweep() {
        let mut plots = Vec::new();
        of(1, &sweep(&[5, 25], &[1]), &mut plots);
        assert!(plots.iter().all(|(name, _)| !name.contains("over")));
    }
}
