//! Child processes that end with whoever started them.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Has the kernel kill the child when the thread that starts it ends, however that ends.
///
/// A child that becomes another user loses this (prctl(2), `PR_SET_PDEATHSIG`).
pub fn die_with_thread(command: &mut Command) -> &mut Command {
    let parent = rustix::process::getpid();
    let arrange = move || {
        // SAFETY: PR_SET_PDEATHSIG takes a plain number.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // A parent that died before that is never heard of.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(arrange) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| die_with_thread(Command::new("sleep").arg("1000")).spawn())
            .join()
            .unwrap()
            .unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(libc::SIGKILL)
        );
    }
}
