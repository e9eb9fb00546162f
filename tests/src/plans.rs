//! The plans of `bench`, each once in its shortest form: that it measures what it names and reports it. What the figures are is nobody's
//! promise there.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::wait_for;

/// For a run that hangs, not for one that is slow.
const LIMIT: Duration = Duration::from_secs(900);
/// 0: all bounds hold; 3: some don't, 4: there was an error in a row.
const ENDS: [i32; 3] = [0, 3, 4];
/// On a machine that does much else, a guest may not have been on a core in so short a time.
const ALLOWED_ERROR: &str = "got nothing done";

/// Has this `bench` run a plan: only measures whose name begins so, all when there are none.
///
/// # Errors
/// When it does not end well, or its report is not one.
pub fn run_shortest(bench: &Path, plan: &str, only: &[&str]) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a folder")?;
    let (ended, said) = run(bench, plan, only, dir.path())?;
    ensure!(
        ended.code().is_some_and(|code| ENDS.contains(&code)),
        "{plan}: {ended}\n{said}"
    );
    let json = fs::read(dir.path().join("out.json")).context("no report")?;
    let json: Value = serde_json::from_slice(&json).context("the report is not JSON")?;
    let rows = json["measures"].as_array().context("the report has no rows")?;
    ensure!(!rows.is_empty(), "{said}");
    for row in rows {
        check(row, &said)?;
    }
    let page = fs::read_to_string(dir.path().join("out.html")).context("no page")?;
    ensure!(page.contains("</html>"), "the page has no end");
    Ok(())
}

fn run(bench: &Path, plan: &str, only: &[&str], dir: &Path) -> Result<(ExitStatus, String)> {
    let said = fs::File::create(dir.join("said")).context("cannot make a file")?;
    let mut run = Command::new(bench)
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
        .current_dir(dir)
        .stdout(said.try_clone()?)
        .stderr(said)
        .spawn()
        .with_context(|| format!("{} does not start", bench.display()))?;
    let ended = wait_for("the end of the plan", LIMIT, || run.try_wait().ok().flatten());
    if ended.is_err() {
        // It may have ended just now.
        let _ = run.kill();
        run.wait()?;
    }
    let said = fs::read_to_string(dir.join("said")).context("what it said is not text")?;
    Ok((ended.with_context(|| said.clone())?, said))
}

fn check(row: &Value, said: &str) -> Result<()> {
    if let Some(error) = row["error"].as_str() {
        ensure!(error.contains(ALLOWED_ERROR), "{row}");
        return Ok(());
    }
    ensure!(row["value"].is_f64(), "{row}");
    let parameters = row["parameters"].as_object();
    ensure!(parameters.is_some_and(|all| !all.is_empty()), "{row}");
    let name = row["name"].as_str().context("a row without a name")?;
    ensure!(said.contains(name), "{name} is not in the table: {said}");
    Ok(())
}
