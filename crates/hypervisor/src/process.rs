//! The process of a standby: started in a session of its own, with the end of what it says on stderr.

use std::collections::VecDeque;
use std::error::Error;
use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use romulus_host_sys::PidFd;

use crate::launcher::Launcher;
use crate::standby::StandbyError;

/// How much of stderr is kept, in bytes.
const STDERR_BYTES_MAX: usize = 8 << 10;
/// What a process said last may still be on its way through the pipe when it has ended.
const LAST_WORDS: Duration = Duration::from_millis(50);
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
pub(crate) struct Process {
    /// What it is, for messages.
    what: String,
    hold: Hold,
    tail: Tail,
    outlives: bool,
}

impl Process {
    /// Starts `argv` behind a launcher that execs it, with `folder` as its working directory and an environment without
    /// anything of ours. `what` it is stands in messages.
    pub(crate) fn spawn(
        what: &str,
        launcher: &Launcher,
        argv: &[String],
        folder: &Path,
    ) -> Result<Self, StandbyError> {
        let mut words = launcher.words()?;
        words.extend_from_slice(argv);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .current_dir(folder)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| {
                StandbyError::new(format!("could not run {}: is {what} installed?", words[0]), error)
            })?;
        let tail = Tail::default();
        if let Some(stderr) = child.stderr.take() {
            let tail = Arc::clone(&tail);
            // Ends with the process, which must bear the broken pipe that it gets when we end before it.
            std::thread::spawn(move || keep_tail(stderr, &tail));
        }
        Ok(Self {
            what: what.to_owned(),
            hold: Hold::Child(child),
            tail,
            outlives: false,
        })
    }

    /// Holds on to a process that an earlier agent started. It outlives us, as it did that one.
    pub(crate) fn adopt(what: &str, pid: u32) -> Result<Self, StandbyError> {
        let fd = PidFd::open(pid)
            .map_err(|error| StandbyError::new(format!("could not hold process {pid}"), error))?;
        Ok(Self {
            what: what.to_owned(),
            hold: Hold::Adopted { pid, fd },
            tail: Tail::default(),
            outlives: true,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        match &self.hold {
            Hold::Child(child) => child.id(),
            Hold::Adopted { pid, .. } => *pid,
        }
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        match &mut self.hold {
            Hold::Child(child) => matches!(child.try_wait(), Ok(None)),
            Hold::Adopted { fd, .. } => matches!(fd.wait_ended(Duration::ZERO), Ok(false)),
        }
    }

    /// How it ended, in words; `None` while it runs.
    pub(crate) fn end(&mut self) -> Option<String> {
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

    pub(crate) fn outlive(&mut self) {
        self.outlives = true;
    }

    pub(crate) fn kill(&mut self) {
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
    pub(crate) fn stderr(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// The same of a process that has just ended: its last words are waited for.
    pub(crate) fn last_words(&self) -> String {
        std::thread::sleep(LAST_WORDS);
        self.stderr()
    }

    /// An error with what the process said about it.
    pub(crate) fn error(&self, what: &str, error: impl Error + Send + Sync + 'static) -> StandbyError {
        let said = self.stderr();
        let what = if said.is_empty() {
            what.to_owned()
        } else {
            format!("{what} ({} said: {said})", self.what)
        };
        StandbyError::new(what, error)
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
