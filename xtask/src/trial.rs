//! Runs `cargo test`, shows what it prints and learns from it which tests failed, so that a few of them can be tried again, each
//! alone. One that passes then is not forgotten: it is told as flaky.

use std::fmt::{Display, Formatter};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::sh;
use crate::tasks::TestArgs;

/// A line in the harness's list of failures begins with this.
const LISTED: &str = "    ";
/// What cargo says after a test program that failed; the words between the backquotes choose it.
const RERUN: &str = "to rerun pass `";

/// A test that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failed {
    /// What makes cargo run its program: `-p PACKAGE --test FILE`.
    program: Vec<String>,
    /// Its full name.
    name: String,
}

impl Display for Failed {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.program.join(" "))
    }
}

/// How a run of `cargo test` ended.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    /// The tests that failed.
    failed: Vec<Failed>,
    /// Programs that ended without a list of what failed in them: they crashed.
    crashed: Vec<String>,
    /// Tests that passed.
    passed: usize,
    list: Option<Vec<String>>,
    listed: Vec<String>,
}

impl Report {
    /// Takes the next line that cargo or a test program printed.
    fn hear(&mut self, line: &str) {
        if line == "failures:" {
            self.list = Some(Vec::new());
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.listed.extend(self.list.take().unwrap_or_default());
            let words = result.split_once(". ").map_or("", |(_, rest)| rest);
            let passed = words
                .split(' ')
                .next()
                .and_then(|word| word.parse::<usize>().ok());
            self.passed += passed.unwrap_or(0);
        } else if let Some((_, rest)) = line.split_once(RERUN) {
            self.program_failed(rest.trim_end_matches('`'));
        } else if let Some(list) = &mut self.list {
            match line.strip_prefix(LISTED) {
                Some(name) if !name.contains(' ') => list.push(name.to_owned()),
                _ if line.is_empty() => {}
                // What the tests printed has the same head as the list.
                _ => self.list = None,
            }
        }
    }

    fn program_failed(&mut self, words: &str) {
        let program: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let names = std::mem::take(&mut self.listed);
        if names.is_empty() {
            self.crashed.push(words.to_owned());
        }
        for name in names {
            self.failed.push(Failed {
                program: program.clone(),
                name,
            });
        }
    }
}

/// Runs `cargo test`. Gives what failed; an error is a run that failed for another reason.
///
/// # Errors
/// When it did not start, or failed and named no test.
fn run(command: &mut Command) -> Result<Report> {
    let shown = sh::show(command);
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let second = writer.try_clone().context("cannot make a pipe")?;
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    // The pipe ends when nobody but the command can write into it.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut report = Report::default();
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while reader
        .read_until(b'\n', &mut line)
        .context("cannot read what the tests print")?
        > 0
    {
        let _ = std::io::stdout().lock().write_all(&line);
        report.hear(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
        line.clear();
    }
    let status = child.wait().with_context(|| format!("lost `{shown}`"))?;
    if !status.success() && report.failed.is_empty() {
        bail!("`{shown}` failed ({status}), and not by a test that said so");
    }
    Ok(report)
}

/// All runs of one call: what to run, and what came of it.
pub(crate) struct Suite {
    name: Option<String>,
    flaky_max: usize,
    ran: usize,
    flaky: Vec<Failed>,
    failures: Vec<String>,
}

impl Suite {
    /// Nothing ran yet.
    pub(crate) fn new(args: &TestArgs) -> Self {
        Self {
            name: args.name.clone(),
            flaky_max: args.flaky_max,
            ran: 0,
            flaky: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Runs the tests that `tests` makes, or those of them whose names contain the wanted one.
    ///
    /// # Errors
    /// When they could not be run. What failed in them is kept for [`Self::finish`].
    pub(crate) fn run(&mut self, tests: &dyn Fn() -> Result<Command>, flags: &[&str]) -> Result<()> {
        let mut command = tests()?;
        command.arg("--").args(flags);
        if let Some(name) = &self.name {
            let listed = sh::output(tests()?.args(["--", "--list"]).arg(name))?;
            if !listed.lines().any(|line| line.ends_with(": test")) {
                return Ok(());
            }
            command.arg(name);
        }
        let report = run(&mut command)?;
        self.ran += report.passed + report.failed.len();
        let crashed = report.crashed.iter();
        self.failures
            .extend(crashed.map(|program| format!("{program}: crashed")));
        let may_try = self.failures.is_empty() && self.flaky.len() + report.failed.len() <= self.flaky_max;
        for failed in report.failed {
            if may_try && passes_alone(tests()?, &failed)? {
                self.flaky.push(failed);
            } else {
                self.failures.push(failed.to_string());
            }
        }
        Ok(())
    }

    /// Says how it went.
    ///
    /// # Errors
    /// What failed; or that no test has the wanted name, which must not look like a pass.
    pub(crate) fn finish(self) -> Result<ExitCode> {
        for failed in &self.flaky {
            sh::step(&format!("FLAKY, find out why: {failed} failed, and passed alone"));
        }
        if !self.failures.is_empty() {
            bail!(
                "{} of {} tests failed:\n  {}",
                self.failures.len(),
                self.ran,
                self.failures.join("\n  ")
            );
        }
        match self.name {
            Some(name) if self.ran == 0 => bail!("no test's name contains {name:?}: nothing ran"),
            None if self.ran == 0 => bail!("no test ran"),
            Some(name) => sh::step(&format!("tests: all {} of {name:?} passed", self.ran)),
            None => sh::step(&format!("tests: all {} passed", self.ran)),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs one test again, with nothing beside it.
fn passes_alone(mut command: Command, failed: &Failed) -> Result<bool> {
    sh::step(&format!("once more, alone: {failed}"));
    // The command chooses the same packages; these words choose among their programs.
    command.args(&failed.program);
    command.args(["--", "--exact", "--test-threads=1", "--nocapture", &failed.name]);
    let report = run(&mut command)?;
    Ok(report.failed.is_empty() && report.crashed.is_empty() && report.passed >= 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &str) -> Report {
        let mut report = Report::default();
        text.lines().for_each(|line| report.hear(line));
        report
    }

    #[test]
    fn tests_that_failed_are_told_with_their_program() {
        let report = heard(concat!(
            "running 3 tests\ntest a::one ... FAILED\ntest two ... ok\n\nfailures:\n\n---- a::one stdout ----\n",
            "failures:\n    said_by_the_test itself\n\n\nfailures:\n    a::one\n    three\n\n",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.14s\n\n",
            "error: test failed, to rerun pass `-p some-package --test file`\n",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 2.17s\n",
        ));
        let program = vec!["-p", "some-package", "--test", "file"];
        let names: Vec<&str> = report.failed.iter().map(|failed| failed.name.as_str()).collect();
        assert_eq!(names, ["a::one", "three"]);
        assert!(report.failed.iter().all(|failed| failed.program == program));
        assert!(report.crashed.is_empty());
        assert_eq!(report.passed, 4);
    }

    #[test]
    fn a_program_that_crashed_is_not_taken_for_one_whose_tests_failed() {
        let report = heard("running 1 test\nerror: test failed, to rerun pass `-p x --lib`\n\nCaused by:\n");
        assert!(report.failed.is_empty());
        assert_eq!(report.crashed, ["-p x --lib"]);
    }
}
