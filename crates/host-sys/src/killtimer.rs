//! A deadline for ourselves that the kernel enforces: when it passes, the process gets SIGKILL.
//!
//! It is for the moments in which a guest waits for us. A thread cannot guard them: it is stopped together with
//! the process. A POSIX timer's SIGKILL reaches a stopped process, too, and needs nothing of ours to run.

use std::mem::MaybeUninit;

use crate::SysError;

/// A timer that kills the whole process unless it is disarmed in time. Dropping it disarms it.
#[derive(Debug)]
pub struct KillTimer(libc::timer_t);

// SAFETY: a timer id is a number that is valid in every thread of the process; the kernel locks the timer.
unsafe impl Send for KillTimer {}

impl KillTimer {
    /// Makes a timer, disarmed.
    ///
    /// # Errors
    /// EAGAIN when the process has too many timers (RLIMIT_SIGPENDING).
    pub fn new() -> Result<Self, SysError> {
        // SAFETY: an all-zero sigevent is a valid value of this plain C struct.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut id = MaybeUninit::<libc::timer_t>::uninit();
        // SAFETY: both pointers are to live values of the right types; the kernel fills `id` on success.
        let failed = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, id.as_mut_ptr()) };
        if failed != 0 {
            return Err(SysError::last("timer_create"));
        }
        // SAFETY: timer_create succeeded, so `id` is initialised.
        Ok(Self(unsafe { id.assume_init() }))
    }

    /// Kills this process in `limit_ns` nanoseconds, counted anew from now. Zero disarms.
    pub fn arm(&mut self, limit_ns: u64) {
        let seconds = i64::try_from(limit_ns / 1_000_000_000).expect("below 2^63");
        let rest = i64::try_from(limit_ns % 1_000_000_000).expect("below 10^9");
        let value = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: seconds,
                tv_nsec: rest,
            },
        };
        // SAFETY: the timer is ours and alive; the new value is a live struct; no old value is asked for.
        let failed = unsafe { libc::timer_settime(self.0, 0, &raw const value, std::ptr::null_mut()) };
        assert_eq!(failed, 0, "a live timer takes every value below 2^63 seconds");
    }

    /// Takes the deadline away.
    pub fn disarm(&mut self) {
        self.arm(0);
    }
}

impl Drop for KillTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours, alive, and used no more after this.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Runs in a process of its own, started by the tests below.
    #[test]
    fn helper_process() {
        let Ok(mode) = std::env::var("KILLTIMER_HELPER") else {
            return;
        };
        let mut timer = KillTimer::new().unwrap();
        timer.arm(50_000_000);
        match mode.as_str() {
            "stopped" => {
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP)
                    .unwrap()
            }
            "disarmed" => {
                timer.disarm();
                std::thread::sleep(std::time::Duration::from_millis(150));
                std::process::exit(9);
            }
            _ => unreachable!("unknown mode"),
        }
        std::thread::sleep(std::time::Duration::from_secs(60));
    }

    fn helper(mode: &str) -> std::process::ExitStatus {
        Command::new(std::env::current_exe().unwrap())
            .args(["killtimer::tests::helper_process", "--exact", "--nocapture"])
            .env("KILLTIMER_HELPER", mode)
            .status()
            .unwrap()
    }

    #[test]
    fn a_stopped_process_is_killed_when_its_time_is_up() {
        assert_eq!(helper("stopped").signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_disarmed_timer_kills_nobody() {
        assert_eq!(helper("disarmed").code(), Some(9));
    }
}
