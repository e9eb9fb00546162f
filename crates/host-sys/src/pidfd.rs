//! A process by file descriptor: it cannot be confused with a later process of the same number.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::SysError;

/// A handle of a process (pidfd_open(2)). Readable once the process has ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens process `pid`.
    ///
    /// # Errors
    /// [`SysError::TargetGone`] when there is no such process.
    pub fn open(pid: u32) -> Result<Self, SysError> {
        let target = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(SysError::TargetGone(pid))?;
        match pidfd_open(target, PidfdFlags::empty()) {
            Ok(fd) => Ok(Self(fd)),
            Err(rustix::io::Errno::SRCH) => Err(SysError::TargetGone(pid)),
            Err(errno) => Err(SysError::call("pidfd_open", errno)),
        }
    }

    /// Duplicates file descriptor `fd` of the process into ours (pidfd_getfd(2)), close-on-exec.
    ///
    /// # Errors
    /// The kernel's, e.g. EBADF when the process has no such descriptor, EPERM when we may not trace it.
    pub fn take_fd(&self, fd: i32) -> Result<OwnedFd, SysError> {
        // SAFETY: the call takes three plain numbers and touches no memory of ours.
        let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), fd, 0) };
        let taken = i32::try_from(taken).expect("a file descriptor or -1");
        if taken < 0 {
            return Err(SysError::last("pidfd_getfd"));
        }
        // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(taken) })
    }

    /// Waits until the process has ended, at most `limit`; says whether it has.
    ///
    /// # Errors
    /// The kernel's, from poll(2).
    pub fn wait_ended(&self, limit: Duration) -> Result<bool, SysError> {
        let timeout = Timespec::try_from(limit).expect("limits are far below 2^63 seconds");
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(SysError::call("poll", errno)),
        }
    }

    /// Sends SIGKILL. A process that is gone already is no error.
    ///
    /// # Errors
    /// EPERM when the process is not ours to kill.
    pub fn kill(&self) -> Result<(), SysError> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(SysError::call("pidfd_send_signal", errno)),
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn the_end_of_a_process_is_seen_and_not_before() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let handle = PidFd::open(child.id()).unwrap();
        assert!(!handle.wait_ended(Duration::ZERO).unwrap());
        handle.kill().unwrap();
        assert!(handle.wait_ended(Duration::from_secs(20)).unwrap());
        child.wait().unwrap();
        handle.kill().expect("killing what is gone is no error");
        assert!(matches!(PidFd::open(child.id()), Err(SysError::TargetGone(_))));
    }

    #[test]
    fn a_descriptor_of_another_process_can_be_taken() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"found").unwrap();
        file.rewind().unwrap();
        let mut child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::from(file))
            .spawn()
            .unwrap();
        let taken = PidFd::open(child.id()).unwrap().take_fd(0);
        child.kill().unwrap();
        child.wait().unwrap();
        let mut text = String::new();
        std::fs::File::from(taken.unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "found");
    }
}
