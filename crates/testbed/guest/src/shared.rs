//! What the vCPUs tell each other.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use romulus_guest_core::abi::VCPUS_MAX;
use romulus_guest_core::dirty::Dirtying;

use crate::sync::Lock;
use crate::worker::Parts;

/// A vCPU's own figures; each is written by that vCPU alone.
#[repr(align(64))]
pub struct Figures {
    /// Rounds of self-checks that held.
    pub rounds: AtomicU64,
    /// Timer interrupts that were asked for.
    pub timers: AtomicU64,
    /// Pages that its dirtier has written.
    pub pages_written: AtomicU64,
    /// Periods that its dirtier has completed.
    pub dirty_rounds: AtomicU64,
    /// Pages that its dirtier could not write in time.
    pub pages_skipped: AtomicU64,
    /// Units of countable work.
    pub work_units: AtomicU64,
    /// When it will be seen again at the latest, by kvmclock in nanoseconds; `u64::MAX` when it sleeps without end.
    pub due_ns: AtomicU64,
}

impl Figures {
    const fn new() -> Self {
        Figures {
            rounds: AtomicU64::new(0),
            timers: AtomicU64::new(0),
            pages_written: AtomicU64::new(0),
            dirty_rounds: AtomicU64::new(0),
            pages_skipped: AtomicU64::new(0),
            work_units: AtomicU64::new(0),
            due_ns: AtomicU64::new(u64::MAX),
        }
    }
}

/// Each vCPU's figures.
pub static FIGURES: [Figures; VCPUS_MAX as usize] = [const { Figures::new() }; VCPUS_MAX as usize];
/// Set by vCPU 0 when memory is divided and the others may start.
pub static STARTED: AtomicBool = AtomicBool::new(false);
/// What vCPU 0 gives to each of the others.
pub static PARTS: [Lock<Option<Parts>>; VCPUS_MAX as usize] = [const { Lock::new(None) }; VCPUS_MAX as usize];
/// The newest reading of kvmclock that any vCPU has seen.
pub static LATEST_NS: AtomicU64 = AtomicU64::new(0);
/// What the dirtier is to do.
pub static DIRTYING: Lock<Option<Dirtying>> = Lock::new(None);
/// Number of changes of [`DIRTYING`].
pub static DIRTYING_CHANGES: AtomicU32 = AtomicU32::new(0);
