//! A comparison for people.

use std::fmt::Write;

use super::{Change, Comparison, Verdict};
use crate::table::short;

/// What changed, a line for each row.
pub(crate) fn of(comparison: &Comparison) -> String {
    let mut text = String::new();
    for warning in &comparison.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    let names = comparison.rows.iter().map(|row| row.name.chars().count());
    let width = names.max().unwrap_or(0).max(8);
    let _ = writeln!(
        text,
        "{:width$} {:>10} {:>10} {:>8} {:>18} {:>9}  {:8}",
        "measure", "ratio A", "ratio B", "change", "interval", "value", "verdict"
    );
    for row in &comparison.rows {
        let [a, b] = [|change: Change| change.a, |change: Change| change.b].map(|side| {
            row.ratio
                .map_or_else(|| "-".to_owned(), |change| short(side(change)))
        });
        // Without a reference the value is what is judged.
        let judged = row.ratio.or(row.value);
        let interval = judged.and_then(|change| change.low.zip(change.high));
        let _ = writeln!(
            text,
            "{:width$} {a:>10} {b:>10} {:>8} {:>18} {:>9}  {}{}",
            row.name,
            judged.map_or_else(|| "-".to_owned(), |change| percent(change.change)),
            interval.map_or_else(
                || "-".to_owned(),
                |(low, high)| format!("{} to {}", percent(low), percent(high))
            ),
            row.value
                .map_or_else(|| "-".to_owned(), |change| percent(change.change)),
            row.verdict.name(),
            row.unknown.map_or_else(String::new, |why| format!(": {why}")),
        );
    }
    for (side, names) in [("A", &comparison.only_a), ("B", &comparison.only_b)] {
        for name in names {
            let _ = writeln!(text, "only in {side}: {name}");
        }
    }
    let chance = (1.0 - comparison.confidence) * 100.0;
    let counted = [Verdict::Faster, Verdict::Slower, Verdict::Noise, Verdict::Unknown]
        .map(|verdict| format!("{} {}", comparison.count(verdict), verdict.name()));
    let _ = writeln!(
        text,
        "{}. A row that did not change is called faster or slower in at most {} % of all cases, each row by itself.",
        counted.join(", "),
        short_percent(chance),
    );
    text
}

/// Of a part, with its sign.
fn percent(part: f64) -> String {
    format!("{:+.1} %", part * 100.0)
}

/// Without digits that say nothing.
fn short_percent(percent: f64) -> String {
    let text = format!("{percent:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples;

    #[test]
    fn a_line_for_each_row_with_its_verdict_and_the_level() {
        let a = samples::report("a", &[("x/1", &[1.0, 1.01, 0.99, 1.02]), ("y", &[1.0, 1.0])]);
        let b = samples::report("a", &[("x/1", &[2.0, 2.01, 1.99, 2.02]), ("z", &[1.0, 1.0])]);
        let text = of(&Comparison::of(&a, &b, 0.95));
        let line = |start: &str| {
            text.lines()
                .find(|line| line.starts_with(start))
                .unwrap()
                .to_owned()
        };
        assert!(
            line("x/1").ends_with("slower") && line("x/1").contains('+'),
            "{text}"
        );
        assert!(
            text.contains("only in A: y") && text.contains("only in B: z"),
            "{text}"
        );
        assert!(text.contains("at most 5 %"), "{text}");
    }
}
