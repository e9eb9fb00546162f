//! A clock must never go back, neither for one vCPU nor when two vCPUs look one after the other.

use core::fmt;

/// A clock that has gone back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WentBack {
    /// The earlier reading.
    pub before: u64,
    /// The later reading, which is smaller.
    pub after: u64,
}

impl fmt::Display for WentBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "went back by {}: {} after {}",
            self.before - self.after,
            self.after,
            self.before
        )
    }
}

/// Watches one clock, in whatever unit it has.
#[derive(Debug, Clone, Default)]
pub struct Monotonic {
    last: u64,
}

impl Monotonic {
    /// Looks at a new reading.
    ///
    /// # Errors
    /// [`WentBack`] when it is smaller than an earlier one.
    pub fn observe(&mut self, now: u64) -> Result<(), WentBack> {
        if now < self.last {
            return Err(WentBack {
                before: self.last,
                after: now,
            });
        }
        self.last = now;
        Ok(())
    }
}

/// What KVM tells in a kvmclock area (`pvclock_vcpu_time_info`, Linux, Documentation/virt/kvm/x86/msr.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClockArea {
    /// Time stamp counter when `system_time_ns` was taken.
    pub tsc_timestamp: u64,
    /// Nanoseconds at that moment.
    pub system_time_ns: u64,
    /// Multiplier from shifted ticks to nanoseconds, in units of 2^-32.
    pub tsc_to_system_mul: u32,
    /// By how much ticks are shifted left before (negative: right).
    pub tsc_shift: i8,
}

impl ClockArea {
    /// kvmclock at time stamp `tsc`, in nanoseconds.
    #[must_use]
    pub fn at(&self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.tsc_timestamp);
        let shift = u32::from(self.tsc_shift.unsigned_abs());
        let ticks = if self.tsc_shift < 0 {
            ticks.checked_shr(shift).unwrap_or(0)
        } else {
            ticks.checked_shl(shift).unwrap_or(0)
        };
        let scaled = (u128::from(ticks) * u128::from(self.tsc_to_system_mul)) >> 32;
        self.system_time_ns
            .wrapping_add(u64::try_from(scaled).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standing_still_is_fine_and_going_back_is_not() {
        let mut clock = Monotonic::default();
        assert!([5, 5, 9].into_iter().all(|now| clock.observe(now).is_ok()));
        assert_eq!(clock.observe(8), Err(WentBack { before: 9, after: 8 }));
    }

    #[test]
    fn ticks_become_nanoseconds_by_multiplier_and_shift() {
        let half = ClockArea {
            tsc_timestamp: 100,
            system_time_ns: 7,
            tsc_to_system_mul: 1 << 31,
            tsc_shift: 0,
        };
        assert_eq!(half.at(300), 107);
        assert_eq!(ClockArea { tsc_shift: 1, ..half }.at(300), 207);
        assert_eq!(
            ClockArea {
                tsc_shift: -1,
                ..half
            }
            .at(300),
            57
        );
    }
}
