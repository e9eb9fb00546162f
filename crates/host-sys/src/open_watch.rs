//! Hearing of it when somebody opens a file (inotify(7), `IN_OPEN`).
//!
//! A reader of a FIFO is told by poll(2) when a writer writes, not when it opens. The difference is what a writer does in
//! between.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use rustix::io::Errno;

use crate::SysError;

/// Room for a few events at a time: one of a file that is watched itself carries no name.
const EVENTS_BYTES: usize = 1024;

/// Hears of every open(2) of one file, under whatever path, from anywhere. Readable, for poll(2), when there was one.
#[derive(Debug)]
pub struct OpenWatch {
    inotify: OwnedFd,
}

impl OpenWatch {
    /// Begins to watch the file at `path`.
    ///
    /// # Errors
    /// EMFILE when the user has too many inotify instances (`fs.inotify.max_user_instances`).
    pub fn new(path: &Path) -> Result<Self, SysError> {
        let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
        let inotify = init(flags).map_err(|errno| SysError::call("inotify_init1", errno))?;
        add_watch(&inotify, path, WatchFlags::OPEN)
            .map_err(|errno| SysError::call("inotify_add_watch", errno))?;
        Ok(Self { inotify })
    }

    /// Whether the file was opened since the last call. Does not wait. May be true without an open (the file was removed),
    /// never false after one.
    ///
    /// # Errors
    /// The kernel's, from read(2).
    pub fn take_opened(&self) -> Result<bool, SysError> {
        let mut events = [0; EVENTS_BYTES];
        let mut opened = false;
        loop {
            match rustix::io::read(&self.inotify, &mut events) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(opened),
                Ok(_) => opened = true,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(SysError::call("read(inotify)", errno)),
            }
        }
    }
}

impl AsFd for OpenWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ReadOutcome, make_fifo, open_fifo_reader, read_nonblocking};
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn a_writer_that_has_not_written_yet_is_heard_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        make_fifo(&path, uid.as_raw(), gid.as_raw()).unwrap();
        let reader = open_fifo_reader(&path).unwrap();
        let watch = OpenWatch::new(&path).unwrap();
        assert!(!watch.take_opened().unwrap());
        assert_eq!(read_nonblocking(&reader, &mut [0]).unwrap(), ReadOutcome::End);
        let writer = {
            let path = path.clone();
            std::thread::spawn(move || std::fs::OpenOptions::new().write(true).open(path).unwrap())
        };
        poll(&mut [PollFd::new(&watch, PollFlags::IN)], None).unwrap();
        assert!(watch.take_opened().unwrap());
        assert!(!watch.take_opened().unwrap(), "each open is told once");
        // What tells a writer from another reader: the pipe has not ended.
        let writer = writer.join().unwrap();
        assert_eq!(read_nonblocking(&reader, &mut [0]).unwrap(), ReadOutcome::Empty);
        drop(writer);
        assert_eq!(read_nonblocking(&reader, &mut [0]).unwrap(), ReadOutcome::End);
    }
}
