//! The program as it is called: what it writes, and what its exit code says. Never how long something took.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

const PLAN: &str = "name = 'small'\nrepetitions = 1\n[[measure]]\nmeasure = 'memory.copy'\npages = [4]\nmemory_mib = 4\n\
                    rounds = 3\n[[measure]]\nmeasure = 'wire.frames'\npages = 16\npayload_bytes = [64]\nrounds = 3\n";

fn bench(args: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(args)
        .current_dir(dir)
        .output()
        .expect("bench starts")
}

fn run(plan: &str) -> (Option<i32>, Value, String) {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("plan.toml"), plan).expect("a plan");
    let output = bench(&["run", "plan.toml", "--quick", "--json", "out.json"], dir.path());
    let json = std::fs::read(dir.path().join("out.json"))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or(Value::Null);
    (
        output.status.code(),
        json,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn a_plan_without_bounds_is_measured_and_every_value_has_its_reference() {
    let (code, json, errors) = run(PLAN);
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!((&json["schema"], &json["ok"]), (&1.into(), &true.into()));
    let rows = json["measures"].as_array().expect("rows");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(
        names,
        ["memory.copy/4", "wire.frames/put/64", "wire.frames/take/64"]
    );
    for row in rows {
        let number = |key: &str| row[key].as_f64().expect(key);
        assert!(number("value") > 0.0 && number("reference") > 0.0);
        assert!((number("ratio") - number("value") / number("reference")).abs() < 1e-9);
        assert_eq!(row["ok"], true);
    }
}

#[test]
fn a_bound_that_does_not_hold_is_exit_code_3() {
    let plan = PLAN.replace("pages = 16", "pages = 16\nvalue_max = 1e-9");
    let (code, json, errors) = run(&plan);
    assert_eq!(code, Some(3), "{errors}");
    assert_eq!(json["ok"], false);
    assert_eq!(
        (&json["measures"][0]["ok"], &json["measures"][1]["ok"]),
        (&true.into(), &false.into())
    );
}

#[test]
fn a_wrong_plan_is_exit_code_2_and_nothing_is_measured() {
    let (code, json, errors) = run(&PLAN.replace("wire.frames", "wire.farmes"));
    assert_eq!((code, json), (Some(2), Value::Null));
    assert!(
        errors.contains("\"wire.farmes\"") && errors.contains("wire.frames"),
        "{errors}"
    );
}

#[test]
fn a_report_that_cannot_be_written_is_found_out_before_anything_is_measured() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = bench(&["run", "parts", "--json", "nowhere/out.json"], dir.path());
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nowhere/out.json"));
    assert!(output.stdout.is_empty());
}

#[test]
fn the_list_names_measures_and_plans() {
    let output = bench(&["list"], Path::new("."));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("memory.copy") && text.contains("parts.toml"),
        "{text}"
    );
}

/// Needs /dev/kvm, and fails without it.
#[test]
fn a_run_that_is_killed_takes_its_guests_with_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let plan = "name = 'guest'\n[[measure]]\nmeasure = 'kvm.speed'\ndirty = ['off']\nmemory_mib = 64\nslice_ms = 60000\n";
    std::fs::write(dir.path().join("plan.toml"), plan).expect("a plan");
    let mut run = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["run", "plan.toml"])
        .current_dir(dir.path())
        .spawn()
        .expect("bench starts");
    let children = format!("/proc/{0}/task/{0}/children", run.id());
    let said = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(120);
    let guest = loop {
        assert!(
            Instant::now() < deadline,
            "no guest was started: is there /dev/kvm?"
        );
        let found = std::fs::read_to_string(&children).unwrap_or_default();
        let found = found.split_whitespace().find(|pid| said(pid).contains("testbed"));
        match found {
            Some(pid) => break pid.to_owned(),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    run.kill().expect("it runs");
    run.wait().expect("it ends");
    // Nobody may have waited for it yet; then it has no command line any more.
    while said(&guest).contains("testbed") {
        assert!(Instant::now() < deadline, "the guest outlived the run");
        std::thread::sleep(Duration::from_millis(5));
    }
}
