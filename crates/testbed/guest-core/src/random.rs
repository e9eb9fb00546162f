//! Repeatable numbers: the guest's patterns must be the same again when they are checked.

/// A xorshift64* generator (Vigna, "An experimental exploration of Marsaglia's xorshift generators").
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator whose numbers depend on `seed` alone. Any seed will do.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Random(mix(seed) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number below `end`; 0 when `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        let wide = u128::from(self.number()) * u128::from(end);
        u64::try_from(wide >> 64).unwrap_or(0)
    }
}

/// Spreads every bit of `value` over the whole result (the finaliser of splitmix64).
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_the_same_numbers_again() {
        let (mut a, mut b) = (Random::new(7), Random::new(7));
        assert!((0..100).all(|_| a.number() == b.number()));
    }

    #[test]
    fn every_seed_moves_and_stays_below_its_end() {
        for seed in [0, 1, u64::MAX] {
            let mut random = Random::new(seed);
            assert!((0..1000).all(|_| random.below(10) < 10));
            assert_ne!(random.number(), random.number());
        }
        assert_eq!(Random::new(1).below(0), 0);
    }
}
