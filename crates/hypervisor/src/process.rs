//! The process of a standby: started in a session of its own, with the end of what it says on stderr.
//!
//! That goes to a file in its folder and not through a pipe: it outlives us, and a pipe whose reader has died is an error to whoever
//! writes to it, which many a program does not survive.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Duration;

use romulus_host_sys::PidFd;

use crate::launcher::Launcher;
use crate::standby::StandbyError;

/// How much of what a process said is shown, in bytes.
const SHOWN_BYTES_MAX: u64 = 8 << 10;
/// From this length on the file is begun anew, in bytes: its folder is in memory.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How often its length is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The file, in the process's folder.
const FILE_NAME: &str = "stderr";
/// How long a killed process that is not our child may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// What it says; `None` when an agent before us kept no such file.
    said: Option<Arc<File>>,
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
        let path = folder.join(FILE_NAME);
        let opened = open(&path, true).and_then(|file| Ok((file.try_clone()?, file)));
        let (stderr, said) =
            opened.map_err(|error| StandbyError::new(format!("could not make {}", path.display()), error))?;
        let mut words = launcher.words()?;
        words.extend_from_slice(argv);
        let child = Command::new(&words[0])
            .args(&words[1..])
            .current_dir(folder)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|error| {
                StandbyError::new(format!("could not run {}: is {what} installed?", words[0]), error)
            })?;
        Ok(Self {
            what: what.to_owned(),
            hold: Hold::Child(child),
            said: Some(kept_short(said)),
            outlives: false,
        })
    }

    /// Holds on to a process that an earlier agent started in `folder`. It outlives us, as it did that one.
    pub(crate) fn adopt(what: &str, pid: u32, folder: &Path) -> Result<Self, StandbyError> {
        let fd = PidFd::open(pid)
            .map_err(|error| StandbyError::new(format!("could not hold process {pid}"), error))?;
        Ok(Self {
            what: what.to_owned(),
            hold: Hold::Adopted { pid, fd },
            said: open(&folder.join(FILE_NAME), false).ok().map(kept_short),
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
        self.said.as_deref().map_or_else(String::new, end_of)
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

/// Opens the file; a new one is empty. What is appended after it was cut begins at its new end.
fn open(path: &Path, new: bool) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(new).open(path)
}

/// Cuts the file whenever it has become long, as long as somebody holds it.
fn kept_short(file: File) -> Arc<File> {
    let file = Arc::new(file);
    let watched: Weak<File> = Arc::downgrade(&file);
    std::thread::spawn(move || {
        while let Some(file) = watched.upgrade() {
            cut(&file, FILE_BYTES_MAX);
            drop(file);
            std::thread::sleep(LOOK_EVERY);
        }
    });
    file
}

fn cut(file: &File, bytes_max: u64) {
    if file.metadata().is_ok_and(|metadata| metadata.len() > bytes_max) {
        // What fails here fails again at the next look.
        let _ = file.set_len(0);
    }
}

fn end_of(file: &File) -> String {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let from = length.saturating_sub(SHOWN_BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(length - from).expect("as few as are shown")];
    // It may have been cut meanwhile.
    let read = file.read_at(&mut bytes, from).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..read]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(folder: &Path, script: &str) -> Process {
        let argv = ["/bin/sh", "-c", script].map(str::to_owned);
        Process::spawn("a shell", &Launcher::Session, &argv, folder).unwrap()
    }

    fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = std::time::Instant::now() + LONG;
        while !is_so() {
            assert!(std::time::Instant::now() < deadline, "waited for {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_file_that_has_become_long_is_begun_anew_and_only_its_end_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let file = open(&path, true).unwrap();
        let long = "x".repeat(usize::try_from(SHOWN_BYTES_MAX).unwrap());
        std::fs::write(&path, format!("begun {long}")).unwrap();
        assert_eq!(end_of(&file), long);
        cut(&file, SHOWN_BYTES_MAX + 6);
        assert_eq!(end_of(&file), long, "it is not too long yet");
        cut(&file, SHOWN_BYTES_MAX + 5);
        assert_eq!(end_of(&file), "");
        (&file).write_all(b"anew\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"anew\n");
    }

    #[test]
    fn what_a_process_says_after_its_agent_is_no_harm_to_it_and_is_read_by_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        // Dash ends itself when it can't write.
        let script =
            "echo one >&2; until test -e go; do sleep 0.01; done; echo two >&2 || exit 3; exec sleep 600";
        let mut first = shell(folder.path(), script);
        wait_for("its first word", || first.stderr() == "one");
        first.outlive();
        let pid = first.pid();
        // Nothing of ours stays open, as when an agent is killed.
        drop(first);
        std::fs::write(folder.path().join("go"), "").unwrap();
        let mut second = Process::adopt("a shell", pid, folder.path()).unwrap();
        wait_for("its second word", || second.stderr() == "one\ntwo");
        assert!(second.is_alive());
        second.kill();
    }
}
