//! `bench report`: reports as one HTML file that needs nothing else, and its plots as SVG files.
//!
//! ```text
//!   mod.rs      the page: what was measured on what, the verdict, a section for each plan
//!   rows.rs     the rows of a plan: tables, and which plots are drawn of them
//!   axis.rs     numbers ─► places and ticks
//!   svg.rs      the plots: ratios against bounds, values beside references, lines of a sweep
//!   cited.rs    the figures of others, from bench/cited.toml, apart from what was measured
//! ```
//!
//! Invariants: everything from a file is escaped; the page has no script and loads nothing; a plot leaves out no row that the table has.

mod axis;
mod cited;
mod rows;
mod svg;

use std::fmt::Write;

use crate::report::Report;

/// Of the page; the plots have their own.
const STYLE: &str = include_str!("page.css");

/// A page, and its plots with the names that their files get.
pub(crate) struct Page {
    pub(crate) html: String,
    pub(crate) plots: Vec<(String, String)>,
}

impl Page {
    /// Of reports, each in a section of its own.
    pub(crate) fn of(reports: &[Report]) -> Self {
        let mut plots = Vec::new();
        let mut body = String::from("<header><h1>Romulus: what was measured</h1>\n");
        body.push_str(&summary(reports));
        body.push_str("</header>\n");
        for (number, report) in reports.iter().enumerate() {
            body.push_str(&section(number + 1, report, &mut plots));
        }
        body.push_str(&cited::section());
        let html = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <title>Romulus: what was measured</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
        );
        Self { html, plots }
    }
}

/// For text and for values of attributes. What no document may contain becomes a sign that says so.
pub(crate) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' | '\t' => safe.push(' '),
            letter if letter.is_control() => safe.push('\u{fffd}'),
            letter => safe.push(letter),
        }
    }
    safe
}

/// All reports in a table.
fn summary(reports: &[Report]) -> String {
    let mut text = String::from(
        "<table class=\"wide\"><thead><tr><th>plan</th><th>verdict</th><th>taken</th><th>machine</th><th>version</th></tr></thead><tbody>\n",
    );
    for (number, report) in reports.iter().enumerate() {
        let _ = writeln!(
            text,
            "<tr><td><a href=\"#plan-{}\">{}</a></td><td>{}</td><td>{}</td><td>{}, {} cores</td><td>{}</td></tr>",
            number + 1,
            escaped(&report.plan),
            verdict(report),
            report.taken_unix_s.map_or_else(|| "unknown".to_owned(), utc),
            escaped(&report.host.cpu),
            report.host.cores,
            escaped(&version(report)),
        );
    }
    text.push_str("</tbody></table>\n");
    text.push_str(
        "<p class=\"hint\">Each value stands beside a reference that does the same work alone, on the same machine, in the same run. \
         Ratios are value / reference: less is better. Whiskers go from the least to the greatest repetition.</p>\n",
    );
    text
}

fn version(report: &Report) -> String {
    let versions = &report.versions;
    let commit = versions.commit.as_deref().unwrap_or("unknown commit");
    format!("{} ({commit}, {})", versions.romulus, versions.build)
}

fn verdict(report: &Report) -> String {
    let failed = report.measures.iter().filter(|row| !row.ok).count();
    let mut text = match failed {
        0 => "<span class=\"good\">all bounds hold</span>".to_owned(),
        _ => format!(
            "<span class=\"bad\">{failed} of {} rows are not ok</span>",
            report.measures.len()
        ),
    };
    if report.quick {
        text.push_str(" · <span class=\"warn\">quick run: no figures to quote</span>");
    }
    if report.versions.build != "release" {
        let _ = write!(
            text,
            " · <span class=\"warn\">{} build: figures mean nothing</span>",
            escaped(&report.versions.build)
        );
    }
    text
}

