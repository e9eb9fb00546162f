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

/// A plan whose measures take as long as they take, run once, in a folder that stays.
fn reported() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("plan.toml"), PLAN).expect("a plan");
    let args = [
        "run",
        "plan.toml",
        "--shortest",
        "--json",
        "a.json",
        "--html",
        "a.html",
        "--svg",
        "plots",
    ];
    let output = bench(&args, dir.path());
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    for line in [
        "[1/2] memory.copy",
        "  memory.copy/4: ",
        "[2/2] wire.frames",
        "  wire.frames/take/64: ",
    ] {
        assert!(
            errors.lines().any(|said| said.starts_with(line)),
            "{line}: {errors}"
        );
    }
    dir
}

fn text(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).expect(name)
}

#[test]
fn a_run_can_be_shown_as_a_page_now_and_later_and_its_rows_have_their_parameters() {
    let dir = reported();
    let json: Value = serde_json::from_str(&text(dir.path(), "a.json")).expect("a report");
    let row = &json["measures"][1];
    assert_eq!(row["parameters"]["payload_bytes"], 64, "{row}");
    assert!(json["taken_unix_s"].is_u64());
    let output = bench(
        &["report", "a.json", "a.json", "--html", "b.html", "--svg", "more"],
        dir.path(),
    );
    assert!(output.status.success(), "{output:?}");
    for (page, plots, times) in [("a.html", "plots", 1), ("b.html", "more", 2)] {
        let page = text(dir.path(), page);
        assert!(page.contains("memory.copy") && page.contains("Cited, not measured"));
        assert_eq!(page.matches("<section id=").count(), times);
        let files = std::fs::read_dir(dir.path().join(plots)).expect("plots").count();
        assert_eq!(page.matches("<svg").count(), files);
    }
}

#[test]
fn what_is_no_report_is_exit_code_2_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("x.json"), "{\"schema\": 7, \"measures\": []}").expect("a file");
    for args in [
        &["report", "x.json", "--html", "x.html"][..],
        &["compare", "x.json", "x.json", "--json", "y.json"],
        &["report", "nowhere.json", "--html", "x.html"],
        &["compare", "x.json", "x.json", "--confidence", "1.5"],
        &["report", "--html", "x.html"],
    ] {
        let output = bench(args, dir.path());
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty());
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("the folder").count(), 1);
}

/// A report in which every ratio of `a.json` is so many times as large, in five repetitions.
fn changed(dir: &Path, times: f64, name: &str) {
    let mut json: Value = serde_json::from_str(&text(dir, "a.json")).expect("a report");
    for row in json["measures"].as_array_mut().expect("rows") {
        let ratios: Vec<f64> = [1.0, 1.01, 0.99, 1.02, 0.98]
            .iter()
            .map(|part| part * times)
            .collect();
        row["ratio"] = times.into();
        row["ratio_repetitions"] = ratios.into();
    }
    std::fs::write(dir.join(name), json.to_string()).expect("a file");
}

#[test]
fn a_slower_report_is_exit_code_3_and_the_same_one_is_noise() {
    let dir = reported();
    changed(dir.path(), 1.0, "b.json");
    changed(dir.path(), 1.2, "c.json");
    let same = bench(&["compare", "b.json", "b.json"], dir.path());
    assert_eq!(same.status.code(), Some(0), "{same:?}");
    assert!(String::from_utf8_lossy(&same.stdout).contains("3 noise"));
    let slower = bench(&["compare", "b.json", "c.json", "--json", "d.json"], dir.path());
    assert_eq!(slower.status.code(), Some(3), "{slower:?}");
    let json: Value = serde_json::from_str(&text(dir.path(), "d.json")).expect("a comparison");
    assert_eq!(
        (&json["schema"], &json["rows"][0]["verdict"]),
        (&1.into(), &"slower".into())
    );
    let faster = bench(&["compare", "c.json", "b.json"], dir.path());
    assert_eq!(faster.status.code(), Some(0), "{faster:?}");
}

