//! Keeping signals from a thread for a moment.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use crate::SysError;

/// While it lives, no signal interrupts the thread that made it; they come afterwards.
pub(super) struct SignalsWait {
    before: libc::sigset_t,
    /// The mask is a thread's own: the value stays on it.
    _on_this_thread: PhantomData<*const ()>,
}

impl SignalsWait {
    pub(super) fn new() -> Result<Self, SysError> {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the first call fills `all`, the second reads it and fills `before`; both are live values of the right type.
        let failed = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
        };
        if failed != 0 {
            return Err(SysError::call(
                "pthread_sigmask",
                std::io::Error::from_raw_os_error(failed),
            ));
        }
        Ok(Self {
            // SAFETY: pthread_sigmask succeeded, so it has filled `before`.
            before: unsafe { before.assume_init() },
            _on_this_thread: PhantomData,
        })
    }

    /// The kernel's mask of all signals but one: bit n stands for signal n + 1.
    pub(super) fn all_but(&self, signal: libc::c_int) -> u64 {
        !(1 << (signal - 1))
    }
}

impl Drop for SignalsWait {
    fn drop(&mut self) {
        // SAFETY: `before` is a live mask that this thread had; no old mask is asked for.
        let failed =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
        debug_assert_eq!(failed, 0);
    }
}
