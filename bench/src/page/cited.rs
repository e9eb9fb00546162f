//! What others have published, from bench/cited.toml: told apart from what was measured, because it was not.

use std::fmt::Write;

use serde::Deserialize;

use super::escaped;

const CITED: &str = include_str!("../../cited.toml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cited {
    figure: Vec<Figure>,
}

/// A published figure.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Figure {
    system: String,
    /// What it is of.
    what: String,
    /// As it was published: often a limit or a range.
    value: String,
    unit: String,
    conditions: String,
    /// Paper, year and section.
    source: String,
}

/// The section of the page.
pub(super) fn section() -> String {
    let cited: Cited = toml::from_str(CITED).expect("the file that is built in was tested");
    let mut text = String::from(
        "<section class=\"cited\"><h2>Cited, not measured</h2>\n<p>What others have published of systems of this kind. None of it was \
         measured here: other machines, other guests, other years. No ratio is made of it.</p>\n<div class=\"scroll\"><table \
         class=\"wide\"><thead><tr><th>system</th><th>figure</th><th class=\"n\">published</th><th>conditions</th>\
         <th>source</th></tr></thead><tbody>\n",
    );
    for figure in &cited.figure {
        let _ = writeln!(
            text,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{} {}</td><td>{}</td><td>{}</td></tr>",
            escaped(&figure.system),
            escaped(&figure.what),
            escaped(&figure.value),
            escaped(&figure.unit),
            escaped(&figure.conditions),
            escaped(&figure.source),
        );
    }
    text.push_str("</tbody></table></div></section>\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cited_figure_has_its_conditions_and_its_source() {
        let cited: Cited = toml::from_str(CITED).unwrap();
        assert!(!cited.figure.is_empty());
        for figure in &cited.figure {
            let fields = [
                &figure.system,
                &figure.what,
                &figure.value,
                &figure.unit,
                &figure.conditions,
            ];
            assert!(
                fields.iter().all(|field| !field.trim().is_empty()),
                "{}",
                figure.what
            );
            assert!(
                figure.source.contains("20") && figure.source.contains(", "),
                "{}",
                figure.source
            );
        }
        let section = section();
        assert!(section.contains("Cited, not measured"));
        assert!(section.matches("<tr>").count() == cited.figure.len() + 1);
    }
}
