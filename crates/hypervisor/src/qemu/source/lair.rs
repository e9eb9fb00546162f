//! The FIFO and the lock of one attachment, in a folder that QEMU can reach.
//!
//! `qemu-PID.lock` is locked by the replicator and, through the same open file, by its guardian: whoever gets the lock knows
//! that both are gone, and that every `qemu-PID.*.fifo` there is a leftover. A FIFO is new for every attachment, as QEMU can
//! keep the writing end of an old one open after its reader died.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use romulus_host_sys::{make_fifo, monotonic_ns};
use rustix::fs::{FlockOperation, flock};

use super::error::AttachError;
use super::notes::Notes;

/// How long the guardian of a replicator that died may need to clean up.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The folder, and the lock on one QEMU in it.
pub(super) struct Lair {
    folder: PathBuf,
    pid: u32,
    lock: File,
}

impl Lair {
    /// Takes the lock on the QEMU of process `pid`, waiting a little for a guardian that is still at work.
    pub(super) fn enter(folder: &Path, pid: u32) -> Result<Self, AttachError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| AttachError::Folder { path, source }
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(folder)
            .map_err(failed(folder))?;
        let folder = folder.canonicalize().map_err(failed(folder))?;
        if folder.to_str().is_none() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "the path is not UTF-8");
            return Err(failed(&folder)(source));
        }
        let path = folder.join(format!("qemu-{pid}.lock"));
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            let mut options = OpenOptions::new();
            let options = options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600);
            let lock = options.open(&path).map_err(failed(&path))?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // Whoever had it before may have removed the file on leaving: then the lock is on nothing.
                Ok(()) if identity(&path) == lock.metadata().ok().map(|file| (file.dev(), file.ino())) => {
                    return Ok(Self { folder, pid, lock });
                }
                Ok(()) | Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(errno) => return Err(failed(&path)(errno.into())),
            }
            if Instant::now() > deadline {
                return Err(AttachError::ProtectedByAnother { pid, lock: path });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A second handle of the lock, for the guardian.
    pub(super) fn share_lock(&self) -> io::Result<File> {
        self.lock.try_clone()
    }

    /// FIFOs that an earlier attachment left.
    pub(super) fn leftovers(&self) -> Vec<PathBuf> {
        let prefix = format!("qemu-{}.", self.pid);
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
                name.starts_with(&prefix) && name.ends_with(".fifo")
            })
            .collect()
    }

    /// What an earlier attachment noted.
    pub(super) fn notes(&self) -> Notes {
        Notes::read(self.folder.join(format!("qemu-{}.note", self.pid)), self.pid)
    }

    /// Makes this attachment's FIFO, for QEMU's user, and makes sure that QEMU sees the same file under that path.
    pub(super) fn make_fifo(&self) -> Result<Fifo, AttachError> {
        let path = self
            .folder
            .join(format!("qemu-{}.{:x}.fifo", self.pid, monotonic_ns()));
        let (uid, gid) = owner(self.pid)?;
        make_fifo(&path, uid, gid)?;
        let fifo = Fifo(path);
        let seen_by_qemu = PathBuf::from(format!("/proc/{}/root{}", self.pid, fifo.0.display()));
        if identity(&fifo.0).is_none() || identity(&fifo.0) != identity(&seen_by_qemu) {
            return Err(AttachError::FifoUnreachable { path: fifo.0.clone() });
        }
        Ok(fifo)
    }

    /// Removes the lock file itself. The lock is given up when the last handle closes.
    pub(super) fn leave(self) {
        let _ = std::fs::remove_file(self.folder.join(format!("qemu-{}.lock", self.pid)));
    }
}

/// A FIFO in the folder, removed when dropped.
pub(super) struct Fifo(PathBuf);

impl Fifo {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).map(|file| (file.dev(), file.ino())).ok()
}

/// The user and group as which a process opens files.
fn owner(pid: u32) -> Result<(u32, u32), AttachError> {
    let path = format!("/proc/{pid}/status");
    let failed = |source| AttachError::Folder {
        path: path.clone().into(),
        source,
    };
    let status = std::fs::read_to_string(&path).map_err(failed)?;
    // Real, effective, saved, file system.
    let last = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().nth(3)?.parse().ok()
    };
    match (last("Uid:"), last("Gid:")) {
        (Some(uid), Some(gid)) => Ok((uid, gid)),
        _ => Err(failed(io::Error::new(
            io::ErrorKind::InvalidData,
            "it has no Uid and Gid lines",
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_one_owner_and_a_leftover_fifo_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let pid = std::process::id();
        let lair = Lair::enter(folder.path(), pid).unwrap();
        let fifo = lair.make_fifo().unwrap();
        assert_eq!(lair.leftovers(), [fifo.path().to_owned()]);
        let kept = lair.share_lock().unwrap();
        drop(lair);
        let refused = Lair::enter(folder.path(), pid)
            .err()
            .expect("the guardian still holds the lock");
        assert!(
            matches!(refused, AttachError::ProtectedByAnother { .. }),
            "{refused}"
        );
        drop(kept);
        let again = Lair::enter(folder.path(), pid).unwrap();
        drop(fifo);
        assert_eq!(again.leftovers(), Vec::<PathBuf>::new());
        again.leave();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no trace");
    }
}
