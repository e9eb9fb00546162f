//! Names that never repeat: sessions and nonces, drawn from a seed that the driver takes from the operating system.
//!
//! Each draw is a bijection of a 128-bit counter, so that one life never draws the same name twice, and two lives do
//! so only when their random seeds collide. Names are not secrets: TLS keeps strangers out.

/// A stream of 128-bit names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Draw {
    high: u64,
    low: u64,
}

impl Draw {
    pub(crate) fn new(seed: u128) -> Self {
        let bytes = seed.to_le_bytes();
        let half = |from: usize| {
            bytes[from..from + 8]
                .iter()
                .rev()
                .fold(0u64, |value, byte| (value << 8) | u64::from(*byte))
        };
        Self {
            high: half(8),
            low: half(0),
        }
    }

    /// The next name.
    pub(crate) fn next(&mut self) -> u128 {
        self.low = self.low.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let (low, high) = (mix(self.low), self.high);
        (u128::from(mix(high ^ low)) << 64) | u128::from(low)
    }
}

/// Steele, Lea and Flood's SplitMix64 finaliser: a bijection of 64 bits.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_of_two_lives_do_not_repeat() {
        let mut seen = HashSet::new();
        for seed in [0, 1, 1 << 64, u128::MAX] {
            let mut draw = Draw::new(seed);
            assert!(
                (0..1000).all(|_| seen.insert(draw.next())),
                "seed {seed} repeated a name"
            );
        }
    }
}