#[test]
fn a_check_learns_from_what_is_accepted_and_holds_to_the_bounds_of_the_history() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("plan.toml"), PLAN).expect("a plan");
    let check = |more: &[&str]| {
        let args = ["check", "plan.toml", "--history", "history.jsonl"];
        let output = bench(&[&args, more].concat(), dir.path());
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (code, said) = check(&["--accept", "--json", "check.json"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("small: 0 runs") && said.contains("too few runs"),
        "{said}"
    );
    let json: Value = serde_json::from_str(&text(dir.path(), "check.json")).expect("a check");
    assert_eq!(json[0]["rows"][0]["verdict"], "unknown");
    let history = text(dir.path(), "history.jsonl");
    assert_eq!(history.lines().count(), 1);
    let bound = r#"{"kind":"bound","plan":"small","name":"memory.copy/4","ratio_max":1e-9,"why":"a test"}"#;
    std::fs::write(dir.path().join("history.jsonl"), format!("{history}{bound}\n")).expect("a file");
    let (code, said) = check(&[]);
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("small: 1 runs") && said.contains("NOT OK"),
        "{said}"
    );
    std::fs::write(dir.path().join("history.jsonl"), "{}\n").expect("a file");
    assert_eq!(check(&[]).0, Some(2));
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

#[test]
fn the_codecs_of_others_are_measured_beside_ours_on_the_same_pages() {
    let plan =
        "name = 'codecs'\nrepetitions = 1\n[[measure]]\nmeasure = 'codec.peers'\npages = 16\nrounds = 3\n";
    let (code, json, errors) = run(plan);
    assert_eq!(code, Some(0), "{errors}");
    let rows = json["measures"].as_array().expect("rows");
    assert_eq!(rows.len(), 6 * 3 * 2, "six contents, three peers, time and bytes");
    let value = |name: &str| {
        let row = rows.iter().find(|row| row["name"] == name);
        row.and_then(|row| row["value"].as_f64().zip(row["reference"].as_f64()))
            .expect(name)
    };
    // Sizes, which are the same on every machine.
    let (ours, lz4) = value("codec.peers/bytes/lz4/counter");
    assert!(ours < lz4, "one word of noise changed: {ours} bytes, LZ4 {lz4}");
    let (ours, xbzrle) = value("codec.peers/bytes/xbzrle/counter");
    assert!(ours <= 2.0 * xbzrle, "{ours}, {xbzrle}");
}

#[test]
fn fleets_are_simulated_with_costs_of_reports_and_the_same_ones_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path();
    let costs = "name = 'costs'\nrepetitions = 1\n[[measure]]\nmeasure = 'codec.session'\npages = 64\nrounds = 1\n\
                 contents = ['scattered']\n[[measure]]\nmeasure = 'codec.page'\npages = 64\nrounds = 1\ncontents = ['scattered']\n\
                 [[measure]]\nmeasure = 'digest'\npages = 64\nrounds = 1\n[[measure]]\nmeasure = 'wire.frames'\npages = 64\nrounds = 1\n\
                 [[measure]]\nmeasure = 'memory.copy'\npages = [16, 64]\nmemory_mib = 4\nrounds = 1\n\
                 [[measure]]\nmeasure = 'image.commit'\npages = [16, 64]\nmemory_mib = 4\nrounds = 1\n\
                 [[measure]]\nmeasure = 'transport'\nbulk_mib = 1\nrounds = 1\ntrips = 1\n";
    std::fs::write(path.join("costs.toml"), costs).expect("a plan");
    let plan = "name = 'fleet'\nrepetitions = 1\n[[measure]]\nmeasure = 'scale'\nvms = [1, 3]\nlink_gbit = [10]\nwatched_ms = 200\n";
    std::fs::write(path.join("fleet.toml"), plan).expect("a plan");
    let measured = bench(&["run", "costs.toml", "--json", "costs.json"], path);
    assert!(measured.status.success(), "{measured:?}");
    // A pause needs a guest: copies stand for it here. And figures that do not depend on the machine.
    let text = std::fs::read_to_string(path.join("costs.json")).expect("a report");
    let text = text.replace("memory.copy/", "kvm.pause/");
    let mut report: Value = serde_json::from_str(&text).expect("a report");
    for row in report["measures"].as_array_mut().expect("rows") {
        row["value"] = match row["unit"].as_str() {
            Some("ns/MiB") => 1e6.into(),
            Some("us") => 100.0.into(),
            _ => 500.0.into(),
        };
    }
    std::fs::write(path.join("costs.json"), report.to_string()).expect("a file");
    let scale = |json: &str| {
        let args = [
            "scale",
            "--plan",
            "fleet.toml",
            "--costs",
            "costs.json",
            "--shortest",
            "--json",
            json,
        ];
        let output = bench(&args, path);
        assert!(output.status.success(), "{output:?}");
        let text = std::fs::read(path.join(json)).expect("a report");
        let json: Value = serde_json::from_slice(&text).expect("a report");
        json["measures"].clone()
    };
    let (first, second) = (scale("first.json"), scale("second.json"));
    let names: Vec<&str> = (first.as_array().expect("rows").iter())
        .filter_map(|row| row["name"].as_str())
        .collect();
    assert_eq!(first, second, "nothing is measured that a report has");
    for name in [
        "scale/cost/commit",
        "scale/late/10-gbit/3",
        "scale/lag-p99/10-gbit/1",
        "scale/most/10-gbit",
    ] {
        assert!(names.contains(&name), "{name}: {first}");
    }
    let none = bench(&["scale", "--costs", "nowhere.json"], path);
    assert_eq!(none.status.code(), Some(2), "{none:?}");
}
