//! Monotonic time as the deterministic crates see it: a number that the caller passes in.

use serde::{Deserialize, Serialize};

/// A point on the caller's monotonic clock, in nanoseconds from an arbitrary start.
///
/// Two `Time`s are comparable only when they came from the same clock of the same process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time {
    /// Nanoseconds since the clock's start.
    pub ns: u64,
}

impl Time {
    /// The time `ns` nanoseconds after the clock's start.
    pub const fn from_ns(ns: u64) -> Self {
        Self { ns }
    }

    /// This time plus `ns` nanoseconds; saturates at the end of the clock.
    #[must_use]
    pub const fn after_ns(self, ns: u64) -> Self {
        Self {
            ns: self.ns.saturating_add(ns),
        }
    }

    /// Nanoseconds from `earlier` to `self`, or 0 when `earlier` is later.
    pub const fn since_ns(self, earlier: Self) -> u64 {
        self.ns.saturating_sub(earlier.ns)
    }
}
