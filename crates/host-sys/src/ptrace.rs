//! Runs one system call in another process, on one of its threads, and leaves no trace there (ptrace(2)).
//!
//! ```text
//!  SEIZE, INTERRUPT ─► stopped ─► registers set ─► call entered ─► call returned ─► stopped ─► restored ─► DETACH
//!                        │            │  thread's registers are ours: the rescue frame     │
//!                        │            │  brings it home should we die here                │
//!                        '─ thread may be inside a system call: the kernel restarts that call after the detach
//! ```
//!
//! - No code is written; an existing `syscall; ret` is jumped to.
//! - PTRACE_SEIZE without PTRACE_O_EXITKILL: when the tracing thread ends, for whatever reason, the kernel
//!   detaches and the thread goes on. The work is therefore done by a short-lived thread of our own.
//! - Stops are system-call stops with PTRACE_O_TRACESYSGOOD, not single steps: a SIGTRAP that is pending when we
//!   die would kill the process.
//! - Signals are blocked meanwhile, so no handler runs on the borrowed stack pointer.

use std::io;
use std::time::{Duration, Instant};

use crate::gadget::{self, Gadgets};
use crate::memory::write_unused;
use crate::{SysError, rescue_frame};

/// How long a thread may take to reach a stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);
const PTRACE_EVENT_STOP: i32 = 128;

/// How far a call in another process has come; for tests that break it off there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallStage {
    /// The thread is stopped, its registers are its own.
    Stopped,
    /// The registers are ours.
    RegistersSet,
    /// The kernel has begun the call.
    Entered,
    /// The call has returned, the registers are still ours.
    Returned,
    /// The registers are the thread's again, it is still stopped.
    Restored,
}

/// All stages, in order.
pub const CALL_STAGES: [CallStage; 5] = [
    CallStage::Stopped,
    CallStage::RegistersSet,
    CallStage::Entered,
    CallStage::Returned,
    CallStage::Restored,
];

/// Runs system call `number` with up to six `arguments` on the main thread of process `pid` and returns what it
/// returned (a negative error number on failure). `stage` is called at each stage, on another thread.
///
/// The call must be one that does not block: the process waits for it.
///
/// # Errors
/// [`SysError::TraceRefused`], [`SysError::TargetGone`], [`SysError::TargetStopped`], [`SysError::TargetBusy`],
/// [`SysError::NoGadget`]. After every error the process runs on as before.
///
/// # Panics
/// With more than six arguments.
pub fn call_in_process(
    pid: u32,
    number: i64,
    arguments: &[u64],
    stage: &mut (dyn FnMut(CallStage) + Send),
) -> Result<i64, SysError> {
    assert!(arguments.len() <= 6, "a system call has at most six arguments");
    let gadgets = gadget::find(pid)?;
    let mut six = [0; 6];
    six[..arguments.len()].copy_from_slice(arguments);
    std::thread::scope(|scope| {
        scope
            .spawn(|| Tracer::seize(pid)?.run(gadgets, number.cast_unsigned(), six, stage))
            .join()
            .expect("the tracing thread does not panic")
    })
}

enum Stop {
    Interrupt,
    Group,
    Call,
    Signal(i32),
}

/// A seized thread. Letting go of it is what the end of our own thread does.
struct Tracer {
    pid: u32,
    tid: libc::pid_t,
}

