//! The guest's time across a restore: kvmclock and the TSC go on from where they were, forward by the time that went
//! by on the wall clock, never back.
//!
//! ```text
//!   saved:    guest clock g, wall clock w, host TSC t, TSC offset o       (one moment, KVM_GET_CLOCK)
//!   here:     guest clock g' = g + max(0, w' - w), host TSC t'            (KVM_SET_CLOCK, then KVM_GET_CLOCK)
//!   offset:   o' = o + (g' - g) * frequency + (t - t')                    (devices/vcpu.rst, section 4.1)
//! ```
//!
//! Where the kernel gives no such moment (its clock does not run on the TSC), the wall clock is read beside it and
//! the TSC is written, advanced by the same time.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::VmFd;
use romulus_host_sys::{monotonic_ns, wall_clock_offset_ns};
use zerocopy::{FromBytes, IntoBytes};

/// A longer gap than any sensible one, in nanoseconds (ten years): the wall clocks are then not to be believed.
const GAP_NS_MAX: u64 = 10 * 366 * 24 * 3600 * 1_000_000_000;

/// The VM's clock at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClockState {
    data: kvm_clock_data,
    /// Our own reading of the wall clock, nanoseconds since the epoch of Unix.
    wall_ns: u64,
}

impl ClockState {
    pub(super) fn read(vm: &VmFd) -> Result<Self, kvm_ioctls::Error> {
        let data = vm.get_clock()?;
        let wall_ns = monotonic_ns() + wall_clock_offset_ns();
        Ok(Self { data, wall_ns })
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        [self.data.as_bytes(), &self.wall_ns.to_le_bytes()].concat()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (data, wall) = bytes.split_at_checked(size_of::<kvm_clock_data>())?;
        Some(Self {
            data: kvm_clock_data::read_from_bytes(data).ok()?,
            wall_ns: u64::from_le_bytes(wall.try_into().ok()?),
        })
    }

    /// Sets the VM's clock to this and forward.
    pub(super) fn restore(self, vm: &VmFd) -> Result<ClockStep, kvm_ioctls::Error> {
        let now_ns = monotonic_ns() + wall_clock_offset_ns();
        let believed = now_ns.saturating_sub(self.wall_ns) <= GAP_NS_MAX;
        let kernel_adds = believed && self.data.flags & KVM_CLOCK_REALTIME != 0;
        let set = if kernel_adds {
            kvm_clock_data {
                clock: self.data.clock,
                flags: KVM_CLOCK_REALTIME,
                realtime: self.data.realtime,
                ..Default::default()
            }
        } else {
            let gap_ns = if believed {
                now_ns.saturating_sub(self.wall_ns)
            } else {
                0
            };
            kvm_clock_data {
                clock: self.data.clock.saturating_add(gap_ns),
                ..Default::default()
            }
        };
        vm.set_clock(&set)?;
        Ok(ClockStep {
            saved: self.data,
            here: vm.get_clock()?,
        })
    }
}

/// How far time went from the saved moment to one right after the restore.
#[derive(Clone, Copy, Debug)]
pub struct ClockStep {
    saved: kvm_clock_data,
    here: kvm_clock_data,
}

impl ClockStep {
    /// By how much the guest's clock is ahead of the saved one, in nanoseconds.
    pub fn forward_ns(&self) -> u64 {
        self.here.clock.saturating_sub(self.saved.clock)
    }

    /// The same in ticks of a TSC.
    pub(super) fn tsc_ticks(&self, khz: u32) -> u64 {
        let ticks = u128::from(self.forward_ns()) * u128::from(khz) / 1_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// The TSC offset that lets the guest's TSC go on, if both hosts say when its clock was what.
    pub(super) fn tsc_offset(&self, saved: &TscState) -> Option<u64> {
        let known = |data: &kvm_clock_data| data.flags & KVM_CLOCK_HOST_TSC != 0;
        let offset = saved.offset.filter(|_| known(&self.saved) && known(&self.here))?;
        let ticks = self.tsc_ticks(saved.khz);
        let host = self.saved.host_tsc.wrapping_sub(self.here.host_tsc);
        Some(offset.wrapping_add(ticks).wrapping_add(host))
    }
}

/// A vCPU's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TscState {
    /// Its frequency.
    pub(super) khz: u32,
    /// What is added to the host's, where the kernel says so.
    pub(super) offset: Option<u64>,
}

impl TscState {
    pub(super) fn new(khz: u32, offset: Option<u64>) -> Self {
        Self { khz, offset }
    }

    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.khz.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::from(self.offset.is_some()).to_le_bytes());
        bytes[8..].copy_from_slice(&self.offset.unwrap_or(0).to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 16] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let offset = u64::from(word(8)) | u64::from(word(12)) << 32;
        Some(Self {
            khz: word(0),
            offset: (word(4) != 0).then_some(offset),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(clock: u64, host_tsc: u64) -> kvm_clock_data {
        kvm_clock_data {
            clock,
            host_tsc,
            flags: KVM_CLOCK_HOST_TSC,
            ..Default::default()
        }
    }

    #[test]
    fn the_tsc_goes_on_by_just_the_time_that_the_clock_went() {
        let tsc = TscState::new(2_000_000, Some(500));
        // The other host's TSC is far behind; 3 us went by.
        let step = ClockStep {
            saved: clock(1_000_000, 9_000_000_000),
            here: clock(1_003_000, 40_000),
        };
        let before = 9_000_000_000u64 + 500;
        let after = 40_000u64.wrapping_add(step.tsc_offset(&tsc).unwrap());
        assert_eq!(after - before, 6000);
    }

    #[test]
    fn without_a_common_moment_the_tsc_is_written() {
        let tsc = TscState::new(1_000_000, Some(0));
        let mut step = ClockStep {
            saved: clock(5, 0),
            here: clock(7005, 0),
        };
        step.here.flags = 0;
        assert_eq!(step.tsc_offset(&tsc), None);
        assert_eq!(step.tsc_ticks(tsc.khz), 7000);
    }

    #[test]
    fn what_was_written_is_read() {
        for tsc in [
            TscState::new(2_596_000, Some(u64::MAX - 3)),
            TscState::new(1, None),
        ] {
            assert_eq!(TscState::from_bytes(&tsc.to_bytes()), Some(tsc));
        }
        let state = ClockState {
            data: clock(77, 88),
            wall_ns: 99,
        };
        let read = ClockState::from_bytes(&state.to_bytes()).unwrap();
        assert_eq!((read.data, read.wall_ns), (state.data, 99));
        assert!(ClockState::from_bytes(&state.to_bytes()[1..]).is_none());
        assert!(TscState::from_bytes(&[0; 15]).is_none());
    }
}
