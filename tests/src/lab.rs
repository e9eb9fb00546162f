//! One lab: its network, its folders, and how to start things in it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::namespace::visit;
use crate::netns::{Host, Net};
use crate::process::command;
use crate::{Paths, Process, Vmm};

/// A lab. Everything in it ends when it is dropped; logs stay.
#[derive(Debug)]
pub struct Lab {
    /// The network; dropped first, which kills all processes in it.
    pub net: Net,
    /// What runs the guest, and so what the daemons are told.
    pub vmm: Vmm,
    /// Where the checkout keeps things.
    pub paths: Paths,
    /// Sockets and state: a short path, since the names of Unix sockets are limited to 107 bytes.
    pub run: PathBuf,
    /// Logs, kept after the run.
    pub logs: PathBuf,
    /// The backup's images: in memory, as a standby maps them.
    pub images: PathBuf,
    /// Held for as long as the lab lives; the kernel gives it back when this process dies.
    _lock: File,
}

impl Lab {
    /// Builds a lab for guests in QEMU whose namespaces, folders and sockets carry `prefix`.
    ///
    /// # Errors
    /// When rights or programs are missing.
    pub fn new(paths: Paths, prefix: &str) -> Result<Lab> {
        let lock = lock(prefix)?;
        let net = Net::build(prefix)?;
        let run = std::env::temp_dir().join(format!("{prefix}-run"));
        let logs = paths.target.join("logs").join(prefix);
        let images = PathBuf::from(format!("/dev/shm/{prefix}-images"));
        for folder in [&run, &logs, &images] {
            if folder.exists() {
                fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Ok(Lab {
            net,
            vmm: Vmm::default(),
            paths,
            run,
            logs,
            images,
            _lock: lock,
        })
    }

    /// Starts a process on a host.
    ///
    /// # Errors
    /// As [`Process::spawn`].
    pub fn spawn(&self, host: Host, name: &str, argv: &[String]) -> Result<Process> {
        // A second process of a name must not write over the log of the first, which is still being read.
        let mut log = self.logs.join(format!("{name}.log"));
        for number in 2.. {
            if !log.exists() {
                break;
            }
            log = self.logs.join(format!("{name}.{number}.log"));
        }
        Process::spawn(&self.net.namespace(host), name, argv, &log)
    }

    /// Runs a command on a host to its end and returns what it printed.
    ///
    /// # Errors
    /// When it fails; the error has what it said.
    pub fn output(&self, host: Host, argv: &[String]) -> Result<String> {
        self.output_or(host, argv, &[])
    }

    /// The same, for a command that may also end with one of these exit codes.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub fn output_or(&self, host: Host, argv: &[String], codes: &[i32]) -> Result<String> {
        let mut command = command(argv)?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = visit(&self.net.namespace(host), || command.spawn())?;
        let out = child
            .and_then(Child::wait_with_output)
            .with_context(|| format!("cannot run {}", argv[0]))?;
        if !out.status.success() && !out.status.code().is_some_and(|code| codes.contains(&code)) {
            bail!(
                "`{}` failed ({}): {}",
                argv.join(" "),
                out.status,
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Does something in the network of a host, on this thread; what it opens there stays there.
    ///
    /// # Errors
    /// When the network is gone.
    pub fn on<T>(&self, host: Host, work: impl FnOnce() -> T) -> Result<T> {
        visit(&self.net.namespace(host), work)
    }

    /// A path in the folder for sockets and state.
    #[must_use]
    pub fn run_path(&self, name: &str) -> PathBuf {
        self.run.join(name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Left behind they would only be overwritten by the next run.
        let _ = fs::remove_dir_all(&self.run);
        let _ = fs::remove_dir_all(&self.images);
    }
}

/// Two labs of one prefix would remove each other.
fn lock(prefix: &str) -> Result<File> {
    let path = std::env::temp_dir().join(format!("{prefix}-lab.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "another demo or test runs in the lab {prefix:?}: wait for its end, or name another lab with --lab"
            )
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Asks again every few milliseconds until there is an answer.
///
/// # Errors
/// At the deadline, naming what was waited for.
pub fn wait_for<T>(what: &str, at_most: Duration, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if start.elapsed() > at_most {
            bail!("{what}: not within {} s", at_most.as_secs());
        }
        sleep(Duration::from_millis(10));
    }
}

/// A path as an argument.
pub(crate) fn word(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
