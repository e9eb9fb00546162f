//! Systemd's fd store: files that it holds on to while the daemon is restarted, or dead, and hands to the next one.
//!
//! Unlike the other notes to systemd these may not be lost: whoever stores a file relies on it. So every failure is told, and
//! [`FdStore::barrier`] returns only when systemd has handled all that was sent before.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use sd_notify::NotifyState;

/// How long systemd may take to handle what was sent to it.
const BARRIER_LIMIT: Duration = Duration::from_secs(30);

/// The fd store of this daemon's unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdStore {
    files_max: usize,
}

impl FdStore {
    /// The store, when systemd has one for us: `NOTIFY_SOCKET` is set, and `FDSTORE` is how many files it takes. Systemd says the
    /// latter by itself from 254 on; before that the unit has to.
    pub fn of_this_unit() -> Option<Self> {
        env::var_os("NOTIFY_SOCKET")?;
        Self::of(&env::var("FDSTORE").ok()?)
    }

    fn of(files_max: &str) -> Option<Self> {
        let files_max = files_max.trim().parse().ok().filter(|max| *max > 0)?;
        Some(Self { files_max })
    }

    /// How many files fit.
    pub fn files_max(&self) -> usize {
        self.files_max
    }

    /// Stores a file under a name: at most 255 printable ASCII characters, no colon.
    ///
    /// # Errors
    /// When the note can't be sent.
    pub fn keep(&self, name: &str, file: BorrowedFd<'_>) -> io::Result<()> {
        let states = [
            NotifyState::FdStore,
            NotifyState::FdName(name),
            // Without it systemd would drop a file of which an error is polled.
            NotifyState::Custom("FDPOLL=0"),
        ];
        sd_notify::notify_with_fds(&states, &[file])
    }

    /// Removes all files of a name.
    ///
    /// # Errors
    /// When the note can't be sent.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
    }

    /// Waits until systemd has handled all notes that were sent before, at most 30 s.
    ///
    /// # Errors
    /// `TimedOut` after that, and whatever the kernel reports.
    pub fn barrier(&self) -> io::Result<()> {
        let (ours, systemds) = pipe_with(PipeFlags::CLOEXEC)?;
        sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[systemds.as_fd()])?;
        drop(systemds);
        let deadline = Instant::now() + BARRIER_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = Timespec::try_from(left).expect("30 s are not too long");
            // It hangs up when systemd closes the end that it got.
            match poll(&mut [PollFd::new(&ours, PollFlags::empty())], Some(&limit)) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "systemd did not confirm within 30 s that it keeps the files",
                    ));
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_store_only_when_something_fits_in() {
        assert_eq!(FdStore::of("512").map(|store| store.files_max()), Some(512));
        for nothing in ["0", "", "-1", "many"] {
            assert_eq!(FdStore::of(nothing), None, "{nothing}");
        }
    }
}
