//! Prometheus' own tool finds no fault with what a daemon can show, with the dashboard's queries and with the alerts, and the
//! alerts do what they should. `cargo xtask setup` installs it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use romulus_telemetry::catalogue::{BACKUP_AGENT, Definition, Kind, REPLICATOR, WITNESS};
use romulus_telemetry::{Buckets, Form, Metrics, Samples};
use serde_json::{Value, json};

fn packaging(file: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../packaging")).join(file)
}

/// Runs it, and gives what it says about what is wrong.
fn promtool(arguments: &[&str], input: &str) -> Result<(), String> {
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool can be started: `cargo xtask setup` installs Debian's package prometheus");
    let mut stdin = child.stdin.take().unwrap();
    // One that has seen enough does not read on.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let done = child.wait_with_output().unwrap();
    match done.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()),
    }
}

/// A value of each metric that is not of the process, which has its own.
fn sample_all(samples: &mut Samples, catalogue: &'static [&'static Definition]) {
    const OF_PROCESS: [&str; 4] = [
        "build_info",
        "start_time_seconds",
        "resident_memory_bytes",
        "cpu_seconds",
    ];
    for definition in catalogue {
        let labels: Vec<&str> = definition.labels.iter().map(|_| "some \"thing\"").collect();
        match definition.kind {
            _ if OF_PROCESS.contains(&definition.name) => {}
            Kind::Counter | Kind::Gauge => samples.number(definition, &labels, 3),
            Kind::Histogram => {
                let mut buckets = Buckets::durations();
                buckets.record(5_000_000);
                samples.buckets(definition, &labels, &buckets);
            }
        }
    }
}

#[test]
fn no_metric_that_a_daemon_can_show_is_against_prometheus_rules() {
    for (daemon, catalogue) in [
        ("replicator", REPLICATOR),
        ("backup-agent", BACKUP_AGENT),
        ("witness", WITNESS),
    ] {
        let metrics = Metrics::new(catalogue, daemon, "1.2.3", |samples| {
            sample_all(samples, catalogue);
        });
        let text = metrics.text(Form::Plain);
        let shown = text.lines().filter(|line| line.starts_with("# TYPE ")).count();
        assert_eq!(shown, catalogue.len(), "{daemon}");
        promtool(&["check", "metrics"], &text).unwrap_or_else(|said| panic!("{daemon}: {said}\n{text}"));
    }
    // It does look.
    let odd = "# HELP romulus_things Things\n# TYPE romulus_things counter\nromulus_things 1\n";
    let said = promtool(&["check", "metrics"], odd).unwrap_err();
    assert!(said.contains("counter metrics should have"), "{said}");
}

#[test]
fn prometheus_takes_every_query_of_the_dashboard() {
    let dashboard = std::fs::read_to_string(packaging("grafana/romulus.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let rules: Vec<Value> = targets
        .enumerate()
        .map(|(number, target)| {
            let query = target["expr"].as_str().unwrap();
            let query = query.replace("$__rate_interval", "1m").replace("$vm", ".*");
            json!({"record": format!("q:{number}"), "expr": query})
        })
        .collect();
    assert!(rules.len() > 30, "{}", rules.len());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("queries.yml");
    // JSON is YAML.
    let groups = json!({"groups": [{"name": "dashboard", "rules": rules}]});
    std::fs::write(&file, groups.to_string()).unwrap();
    promtool(&["check", "rules", file.to_str().unwrap()], "").unwrap();
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    let file = packaging("prometheus/romulus.test.yml");
    promtool(&["test", "rules", file.to_str().unwrap()], "").unwrap();
    let (rules, tests) = (
        std::fs::read_to_string(packaging("prometheus/romulus.rules.yml")).unwrap(),
        std::fs::read_to_string(&file).unwrap(),
    );
    for alert in rules.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        let tried = tests.split("alertname: ").filter(|test| test.starts_with(name));
        let (silent, firing): (Vec<_>, Vec<_>) = tried.partition(|test| {
            let end = test.find("eval_time").unwrap_or(test.len());
            test[..end].contains("exp_alerts: []")
        });
        assert!(!silent.is_empty(), "no test has {name} stay silent");
        assert!(!firing.is_empty(), "no test has {name} fire");
    }
}
