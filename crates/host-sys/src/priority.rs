//! A process that must answer within milliseconds while every core is busy.

use rustix::process::{getpriority_process, setpriority_process};

/// Nice value of a daemon's threads: heartbeats and pauses must not wait behind a guest's virtual CPU.
const NICE: i32 = -15;

/// Raises the calling thread, and the threads that it makes from now on, above ordinary processes. Returns whether
/// the kernel allowed it (it needs `CAP_SYS_NICE` or a limit that permits it).
pub fn raise() -> bool {
    match getpriority_process(None) {
        Ok(now) if now <= NICE => true,
        _ => setpriority_process(None, NICE).is_ok(),
    }
}
