//! A lock for what vCPUs share. It spins: it is held for a few instructions.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A value that one vCPU at a time may use.
pub struct Lock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `with` gives the value to one vCPU at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Lock {
            held: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Uses the value. Interrupts do not run the program, so a vCPU never waits for itself.
    pub fn with<R>(&self, action: impl FnOnce(&mut T) -> R) -> R {
        while self.held.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        // SAFETY: this vCPU has set `held`, and nobody else uses the value until it is released.
        let result = action(unsafe { &mut *self.value.get() });
        self.held.store(false, Ordering::Release);
        result
    }
}
