//! Named and unnamed pipes: making, sizing and reading them without blocking.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid, chown, mknodat, open};
use rustix::io::Errno;

use crate::SysError;

/// Makes a FIFO at `path`, mode 0600, and gives it to `uid` and `gid`.
///
/// # Errors
/// EEXIST when something is there already, EPERM when it may not be given away.
pub fn make_fifo(path: &Path, uid: u32, gid: u32) -> Result<(), SysError> {
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, path, FileType::Fifo, mode, 0).map_err(|errno| SysError::call("mkfifo", errno))?;
    let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    chown(path, owner.0, owner.1).map_err(|errno| SysError::call("chown", errno))
}

/// Opens a FIFO for reading without waiting for a writer. A writer that waits in open(2) goes on by this.
///
/// # Errors
/// The kernel's, from open(2).
pub fn open_fifo_reader(path: &Path) -> Result<OwnedFd, SysError> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|errno| SysError::call("open", errno))
}

/// Sets the capacity of a pipe, in bytes; the kernel rounds up to a power of two of at least one page. Returns what it
/// has now: never more than that many bytes are in the pipe.
///
/// # Errors
/// EBUSY when more is in the pipe than fits, EPERM above the user's limit.
pub fn resize_pipe(pipe: impl AsFd, capacity_bytes: usize) -> Result<usize, SysError> {
    rustix::pipe::fcntl_setpipe_size(pipe, capacity_bytes)
        .map_err(|errno| SysError::call("fcntl(F_SETPIPE_SZ)", errno))
}

/// Bytes that wait in a pipe to be read.
///
/// # Errors
/// The kernel's, from ioctl(FIONREAD).
pub fn pipe_bytes_waiting(pipe: impl AsFd) -> Result<u64, SysError> {
    rustix::io::ioctl_fionread(pipe).map_err(|errno| SysError::call("ioctl(FIONREAD)", errno))
}

/// What a read that does not wait came back with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing yet.
    Empty,
    /// No writer, and nothing left.
    End,
}

/// Reads from a descriptor that was opened with `O_NONBLOCK`.
///
/// # Errors
/// The kernel's, from read(2).
pub fn read_nonblocking(fd: impl AsFd, into: &mut [u8]) -> Result<ReadOutcome, SysError> {
    loop {
        return match rustix::io::read(&fd, &mut *into) {
            Ok(0) => Ok(ReadOutcome::End),
            Ok(bytes) => Ok(ReadOutcome::Bytes(bytes)),
            Err(Errno::AGAIN) => Ok(ReadOutcome::Empty),
            Err(Errno::INTR) => continue,
            Err(errno) => Err(SysError::call("read", errno)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_writer_stays_blocked_until_the_pipe_grows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        make_fifo(
            &path,
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw(),
        )
        .unwrap();
        assert!(
            make_fifo(&path, 0, 0).is_err(),
            "an existing file must not be taken over"
        );
        let reader = open_fifo_reader(&path).unwrap();
        resize_pipe(&reader, 4096).unwrap();
        let mut buffer = vec![0; 100_000];
        let writer = std::thread::spawn(move || {
            std::fs::OpenOptions::new()
                .write(true)
                .open(path)
                .unwrap()
                .write_all(&[7; 50_000])
                .unwrap();
        });
        while pipe_bytes_waiting(&reader).unwrap() < 4096 {
            std::thread::yield_now();
        }
        assert!(!writer.is_finished());
        resize_pipe(&reader, 1 << 20).unwrap();
        let mut total = 0;
        loop {
            match read_nonblocking(&reader, &mut buffer).unwrap() {
                ReadOutcome::Bytes(bytes) => total += bytes,
                ReadOutcome::Empty => std::thread::yield_now(),
                ReadOutcome::End => break,
            }
        }
        writer.join().unwrap();
        assert_eq!(total, 50_000);
    }
}
