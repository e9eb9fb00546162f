//! Files that the service manager hands to a process at its start: sockets, and what an earlier life had it keep.

use std::env;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use crate::SysError;

/// The first of them, by sd_listen_fds(3).
const FIRST: RawFd = 3;

/// Takes the files that were handed to this process (sd_listen_fds(3)), with their names, close-on-exec from now on. None when there
/// are none, when they are another process's, and when they were taken before.
///
/// Call it at the very start, before anything else opens or inherits a file.
///
/// # Errors
/// [`SysError::Call`] when one of them is not open.
pub fn take_inherited_files() -> Result<Vec<(String, OwnedFd)>, SysError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) || TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let count = usize::try_from(number("LISTEN_FDS").unwrap_or(0)).unwrap_or(usize::MAX);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let mut files = Vec::new();
    for fd in (FIRST..RawFd::MAX).take(count) {
        // SAFETY: a number that is not open only makes the call fail; if it is open it is ours, as LISTEN_PID says.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let flags = fcntl_getfd(borrowed).map_err(|errno| SysError::call("fcntl(F_GETFD)", errno))?;
        fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)
            .map_err(|errno| SysError::call("fcntl(F_SETFD)", errno))?;
        // SAFETY: it is open, was handed to this process and to nobody else in it, and is taken once: see TAKEN.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        files.push((names.next().unwrap_or_default(), owned));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::process::Command;

    use super::*;

    /// Runs one of the tests below in a process of its own that begins with fds 3 and 4 open.
    fn begin_with_files(test: &str, variables: &str) {
        let folder = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let begin =
            format!("{variables} exec \"$0\" --exact inherited::tests::{test} --nocapture 3<one 4<two");
        let output = Command::new("sh")
            .args(["-c", &begin])
            .arg(env::current_exe().unwrap())
            .current_dir(&folder)
            .env("ROMULUS_BEGUN_WITH_FILES", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    fn is_begun() -> bool {
        env::var_os("ROMULUS_BEGUN_WITH_FILES").is_some()
    }

    #[test]
    fn files_that_were_handed_over_are_taken_once_by_their_names() {
        if !is_begun() {
            let names = "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=image/a/layout:stored";
            return begin_with_files("files_that_were_handed_over_are_taken_once_by_their_names", names);
        }
        let files = take_inherited_files().unwrap();
        let read = |(name, fd): (String, OwnedFd)| {
            assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            (name, text)
        };
        let found: Vec<_> = files.into_iter().map(read).collect();
        let expected =
            [("image/a/layout", "one"), ("stored", "two")].map(|(name, text)| (name.into(), text.into()));
        assert_eq!(found, expected);
        assert!(take_inherited_files().unwrap().is_empty());
    }

    #[test]
    fn files_of_another_process_are_left_alone() {
        if !is_begun() {
            let names = "LISTEN_PID=1 LISTEN_FDS=2 LISTEN_FDNAMES=a:b";
            return begin_with_files("files_of_another_process_are_left_alone", names);
        }
        assert!(take_inherited_files().unwrap().is_empty());
    }
}
