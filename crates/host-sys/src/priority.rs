//! Scheduling of a process that must answer within milliseconds while every core is busy.
//!
//! On Linux the nice value belongs to a thread, and what a thread makes (threads, processes) inherits it. Only threads
//! that sleep most of the time are raised: one that computes at a raised priority starves the kernel's own threads, the
//! delivery of packets among them, and a hypervisor that inherits it starves the host.

use rustix::process::{getpriority_process, setpriority_process};

/// Nice value of threads that must not wait: heartbeats, pauses, releases.
const PROMPT_NICE: i32 = -15;
/// Nice value of everything else.
const ORDINARY_NICE: i32 = 0;

/// Raises the calling thread above ordinary ones. Returns whether the kernel allowed it (it needs `CAP_SYS_NICE` or
/// a limit that permits it).
pub fn raise() -> bool {
    match getpriority_process(None) {
        Ok(now) if now <= PROMPT_NICE => true,
        _ => setpriority_process(None, PROMPT_NICE).is_ok(),
    }
}

/// Takes the calling thread back to ordinary priority, for threads that compute or start other programs.
pub fn lower() {
    if getpriority_process(None).is_ok_and(|now| now < ORDINARY_NICE) {
        // Lowering one's own priority is always allowed.
        setpriority_process(None, ORDINARY_NICE).expect("a thread may be nicer to others");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lowered_thread_starts_has_ordinary_priority() {
        let nice = std::thread::spawn(|| {
            raise();
            std::thread::spawn(|| {
                lower();
                getpriority_process(None).unwrap()
            })
            .join()
            .unwrap()
        })
        .join()
        .unwrap();
        assert!(nice >= 0, "a thread that was lowered has nice value {nice}");
    }
}
