//! docs/src/metrics.md lists every metric, as the daemons' catalogues have them; `UPDATE_DOCS=1` writes the lists anew. And the tests
//! that the threat model names are there.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use romulus_protocol::NotProtected;
use romulus_telemetry::catalogue::{BACKUP_AGENT, Definition, REPLICATOR, WITNESS};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/src/metrics.md");

fn table(list: &[&Definition]) -> String {
    let mut table = "| metric | kind | labels | unit | |\n|---|---|---|---|---|\n".to_owned();
    for definition in list {
        let labels: Vec<String> = definition
            .labels
            .iter()
            .map(|label| format!("`{label}`"))
            .collect();
        let (name, kind, help) = (definition.full_name(), definition.kind.name(), definition.help);
        let (labels, unit) = (labels.join(", "), definition.unit());
        writeln!(table, "| `{name}` | {kind} | {labels} | {unit} | {help} |").unwrap();
    }
    table.replace("|  |", "| |")
}

fn with_tables(document: &str) -> String {
    let mut document = document.to_owned();
    for (name, list) in [
        ("replicator", REPLICATOR),
        ("backup-agent", BACKUP_AGENT),
        ("witness", WITNESS),
    ] {
        let (begin, end) = (
            format!("<!-- metrics of {name} -->\n"),
            format!("<!-- end of {name} -->\n"),
        );
        let (head, rest) = document
            .split_once(&begin)
            .expect("the document has a place for the list");
        let (_, tail) = rest.split_once(&end).expect("the list has an end");
        document = format!("{head}{begin}\n{}\n{end}{tail}", table(list));
    }
    document
}

#[test]
fn the_documentation_lists_every_metric_as_it_is() {
    let path = Path::new(DOCUMENT);
    let found = std::fs::read_to_string(path).unwrap();
    let right = with_tables(&found);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, right).unwrap();
        return;
    }
    assert!(
        found == right,
        "docs/src/metrics.md is not what the catalogues say: UPDATE_DOCS=1 cargo test -p romulus-telemetry --test documents"
    );
}

#[test]
fn the_documentation_says_every_reason_why_a_vm_is_not_protected() {
    let document = std::fs::read_to_string(DOCUMENT).unwrap();
    for reason in NotProtected::ALL {
        let line = format!("| `{}` | {} |\n", reason.name(), reason.words());
        assert!(document.contains(&line), "{line}");
    }
}

/// The names of all functions in Rust files below a folder.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let names = text
                .split("fn ")
                .skip(1)
                .filter_map(|rest| rest.split('(').next());
            found.extend(names.map(str::to_owned));
        }
    }
}

#[test]
fn every_test_that_the_threat_model_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let document = std::fs::read_to_string(root.join("docs/src/threat-model.md")).unwrap();
    let mut there = BTreeSet::new();
    for folder in ["tests/tests", "crates/transport/tests"] {
        functions(&root.join(folder), &mut there);
    }
    let names = document.split('`').skip(1).step_by(2);
    // A promise has more words than a setting.
    let promises: Vec<&str> = names.filter(|name| name.matches('_').count() > 5).collect();
    assert!(promises.len() > 10, "{promises:?}");
    for name in promises {
        assert!(
            there.contains(name),
            "the threat model names {name}, which is no test"
        );
    }
}
