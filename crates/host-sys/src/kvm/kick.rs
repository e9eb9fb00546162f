//! Making a vCPU leave the guest, without a gap: the flag stops the next `KVM_RUN` before it enters, the signal
//! ends one that is inside, whether it runs or sleeps in HLT (`kvm_run.immediate_exit` in the kernel's API).

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::time::{ClockId, Timespec};

use super::signals::SignalsWait;
use super::{ioctl, request};
use crate::SysError;

/// Bytes of the run page that are mapped: its first page has all that is needed here.
const MAPPED_BYTES: usize = 4096;

/// A second mapping of a vCPU's run page, for other threads than the one that runs the vCPU.
#[derive(Debug)]
pub struct RunPage(NonNull<libc::c_void>);

// SAFETY: the type owns its mapping and reaches one byte of it, through an atomic only.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the run page of `vcpu`.
    ///
    /// # Errors
    /// The kernel's, from mmap(2).
    pub fn map(vcpu: &VcpuFd) -> Result<Self, SysError> {
        // SAFETY: the fd belongs to `vcpu`, which is borrowed for the call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced; the pointer is only used by
        // this type, within its page.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                MAPPED_BYTES,
                protection,
                MapFlags::SHARED,
                fd,
                0,
            )
        };
        let base = base.map_err(|errno| SysError::call("mmap of a vCPU's run page", errno))?;
        Ok(Self(
            NonNull::new(base).expect("mmap never returns null without MAP_FIXED"),
        ))
    }

    /// Whether every `KVM_RUN` from now on only completes what the last exit began and returns EINTR.
    pub fn set_immediate_exit(&self, on: bool) {
        let offset = std::mem::offset_of!(kvm_bindings::kvm_run, immediate_exit);
        // SAFETY: the byte is inside the mapping; the kernel reads it, and nobody else in this process touches
        // it by another way than this one.
        let byte = unsafe { AtomicU8::from_ptr(self.0.as_ptr().cast::<u8>().add(offset)) };
        byte.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping that `map` made, and nobody uses it after this.
        let unmapped = unsafe { munmap(self.0.as_ptr(), MAPPED_BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Lets threads of this process be kicked: installs a handler that does nothing for SIGRTMIN, so that the
/// signal interrupts a `KVM_RUN` and harms nobody else.
///
/// # Errors
/// The kernel's, from sigaction(2).
pub fn allow_kicks() -> Result<(), SysError> {
    // SAFETY: an all-zero sigaction is a valid value of this plain C struct: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the struct is live, and the handler does nothing, which is safe in any context.
    let failed = unsafe { libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut()) };
    if failed != 0 {
        return Err(SysError::last("sigaction"));
    }
    Ok(())
}

/// Has `run` call `KVM_RUN` with a kick pending that nothing but `KVM_RUN` sees: each call does all that comes before
/// entering the guest and after leaving it, such as moving the interrupt of a timer that has expired into the local
/// APIC, and ends with EINTR. With `immediate_exit` it would end before that.
///
/// On the vCPU's own thread, as the kernel remembers who ran a vCPU last.
///
/// # Errors
/// The kernel's, and then `run` was not called, or the vCPU has kept its mask of signals: no `KVM_RUN` can be ended by a
/// signal any more.
pub fn with_kick_pending<R>(vcpu: &mut VcpuFd, run: impl FnOnce(&mut VcpuFd) -> R) -> Result<R, SysError> {
    // Taken when this ends, at the latest: its handler does nothing.
    let waits = SignalsWait::new()?;
    set_signal_mask(vcpu, Some(waits.all_but(libc::SIGRTMIN())))?;
    kick_thread(current_thread_id());
    let result = run(vcpu);
    set_signal_mask(vcpu, None)?;
    Ok(result)
}

/// Waits until the kernel has done what timers of this CPU have to do that expired before. Between the moment at which
/// a timer expires and its interrupt the hardware, or the host of a nested one, takes its time.
pub fn settle_timers() {
    // A sleep that is over before it begins is a timer that has expired: it is served together with the others, or after.
    let begin = Timespec {
        tv_sec: 0,
        tv_nsec: 1,
    };
    // An interruption comes from the same kernel, after its interrupts.
    let _ = rustix::thread::clock_nanosleep_absolute(ClockId::Monotonic, &begin);
}

/// `struct kvm_signal_mask`, for a kernel's set of 64 signals.
#[repr(C)]
struct SignalMask {
    bytes: u32,
    blocked: [u8; 8],
}

/// The size that the ioctl carries in its number: that of the struct without its flexible end.
const KVM_SET_SIGNAL_MASK: u64 = request(1, 0x8b, size_of::<u32>());

/// Which signals (bit n: number n + 1) wait while the vCPU is in `KVM_RUN`; `None`: those that wait otherwise, too.
fn set_signal_mask(vcpu: &VcpuFd, blocked: Option<u64>) -> Result<(), SysError> {
    let mask = blocked.map(|blocked| SignalMask {
        bytes: 8,
        blocked: blocked.to_ne_bytes(),
    });
    let argument = mask.as_ref().map_or(0, |mask| std::ptr::from_ref(mask) as u64);
    // SAFETY: null, or a live struct that is followed by as many bytes of a mask as it says.
    unsafe { ioctl("KVM_SET_SIGNAL_MASK", vcpu, KVM_SET_SIGNAL_MASK, argument) }.map(drop)
}

/// The id of the calling thread, for [`kick_thread`].
pub fn current_thread_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Interrupts a thread of this process that may be inside `KVM_RUN`. A thread that has ended is no error.
pub fn kick_thread(thread_id: i32) {
    // SAFETY: the signal's handler does nothing (`allow_kicks`); the ids are plain numbers that the kernel checks.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread_id, libc::SIGRTMIN()) };
}
