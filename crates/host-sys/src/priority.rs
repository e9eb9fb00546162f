//! Scheduling of a process that must answer within milliseconds while every core is busy.
//!
//! On Linux the nice value belongs to a thread, and what a thread makes (threads, processes) inherits it. Only threads
//! that sleep most of the time are raised: one that computes at a raised priority starves the kernel's own threads, the
//! delivery of packets among them, and a hypervisor that inherits it starves the host.

//!
//! A thread of higher weight still waits until the one that runs has used up its slice, unless its own slice is shorter
//! (Linux 6.12 and later, sched_setattr(2)): so that is asked for, too.

use rustix::process::{getpriority_process, setpriority_process};

/// Nice value of threads that must not wait: heartbeats, pauses, releases.
const PROMPT_NICE: i32 = -15;
/// Nice value of everything else.
const ORDINARY_NICE: i32 = 0;
/// Nice value of threads that have much to do for others who wait: above the guests' own work, but no more than so.
const BULK_NICE: i32 = -5;
/// Slice of threads that must not wait, in nanoseconds: the shortest that the kernel takes.
const PROMPT_SLICE_NS: u64 = 100_000;
/// Asks for the kernel's own slice.
const ORDINARY_SLICE_NS: u64 = 0;
/// Among real-time threads the last.
const REALTIME_PRIORITY: u32 = 1;

/// Raises the calling thread above ordinary ones. Returns whether the kernel allowed it (it needs `CAP_SYS_NICE` or
/// a limit that permits it).
pub fn raise() -> bool {
    let raised = match getpriority_process(None) {
        Ok(now) if now <= PROMPT_NICE => true,
        _ => setpriority_process(None, PROMPT_NICE).is_ok(),
    };
    set_slice(PROMPT_SLICE_NS);
    raised
}

/// Puts the calling thread before all ordinary ones, raised or not. What it makes is ordinary. Returns whether the kernel allowed it
/// (it needs `CAP_SYS_NICE` or `RLIMIT_RTPRIO`, and a unit without `RestrictRealtime=`); otherwise nothing has changed.
///
/// The kernel leaves some twentieth of a core to others whatever such a thread does (`sched_rt_runtime_us`), which is as much as a
/// raised one leaves them.
pub fn raise_to_realtime() -> bool {
    let attr = SchedAttr {
        size: SCHED_ATTR_BYTES,
        policy: number(libc::SCHED_RR),
        flags: number(libc::SCHED_FLAG_RESET_ON_FORK).into(),
        priority: REALTIME_PRIORITY,
        ..SchedAttr::default()
    };
    // SAFETY: the kernel only reads the live struct, whose size is in it; 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) == 0 }
}

/// Takes the calling thread back to ordinary priority, for threads that compute or start other programs.
pub fn lower() {
    if getpriority_process(None).is_ok_and(|now| now < ORDINARY_NICE) {
        // Lowering one's own priority is always allowed.
        setpriority_process(None, ORDINARY_NICE).expect("a thread may be nicer to others");
        set_slice(ORDINARY_SLICE_NS);
    }
}

/// Takes the calling thread back to little above ordinary priority, for threads that carry much for a guest that waits.
pub fn bulk() {
    lower();
    // Where that is not allowed it is an ordinary thread.
    let _ = setpriority_process(None, BULK_NICE);
}

/// Changes the calling thread's priority with its work: somebody waits for it, or not. Asks the kernel only when that changes.
#[derive(Debug, Default)]
pub struct Turns {
    awaited: bool,
}

impl Turns {
    /// As an ordinary thread, to begin with.
    pub fn ordinary() -> Self {
        lower();
        Self::default()
    }

    /// Whether somebody waits for what comes now, which must be little.
    pub fn awaited(&mut self, awaited: bool) {
        if awaited == self.awaited {
            return;
        }
        self.awaited = awaited;
        if awaited {
            raise();
        } else {
            lower();
        }
    }
}

const _: () = assert!(size_of::<SchedAttr>() == SCHED_ATTR_BYTES as usize);

/// `struct sched_attr` of sched_setattr(2), as of its first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

const SCHED_ATTR_BYTES: u32 = 48;

fn number(constant: i32) -> u32 {
    u32::try_from(constant).expect("a small number")
}

/// Sets the slice of the calling thread, if it has an ordinary policy. Best effort: older kernels ignore it.
fn set_slice(slice_ns: u64) {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes at most so many bytes into the live struct, which has as many; 0 is the calling thread.
    let read = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, SCHED_ATTR_BYTES, 0) };
    if read != 0 || attr.policy != number(libc::SCHED_OTHER) {
        return;
    }
    attr.runtime_ns = slice_ns;
    // SAFETY: the kernel only reads the live struct, whose size is in it.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
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

    #[test]
    fn a_thread_is_raised_for_as_long_as_it_is_awaited() {
        std::thread::spawn(|| {
            raise();
            let raised = getpriority_process(None).unwrap();
            let mut turns = Turns::ordinary();
            let mut nice = |awaited| {
                turns.awaited(awaited);
                getpriority_process(None).unwrap()
            };
            assert!(nice(false) >= 0);
            assert_eq!(nice(true), raised);
            assert_eq!(nice(true), raised);
            assert!(nice(false) >= 0);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_a_real_time_thread_starts_is_ordinary() {
        std::thread::spawn(|| {
            // SAFETY: it takes and returns plain numbers.
            let policy = || unsafe { libc::sched_getscheduler(0) };
            raise();
            assert!(
                raise_to_realtime(),
                "root may, unless the whole machine forbids it"
            );
            assert_eq!(policy(), libc::SCHED_RR | libc::SCHED_RESET_ON_FORK);
            let child = std::thread::spawn(move || (policy(), getpriority_process(None).unwrap()));
            assert_eq!(child.join().unwrap(), (libc::SCHED_OTHER, 0));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn setting_the_slice_leaves_policy_and_nice_value_as_they_are() {
        std::thread::spawn(|| {
            setpriority_process(None, 3).unwrap();
            set_slice(PROMPT_SLICE_NS);
            assert_eq!(getpriority_process(None).unwrap(), 3);
            // SAFETY: it takes and returns plain numbers.
            assert_eq!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_OTHER);
            set_slice(ORDINARY_SLICE_NS);
            assert_eq!(getpriority_process(None).unwrap(), 3);
        })
        .join()
        .unwrap();
    }
}
