//! The parts of KVM's interface that kvm-ioctls lacks, each checked before the kernel sees it.
//!
//! | file | what |
//! |---|---|
//! | `slots` | a VM's memory slots: mapping, dirty logging on and off, the dirty log |
//! | `ring` | a vCPU's dirty ring |
//! | `kick` | making a vCPU leave the guest, or not enter it: the run page's `immediate_exit` and a signal |
//! | `registers` | XSAVE of any size, the TSC offset |
//!
//! Source of all layouts and numbers: the kernel's documentation of its API, `Documentation/virt/kvm/api.rst`
//! and `devices/vcpu.rst`.

mod kick;
mod registers;
mod ring;
mod signals;
mod slots;

use std::os::fd::AsRawFd;

use crate::SysError;

pub use kick::{RunPage, allow_kicks, current_thread_id, kick_thread, settle_timers, with_kick_pending};
pub use registers::{get_tsc_offset, get_xsave, set_tsc_offset, set_xsave, xsave_area_bytes};
pub use ring::DirtyRing;
pub use slots::KvmSlots;

/// The letter of all ioctls of KVM.
const KVM_IOCTL_TYPE: u64 = 0xae;

/// The number of an ioctl that passes a struct of `bytes` bytes in `direction` (1 write, 2 read, 3 both).
const fn request(direction: u64, number: u64, bytes: usize) -> u64 {
    (direction << 30) | ((bytes as u64) << 16) | (KVM_IOCTL_TYPE << 8) | number
}

/// Calls an ioctl whose argument is a pointer or a number.
///
/// # Safety
/// `argument` is what `request` expects of a file of this kind: a plain number, or a pointer to a live value
/// (readable and writable as the request says, together with whatever that value points to).
unsafe fn ioctl(
    call: &'static str,
    file: &impl AsRawFd,
    request: u64,
    argument: u64,
) -> Result<u32, SysError> {
    // SAFETY: the caller vouches for the argument; the file is open as long as its owner is borrowed.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, argument) };
    u32::try_from(result).map_err(|_| SysError::last(call))
}
