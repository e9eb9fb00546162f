//! kvmclock and the time stamp counter.

use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::{Ordering, fence};

use romulus_guest_core::abi::KVMCLOCK_STRIDE;
use romulus_guest_core::clock::ClockArea;

/// Set in an area's flags when all vCPUs' clocks show the same time.
const STABLE: u8 = 1;

/// Layout of a kvmclock area (Linux, `struct pvclock_vcpu_time_info`).
#[repr(C)]
struct Area {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time_ns: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad2: [u8; 2],
}

/// A moment by both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// kvmclock, in nanoseconds.
    pub ns: u64,
    /// The time stamp counter.
    pub tsc: u64,
    /// Whether the clocks of all vCPUs show the same time.
    pub stable: bool,
}

/// One vCPU's clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    area: u64,
}

impl Clock {
    /// The clock of a vCPU; the areas begin at `areas`.
    pub fn new(areas: u64, vcpu: u32) -> Self {
        Clock {
            area: areas + KVMCLOCK_STRIDE * u64::from(vcpu),
        }
    }

    /// The time now.
    pub fn moment(&self) -> Moment {
        let shared = self.area as *const Area;
        loop {
            // SAFETY: the area is mapped and aligned; KVM writes it whenever it likes and makes the version odd
            // meanwhile, so every field is read volatile and used only if the version was even and stayed.
            let (before, area, flags, tsc, after) = unsafe {
                let before = (&raw const (*shared).version).read_volatile();
                fence(Ordering::Acquire);
                let area = ClockArea {
                    tsc_timestamp: (&raw const (*shared).tsc_timestamp).read_volatile(),
                    system_time_ns: (&raw const (*shared).system_time_ns).read_volatile(),
                    tsc_to_system_mul: (&raw const (*shared).tsc_to_system_mul).read_volatile(),
                    tsc_shift: (&raw const (*shared).tsc_shift).read_volatile(),
                };
                let flags = (&raw const (*shared).flags).read_volatile();
                _mm_lfence();
                let tsc = _rdtsc();
                fence(Ordering::Acquire);
                (
                    before,
                    area,
                    flags,
                    tsc,
                    (&raw const (*shared).version).read_volatile(),
                )
            };
            if before == after && before % 2 == 0 {
                return Moment {
                    ns: area.at(tsc),
                    tsc,
                    stable: flags & STABLE != 0,
                };
            }
            core::hint::spin_loop();
        }
    }

    /// kvmclock now, in nanoseconds.
    pub fn ns(&self) -> u64 {
        self.moment().ns
    }
}
