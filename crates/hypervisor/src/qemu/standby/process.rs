//! One QEMU process: started in a session of its own, with the end of what it says on stderr.

use std::collections::VecDeque;
use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use romulus_host_sys::PidFd;

use crate::qemu::qmp::{Qmp, QmpError};
use crate::standby::StandbyError;

/// How much of stderr is kept, in bytes.
const STDERR_BYTES_MAX: usize = 8 << 10;
const POLL: Duration = Duration::from_millis(2);

/// How long a killed process that is not our child may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

type Tail = Arc<Mutex<VecDeque<u8>>>;

/// How we hold on to it.
enum Hold {
    /// We started it.
    Child(Child),
    /// An agent before us did.
    Adopted { pid: u32, fd: PidFd },
}

/// A process that is killed when it is dropped, unless it was told to outlive us.
pub(super) struct Process {
    hold: Hold,
    tail: Tail,
    outlives: bool,
}

impl Process {
    pub(super) fn spawn(launcher: &[String], argv: &[String], folder: &Path) -> Result<Self, StandbyError> {
        let words: Vec<&String> = launcher.iter().chain(argv).collect();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .current_dir(folder)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| {
                StandbyError::new(format!("could not run {}: is QEMU installed?", words[0]), error)
            })?;
        let tail = Tail::default();
        if let Some(stderr) = child.stderr.take() {
            let tail = Arc::clone(&tail);
            // Ends with the process. QEMU ignores the broken pipe that it gets when we end before it.
            std::thread::spawn(move || keep_tail(stderr, &tail));
        }
        Ok(Self {
            hold: Hold::Child(child),
            tail,
            outlives: false,
        })
    }

    /// Holds on to a process that an earlier agent started. It outlives us, as it did that one.
    pub(super) fn adopt(pid: u32) -> Result<Self, StandbyError> {
        let fd = PidFd::open(pid)
            .map_err(|error| StandbyError::new(format!("could not hold process {pid}"), error))?;
        Ok(Self {
            hold: Hold::Adopted { pid, fd },
            tail: Tail::default(),
            outlives: true,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        match &self.hold {
            Hold::Child(child) => child.id(),
            Hold::Adopted { pid, .. } => *pid,
        }
    }

    pub(super) fn is_alive(&mut self) -> bool {
        match &mut self.hold {
            Hold::Child(child) => matches!(child.try_wait(), Ok(None)),
            Hold::Adopted { fd, .. } => matches!(fd.wait_ended(Duration::ZERO), Ok(false)),
        }
    }

    /// How it ended, in words; `None` while it runs.
    pub(super) fn end(&mut self) -> Option<String> {
        let status = match &mut self.hold {
            Hold::Child(child) => child.try_wait().ok().flatten()?.to_string(),
            Hold::Adopted { fd, .. } => {
                fd.wait_ended(Duration::ZERO).ok().filter(|ended| *ended)?;
                "an earlier agent started it, so its exit status is not known".to_owned()
            }
        };
        let said = self.stderr();
        Some(if said.is_empty() {
            status
        } else {
            format!("{status}: {said}")
        })
    }

    pub(super) fn outlive(&mut self) {
        self.outlives = true;
    }

    pub(super) fn kill(&mut self) {
        // These fail only when it is dead already.
        match &mut self.hold {
            Hold::Child(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Hold::Adopted { fd, .. } => {
                let _ = fd.kill();
                let _ = fd.wait_ended(KILL_TIMEOUT);
            }
        }
    }

    /// The end of what it said.
    pub(super) fn stderr(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// Waits for its monitor.
    pub(super) fn connect(&mut self, socket: &Path, timeout: Duration) -> Result<Qmp, StandbyError> {
        let deadline = Instant::now() + timeout;
        loop {
            if !self.is_alive() {
                // What it said last may still be on its way through the pipe.
                std::thread::sleep(Duration::from_millis(50));
                return Err(StandbyError::plain(format!(
                    "the standby's QEMU ended at once: {}",
                    self.stderr()
                )));
            }
            let error = match Qmp::connect(socket, deadline) {
                Ok(qmp) => return Ok(qmp),
                Err(error) => error,
            };
            let not_yet = matches!(error, QmpError::Connect { .. } | QmpError::Closed);
            if !not_yet || Instant::now() >= deadline {
                return Err(error_with_stderr(
                    "the standby's monitor cannot be reached",
                    error,
                    self,
                ));
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.outlives {
            self.kill();
        }
    }
}

fn keep_tail(mut stderr: ChildStderr, tail: &Tail) {
    let mut chunk = [0u8; 1024];
    while let Ok(count @ 1..) = stderr.read(&mut chunk) {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&chunk[..count]);
        let excess = tail.len().saturating_sub(STDERR_BYTES_MAX);
        tail.drain(..excess);
    }
}

/// An error with what QEMU said about it.
pub(super) fn error_with_stderr(what: &str, error: QmpError, process: &Process) -> StandbyError {
    let said = process.stderr();
    let what = if said.is_empty() {
        what.to_owned()
    } else {
        format!("{what} (QEMU said: {said})")
    };
    StandbyError::new(what, error)
}