impl Tracer {
    fn seize(pid: u32) -> Result<Self, SysError> {
        let tid = libc::pid_t::try_from(pid).map_err(|_| SysError::TargetGone(pid))?;
        let tracer = Self { pid, tid };
        let options = u64::from(libc::PTRACE_O_TRACESYSGOOD.cast_unsigned());
        tracer
            .request(libc::PTRACE_SEIZE, 0, options)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ESRCH) => SysError::TargetGone(pid),
                _ => SysError::TraceRefused { pid, source },
            })?;
        Ok(tracer)
    }

    fn run(
        &self,
        gadgets: Gadgets,
        number: u64,
        arguments: [u64; 6],
        stage: &mut (dyn FnMut(CallStage) + Send),
    ) -> Result<i64, SysError> {
        self.stop()?;
        let own = self.registers()?;
        let own_mask = self.signal_mask()?;
        let frame_address = rescue_frame::address(&own);
        write_unused(
            self.pid,
            frame_address,
            &rescue_frame::build(&own, own_mask, gadgets),
        )?;
        stage(CallStage::Stopped);

        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let (rip, rsp) = (gadgets.syscall_ret, frame_address);
        // orig_rax -1: the kernel must not restart the call that the thread was in, not yet.
        let ours = libc::user_regs_struct {
            rip,
            rsp,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            rax: number,
            orig_rax: u64::MAX,
            ..own
        };
        self.set_registers(&ours)?;
        self.set_signal_mask(u64::MAX)?;
        stage(CallStage::RegistersSet);

        let mut held_back = Vec::new();
        let outcome = self.make_call(number, &mut held_back, stage);
        // To restart the call it was in, the kernel has to pass its signal code: only from such a stop.
        let stopped = self
            .request_call("ptrace(INTERRUPT)", libc::PTRACE_INTERRUPT, 0, 0)
            .and_then(|()| {
                self.go_on(libc::PTRACE_CONT)?;
                self.wait_for(&mut held_back, |stop| matches!(stop, Stop::Interrupt))
            });
        self.set_signal_mask(own_mask)?;
        self.set_registers(&own)?;
        stopped?;
        stage(CallStage::Restored);
        self.request_call("ptrace(DETACH)", libc::PTRACE_DETACH, 0, 0)?;
        for signal in held_back {
            // SAFETY: plain numbers; a thread that is gone meanwhile is an error that does not matter.
            unsafe { libc::syscall(libc::SYS_tgkill, self.tid, self.tid, signal) };
        }
        outcome
    }

    /// Interrupts the thread and waits until it is stopped by that.
    fn stop(&self) -> Result<(), SysError> {
        self.request_call("ptrace(INTERRUPT)", libc::PTRACE_INTERRUPT, 0, 0)?;
        loop {
            match self.wait()? {
                Stop::Interrupt => return Ok(()),
                // It was about to get a signal: it still gets it.
                Stop::Signal(signal) => {
                    let signal = u64::from(signal.cast_unsigned());
                    self.request_call("ptrace(CONT)", libc::PTRACE_CONT, 0, signal)?;
                }
                Stop::Call => self.go_on(libc::PTRACE_CONT)?,
                Stop::Group => return Err(SysError::TargetStopped(self.pid)),
            }
        }
    }

    fn make_call(
        &self,
        number: u64,
        held_back: &mut Vec<i32>,
        stage: &mut (dyn FnMut(CallStage) + Send),
    ) -> Result<i64, SysError> {
        self.go_on(libc::PTRACE_SYSCALL)?;
        self.wait_for(held_back, |stop| matches!(stop, Stop::Call))?;
        assert_eq!(
            self.registers()?.orig_rax,
            number,
            "the call entered is the one asked for"
        );
        stage(CallStage::Entered);
        self.go_on(libc::PTRACE_SYSCALL)?;
        self.wait_for(held_back, |stop| matches!(stop, Stop::Call))?;
        let result = self.registers()?.rax.cast_signed();
        stage(CallStage::Returned);
        Ok(result)
    }

    /// Waits for a stop of one kind; signals that cannot be blocked are kept for later.
    fn wait_for(&self, held_back: &mut Vec<i32>, wanted: impl Fn(&Stop) -> bool) -> Result<(), SysError> {
        loop {
            let stop = self.wait()?;
            if wanted(&stop) {
                return Ok(());
            }
            if let Stop::Signal(signal) = stop {
                held_back.push(signal);
            }
            self.go_on(libc::PTRACE_SYSCALL)?;
        }
    }

    fn wait(&self) -> Result<Stop, SysError> {
        let deadline = Instant::now() + STOP_LIMIT;
        let mut turns = 0u32;
        loop {
            let mut status = 0;
            // SAFETY: `status` is a live integer.
            let reaped = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if reaped == self.tid {
                return self.classify(status);
            }
            if reaped < 0 {
                return Err(SysError::last("waitpid"));
            }
            if Instant::now() > deadline {
                return Err(SysError::TargetBusy(self.pid));
            }
            turns += 1;
            if turns < 2000 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    fn classify(&self, status: i32) -> Result<Stop, SysError> {
        if !libc::WIFSTOPPED(status) {
            return Err(SysError::TargetGone(self.pid));
        }
        let signal = libc::WSTOPSIG(status);
        Ok(match (status >> 16, signal) {
            (PTRACE_EVENT_STOP, libc::SIGTRAP) => Stop::Interrupt,
            (PTRACE_EVENT_STOP, _) => Stop::Group,
            (_, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Call,
            (_, signal) => Stop::Signal(signal),
        })
    }

    fn go_on(&self, how: libc::c_uint) -> Result<(), SysError> {
        self.request_call("ptrace(CONT)", how, 0, 0)
    }

    fn registers(&self) -> Result<libc::user_regs_struct, SysError> {
        // SAFETY: an all-zero register set is a valid value of this plain C struct.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        let address = &raw mut registers as u64;
        self.request_call("ptrace(GETREGS)", libc::PTRACE_GETREGS, 0, address)?;
        Ok(registers)
    }

    fn set_registers(&self, registers: &libc::user_regs_struct) -> Result<(), SysError> {
        let address = std::ptr::from_ref(registers) as u64;
        self.request_call("ptrace(SETREGS)", libc::PTRACE_SETREGS, 0, address)
    }

    fn signal_mask(&self) -> Result<u64, SysError> {
        let mut mask = 0u64;
        let address = &raw mut mask as u64;
        self.request_call("ptrace(GETSIGMASK)", libc::PTRACE_GETSIGMASK, 8, address)?;
        Ok(mask)
    }

    fn set_signal_mask(&self, mask: u64) -> Result<(), SysError> {
        let address = &raw const mask as u64;
        self.request_call("ptrace(SETSIGMASK)", libc::PTRACE_SETSIGMASK, 8, address)
    }

    fn request_call(
        &self,
        call: &'static str,
        what: libc::c_uint,
        address: u64,
        data: u64,
    ) -> Result<(), SysError> {
        self.request(what, address, data)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ESRCH) => SysError::TargetGone(self.pid),
                _ => SysError::Call { call, source },
            })
    }

    fn request(&self, what: libc::c_uint, address: u64, data: u64) -> io::Result<()> {
        // SAFETY: the requests used here read or write at `data` exactly one register set or one signal mask,
        // which the callers above pass as the address of a live value, or take it as a plain number.
        let result = unsafe { libc::ptrace(what, self.tid, address, data) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}
