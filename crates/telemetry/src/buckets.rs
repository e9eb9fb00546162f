//! Counts of values by powers of two: what a histogram of the metrics is made of. They only grow.

/// Upper bounds that a histogram has; what is larger counts in one further bucket.
pub const BOUNDS: usize = 21;

/// How many values were at most `first`, `2 * first`, `4 * first` and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets {
    first: u64,
    counts: [u64; BOUNDS + 1],
    sum: u64,
}

impl Buckets {
    /// The first bound of [`Buckets::durations`], in nanoseconds.
    pub const FIRST_NS: u64 = 16_000;

    /// Of nanoseconds: bounds from 16 µs to 16.8 s.
    pub const fn durations() -> Self {
        Self::new(Self::FIRST_NS)
    }

    /// Of numbers: bounds from 1 to 2²⁰.
    pub const fn numbers() -> Self {
        Self::new(1)
    }

    const fn new(first: u64) -> Self {
        Self {
            first,
            counts: [0; BOUNDS + 1],
            sum: 0,
        }
    }

    /// Of nanoseconds, from counts made elsewhere: `counts[i]` values were within bound `i` and over the one before, the last
    /// ones over all.
    pub fn of_durations(counts: [u64; BOUNDS + 1], sum_ns: u64) -> Self {
        Self {
            first: Self::FIRST_NS,
            counts,
            sum: sum_ns,
        }
    }

    /// Adds a value.
    pub fn record(&mut self, value: u64) {
        let firsts = value.div_ceil(self.first).max(1);
        // Rounded up to a power of two; what is over the largest one is over every bound.
        let bucket = match firsts.checked_next_power_of_two() {
            Some(power) => power.trailing_zeros() as usize,
            None => BOUNDS,
        };
        self.counts[bucket.min(BOUNDS)] += 1;
        self.sum = self.sum.saturating_add(value);
    }

    /// How many values there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The sum of all values.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Each bound, in the values' unit, with how many values were within it and over the one before. The last bound is infinite.
    pub fn each(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        self.counts.iter().enumerate().map(|(position, count)| {
            let bound = (position < BOUNDS).then(|| self.first << position);
            (bound, *count)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_counts_within_the_smallest_bound_that_holds_it() {
        let mut buckets = Buckets::numbers();
        for value in [0, 1, 2, 3, 4, 1 << 20, (1 << 20) + 1, u64::MAX] {
            buckets.record(value);
        }
        let counts: Vec<_> = buckets.each().filter(|(_, count)| *count > 0).collect();
        assert_eq!(
            counts,
            [
                (Some(1), 2),
                (Some(2), 1),
                (Some(4), 2),
                (Some(1 << 20), 1),
                (None, 2)
            ]
        );
        assert_eq!((buckets.count(), buckets.sum()), (8, u64::MAX));
    }

    #[test]
    fn durations_have_bounds_from_microseconds_to_seconds() {
        let mut buckets = Buckets::durations();
        buckets.record(16_000);
        buckets.record(16_001);
        let bounds: Vec<_> = buckets.each().collect();
        assert_eq!(bounds[0], (Some(16_000), 1));
        assert_eq!(bounds[1], (Some(32_000), 1));
        assert_eq!(bounds[BOUNDS - 1].0, Some(16_777_216_000));
        assert_eq!(bounds[BOUNDS].0, None);
    }
}