fn section(number: usize, report: &Report, plots: &mut Vec<(String, String)>) -> String {
    let host = &report.host;
    let mut text = format!(
        "<section id=\"plan-{number}\"><h2>{}</h2>\n<p>{}</p>\n<p>{}</p>\n<dl>\n",
        escaped(&report.plan),
        escaped(&report.about),
        verdict(report),
    );
    let facts = [
        ("processor", format!("{}, {} cores", host.cpu, host.cores)),
        ("memory", format!("{} MiB", host.memory_bytes >> 20)),
        ("kernel", format!("Linux {}", host.kernel)),
        ("/dev/kvm", if host.kvm { "yes" } else { "no" }.to_owned()),
        (
            "load",
            format!("{:.2} before, {:.2} after", host.load_before, host.load_after),
        ),
        ("Romulus", version(report)),
        ("seed", report.seed.to_string()),
        ("repetitions", report.repetitions.to_string()),
        (
            "taken",
            report.taken_unix_s.map_or_else(|| "unknown".to_owned(), utc),
        ),
    ];
    for (name, value) in facts {
        let _ = writeln!(text, "<div><dt>{name}</dt><dd>{}</dd></div>", escaped(&value));
    }
    text.push_str("</dl>\n");
    text.push_str(&rows::of(number, report, plots));
    text.push_str("</section>\n");
    text
}

/// A time since 1970, as people write it.
fn utc(unix_s: u64) -> String {
    let (day, second) = (unix_s / 86_400, unix_s % 86_400);
    // Days from the first of March of the year 0, of which every 400 years have 146,097 (Howard Hinnant, "chrono-compatible
    // low-level date algorithms", civil_from_days).
    let days = day.saturating_add(719_468);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 {
        (year + era * 400, month + 3)
    } else {
        (year + era * 400 + 1, month - 9)
    };
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02} UTC",
        second / 3600,
        second % 3600 / 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples;

    #[test]
    fn the_page_names_what_was_measured_and_the_verdict_and_needs_nothing_else() {
        let page = Page::of(&[samples::report(
            "mine",
            &[("x/1", &[1.0, 1.2]), ("x/2", &[2.0, 2.2])],
        )]);
        for word in [
            "mine",
            "a processor",
            "0.1.0 (abc, release)",
            "all bounds hold",
            "memcpy",
            "2023-11-14 22:13 UTC",
        ] {
            assert!(page.html.contains(word), "{word}");
        }
        for word in ["<script", "src=", "http://", "https://", "@import", "url("] {
            assert!(!page.html.contains(word), "{word}");
        }
        assert!(page.html.matches("<svg").count() >= 2);
        assert_eq!(page.html.matches("<svg").count(), page.plots.len());
        assert!(page.plots.iter().all(|(_, plot)| plot.contains("<style>")));
    }

    #[test]
    fn everything_from_a_file_is_escaped() {
        let mut report = samples::report("<b>&\"'", &[("<i>/1", &[1.0, 1.2]), ("<i>/2", &[2.0, 2.2])]);
        let bad = "<img src=x onerror='1'>\u{1}".to_owned();
        report.host.cpu.clone_from(&bad);
        report.host.kernel.clone_from(&bad);
        report.about.clone_from(&bad);
        report.versions.commit = Some(bad.clone());
        report.versions.build.clone_from(&bad);
        report.versions.romulus.clone_from(&bad);
        for row in &mut report.measures {
            row.unit.clone_from(&bad);
            row.reference_name = Some(bad.clone());
            row.note = Some(bad.clone());
        }
        report.measures[1].error = Some(bad.clone());
        report.measures[1].parameters =
            serde_json::from_value(serde_json::json!({"<u>": 1, "v": "<u>"})).unwrap();
        let page = Page::of(&[report]);
        let all = page.plots.iter().map(|(_, plot)| plot).chain([&page.html]);
        for text in all {
            for word in ["<b>", "<i>", "<u>", "<img", "\u{1}"] {
                assert!(!text.contains(word), "{word}");
            }
        }
        assert!(page.plots.iter().all(|(name, _)| {
            name.chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter))
        }));
    }

    #[test]
    fn a_report_of_nothing_and_one_of_errors_are_pages_too() {
        let mut report = samples::report("x", &[("y", &[1.0])]);
        let row = &mut report.measures[0];
        (row.value, row.ratio, row.reference, row.ok) = (None, None, None, false);
        (row.value_figure, row.reference_figure) = (None, None);
        row.ratio_repetitions.clear();
        row.error = Some("no /dev/kvm".to_owned());
        let html = Page::of(&[report.clone()]).html;
        assert!(
            html.contains("no /dev/kvm") && html.contains("1 of 1 rows"),
            "{html}"
        );
        report.measures.clear();
        assert!(Page::of(&[report]).html.contains("</html>"));
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(utc(1_735_689_599), "2024-12-31 23:59 UTC");
        assert!(utc(u64::MAX).ends_with("UTC"), "a file may say anything");
    }
}
