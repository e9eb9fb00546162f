//! Userfaultfd in its asynchronous write-protect mode: a page's first write after protection clears a flag
//! in the page tables by itself, with no message and nobody to answer (ioctl_userfaultfd(2),
//! Documentation/admin-guide/mm/userfaultfd.rst).
//!
//! The context belongs to the address space of the process that made it, so it is made *in* the other process
//! (one injected call), taken out by pidfd_getfd, and closed there at once: the tracked ranges then live and
//! die with our copy.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::ptrace::{CallStage, call_in_process};
use crate::{PidFd, SysError};

const API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURES: u64 =
    FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// `UFFD_USER_MODE_ONLY`: needs no privilege in the process. The asynchronous mode sees the kernel's writes
/// all the same.
const USER_MODE_ONLY: u64 = 1;

// The request numbers of include/uapi/linux/userfaultfd.h: _IOWR(0xAA, 0x3F, 24 bytes) and so on.
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06;

#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeRequest {
    start: u64,
    bytes: u64,
}

#[repr(C)]
struct RegisterRequest {
    range: RangeRequest,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtectRequest {
    range: RangeRequest,
    mode: u64,
}

/// A userfaultfd context with asynchronous write protection. Dropping it unregisters everything.
#[derive(Debug)]
pub struct UserFault(OwnedFd);

impl UserFault {
    /// Takes over a fresh userfaultfd and switches asynchronous write protection on.
    ///
    /// # Errors
    /// EINVAL when the kernel is older than 6.7 and does not know the mode.
    pub fn enable(fd: OwnedFd) -> Result<Self, SysError> {
        let mut request = ApiRequest {
            api: API,
            features: FEATURES,
            ioctls: 0,
        };
        // SAFETY: the request struct is the one this ioctl reads and writes, and outlives the call.
        let failed = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut request) };
        if failed != 0 {
            return Err(SysError::last("ioctl(UFFDIO_API) with WP_ASYNC"));
        }
        Ok(Self(fd))
    }

    /// Registers `[start, start + bytes)` for write protection.
    ///
    /// # Errors
    /// EBUSY when somebody else's userfaultfd has the range, EINVAL when it is not mapped or not whole pages.
    pub fn register(&self, start: u64, bytes: u64) -> Result<(), SysError> {
        let range = RangeRequest { start, bytes };
        let mut request = RegisterRequest {
            range,
            mode: REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: as in `enable`; the range is one of the context's own address space.
        let failed = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut request) };
        if failed == 0 {
            Ok(())
        } else {
            Err(SysError::last("ioctl(UFFDIO_REGISTER)"))
        }
    }

    /// Gives a range back.
    ///
    /// # Errors
    /// EINVAL when it is not mapped any more.
    pub fn unregister(&self, start: u64, bytes: u64) -> Result<(), SysError> {
        let mut request = RangeRequest { start, bytes };
        // SAFETY: as in `register`.
        let failed = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut request) };
        if failed == 0 {
            Ok(())
        } else {
            Err(SysError::last("ioctl(UFFDIO_UNREGISTER)"))
        }
    }

    /// Write-protects a registered range, so that every page in it counts as unwritten from now on.
    ///
    /// # Errors
    /// ENOENT when the range is not registered.
    pub fn write_protect(&self, start: u64, bytes: u64) -> Result<(), SysError> {
        let range = RangeRequest { start, bytes };
        let mut request = WriteProtectRequest {
            range,
            mode: WRITEPROTECT_MODE_WP,
        };
        // SAFETY: as in `register`.
        let failed = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut request) };
        if failed == 0 {
            Ok(())
        } else {
            Err(SysError::last("ioctl(UFFDIO_WRITEPROTECT)"))
        }
    }
}

impl AsFd for UserFault {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes a userfaultfd for our own memory: to see what the kernel can do, and to try a tracker on oneself.
///
/// # Errors
/// The kernel's, from userfaultfd(2).
pub fn create_here() -> Result<OwnedFd, SysError> {
    use std::os::fd::FromRawFd;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | i32::try_from(USER_MODE_ONLY).expect("1");
    // SAFETY: the call takes one plain number.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = i32::try_from(fd).expect("a file descriptor or -1");
    if fd < 0 {
        return Err(SysError::last("userfaultfd"));
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a userfaultfd for the address space of process `pid`, which keeps no descriptor of it.
/// `stage` is told how far it is; see [`call_in_process`].
///
/// # Errors
/// Those of [`call_in_process`], of pidfd_getfd and of [`UserFault::enable`].
pub fn create_in_process(pid: u32, stage: &mut (dyn FnMut(CallStage) + Send)) -> Result<UserFault, SysError> {
    let process = PidFd::open(pid)?;
    let flags =
        u64::try_from(libc::O_CLOEXEC | libc::O_NONBLOCK).expect("flags are positive") | USER_MODE_ONLY;
    let number = call_in_process(pid, libc::SYS_userfaultfd, &[flags], stage)?;
    let there = remote_result("userfaultfd in the process", number)?;
    let taken = process.take_fd(i32::try_from(there).expect("file descriptors have 31 bits"));
    // A descriptor that stays behind there would keep the ranges registered after our death.
    let there = u64::try_from(there).expect("not negative");
    let closed = call_in_process(pid, libc::SYS_close, &[there], stage)?;
    let taken = taken?;
    remote_result("close in the process", closed)?;
    UserFault::enable(taken)
}

fn remote_result(call: &'static str, value: i64) -> Result<i64, SysError> {
    if (-4095..0).contains(&value) {
        let errno = i32::try_from(-value).expect("error numbers are small");
        return Err(SysError::call(call, std::io::Error::from_raw_os_error(errno)));
    }
    Ok(value)
}
