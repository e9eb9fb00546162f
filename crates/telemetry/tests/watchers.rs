//! Dashboard and alerts ask only for metrics and labels that there are.

use std::collections::BTreeSet;

use romulus_telemetry::catalogue::{BACKUP_AGENT, Definition, Kind, REPLICATOR, WITNESS};
use serde_json::Value;

const DASHBOARD: &str = include_str!("../../../packaging/grafana/romulus.json");
const RULES: &str = include_str!("../../../packaging/prometheus/romulus.rules.yml");
/// Labels that Prometheus adds.
const ADDED: [&str; 3] = ["instance", "job", "le"];

/// The definition behind a name as it stands in a query.
fn definition(name: &str) -> Option<&'static Definition> {
    let all = [REPLICATOR, BACKUP_AGENT, WITNESS].into_iter().flatten();
    all.copied().find(|definition| {
        let full = definition.full_name();
        match definition.kind {
            Kind::Histogram => ["_bucket", "_sum", "_count"]
                .iter()
                .any(|suffix| name == format!("{full}{suffix}")),
            Kind::Counter | Kind::Gauge => name == full,
        }
    })
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// The names of labels in a query: in braces before an operator, and in the lists of `by` and `on`.
fn labels(query: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for (position, _) in query.match_indices('=') {
        let before = query[..position].trim_end_matches('!');
        let name = before
            .rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .next();
        found.extend(name.filter(|name| !name.is_empty()));
    }
    for list in ["by (", "on ("] {
        for (position, _) in query.match_indices(list) {
            let inside = &query[position + list.len()..];
            found.extend(words(inside.split(')').next().unwrap_or_default()));
        }
    }
    found
}

fn check(place: &str, query: &str) {
    let mut known: BTreeSet<&str> = ADDED.into();
    let names: Vec<&str> = words(query).filter(|word| word.starts_with("romulus_")).collect();
    assert!(!names.is_empty(), "{place} asks for nothing of ours: {query}");
    for name in names {
        let definition =
            definition(name).unwrap_or_else(|| panic!("{place} asks for {name}, which nobody shows"));
        known.extend(definition.labels);
    }
    for label in labels(query) {
        assert!(
            known.contains(label),
            "{place}: no metric of {query} has the label {label}"
        );
    }
}

/// The queries of the dashboard, each with its panel's title.
fn queries() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
        assert!(panel["type"] == "row" || !targets.is_empty(), "{title} is empty");
        for target in targets {
            queries.push((title.clone(), target["expr"].as_str().unwrap().to_owned()));
        }
    }
    queries
}

#[test]
fn every_query_of_the_dashboard_asks_for_what_the_daemons_show() {
    let queries = queries();
    assert!(queries.len() > 30, "{}", queries.len());
    for (title, query) in queries {
        check(&title, &query);
    }
}

#[test]
fn every_alert_asks_for_what_the_daemons_show() {
    let document = include_str!("../../../docs/src/metrics.md");
    let mut alerts = 0;
    for alert in RULES.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        let (_, expression) = alert.split_once("expr:").unwrap();
        let end = ["        for:", "        labels:"];
        let ends = end.iter().filter_map(|mark| expression.find(mark));
        check(name, &expression[..ends.min().unwrap()]);
        let (_, severity) = alert.split_once("severity: ").unwrap();
        let severity = severity.lines().next().unwrap();
        assert!(
            document.contains(&format!("| `{name}` | {severity} |")),
            "{name} is not explained"
        );
        alerts += 1;
    }
    assert_eq!(alerts, 14);
}

#[test]
fn what_nobody_shows_is_found() {
    for wrong in [
        "romulus_pauses_seconds_count",
        "romulus_protected{phase=\"x\"}",
        "sum by (tap) (romulus_epochs_total)",
        "romulus_epochs",
        "up",
    ] {
        let found = std::panic::catch_unwind(|| check("a test", wrong));
        assert!(found.is_err(), "{wrong} was taken");
    }
}
