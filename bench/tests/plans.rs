//! The plans that are shipped and need no lab, once each, in its shortest form: that it measures what it names and reports it. What the figures are is
//! nobody's promise here.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Tried here. `kvm` needs /dev/kvm, and fails without it.
const TRIED: [&str; 3] = ["parts", "kvm", "scale"];
/// These raise the end-to-end tests' lab with the release binaries and as root, or QEMU guests, which no test of one program can.
const NEED_THE_LAB: [&str; 5] = ["backup-host", "epoch", "epoch-linux", "limits", "peers"];
/// What of `limits` needs no lab, and is tried here. As root, like the tests of the gate itself.
const LIMITS_WITHOUT_LAB: [&str; 5] = ["gate", "wire", "codec", "memory", "harvest.large"];
/// For a run that hangs, not for one that is slow.
const LIMIT: Duration = Duration::from_secs(900);

/// Only measures whose name begins so; all when there are none.
fn try_plan(plan: &str, only: &[&str]) {
    let dir = tempfile::tempdir().expect("a folder");
    let said = std::fs::File::create(dir.path().join("said")).expect("a file");
    let mut run = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args([
            "run",
            plan,
            "--shortest",
            "--json",
            "out.json",
            "--html",
            "out.html",
        ])
        .args(only.iter().flat_map(|prefix| ["--only", prefix]))
        .current_dir(dir.path())
        .stdout(said.try_clone().expect("a file"))
        .stderr(said)
        .spawn()
        .expect("bench starts");
    let begun = Instant::now();
    let ended = loop {
        if let Some(ended) = run.try_wait().expect("bench can be waited for") {
            break ended;
        }
        if begun.elapsed() > LIMIT {
            run.kill().expect("it runs");
            run.wait().expect("it ends");
            break run.wait().expect("it has ended");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let said = std::fs::read_to_string(dir.path().join("said")).expect("what it said");
    // Whether a bound holds is not asked.
    assert!(matches!(ended.code(), Some(0 | 3 | 4)), "{plan}: {ended}\n{said}");
    let json = std::fs::read(dir.path().join("out.json")).expect("a report");
    let json: Value = serde_json::from_slice(&json).expect("a report");
    let rows = json["measures"].as_array().expect("rows");
    assert!(!rows.is_empty(), "{said}");
    for row in rows {
        if let Some(error) = row["error"].as_str() {
            // On a machine that does much else, a guest may not have been on a core in so short a time.
            assert!(error.contains("got nothing done"), "{row}");
            continue;
        }
        assert!(row["value"].is_f64(), "{row}");
        assert!(
            row["parameters"].as_object().is_some_and(|all| !all.is_empty()),
            "{row}"
        );
        let name = row["name"].as_str().expect("a name");
        assert!(said.contains(name), "{name} is not in the table: {said}");
    }
    let page = std::fs::read_to_string(dir.path().join("out.html")).expect("a page");
    assert!(page.contains("</html>"));
}

#[test]
fn the_plan_of_the_parts_runs_in_its_shortest_form() {
    try_plan("parts", &[]);
}

#[test]
fn the_plan_of_a_kvm_guest_runs_in_its_shortest_form() {
    try_plan("kvm", &[]);
}

#[test]
fn what_of_the_limits_needs_no_lab_runs_in_its_shortest_form() {
    try_plan("limits", &LIMITS_WITHOUT_LAB);
}

#[test]
fn the_plan_of_simulated_fleets_runs_in_its_shortest_form() {
    try_plan("scale", &[]);
}

#[test]
fn every_plan_that_is_shipped_is_tried_here_or_said_to_need_the_lab() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("plans");
    let shipped: BTreeSet<String> = std::fs::read_dir(folder)
        .expect("the plans")
        .map(|entry| {
            entry
                .expect("a plan")
                .path()
                .file_stem()
                .expect("a name")
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let known: BTreeSet<String> = TRIED
        .iter()
        .chain(&NEED_THE_LAB)
        .map(|plan| (*plan).to_owned())
        .collect();
    assert_eq!(
        shipped, known,
        "say of a new plan whether it is tried here or needs the lab"
    );
}
