//! Child processes in a host's namespace, with their output in a file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use romulus_host_sys::child::die_with_thread;
use rustix::process::{Pid, Signal, kill_process};

use crate::namespace::visit;

/// A child process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `argv` in the namespace, with both outputs in `log`.
    ///
    /// The child dies with the thread that starts it, so that a killed test leaves nothing running.
    ///
    /// # Errors
    /// When the log cannot be made or the program not be started.
    pub fn spawn(namespace: &str, name: &str, argv: &[String], log: &Path) -> Result<Process> {
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let errors = file.try_clone().context("cannot duplicate a file")?;
        let mut command = command(argv)?;
        die_with_thread(&mut command).stdout(file).stderr(errors);
        let child = visit(namespace, || command.spawn())?
            .with_context(|| format!("cannot start {name} ({})", argv[0]))?;
        Ok(Process {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    ///
    /// # Errors
    /// Never in practice: a child has one.
    pub fn pid(&self) -> Result<Pid> {
        let raw = i32::try_from(self.child.id()).context("a process id beyond 2^31")?;
        Pid::from_raw(raw).ok_or_else(|| anyhow!("a child with process id 0"))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process has gone already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        // One that is gone already is what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// When it still runs at the deadline.
    pub fn wait(&mut self, at_most: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if start.elapsed() > at_most {
                return Err(anyhow!("{} still runs after {at_most:?}", self.name));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The end of its output, to be shown when something went wrong.
    #[must_use]
    pub fn tail(&self) -> String {
        tail_of(&self.log, 15)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A command of these words, with nothing to read.
pub(crate) fn command(argv: &[String]) -> Result<Command> {
    let (program, words) = argv
        .split_first()
        .ok_or_else(|| anyhow!("an empty command line"))?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null());
    Ok(command)
}

/// The last lines of a file.
pub(crate) fn tail_of(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
