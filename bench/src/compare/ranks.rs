//! Whether two small samples differ, and by how much, without an assumption about how they are distributed.
//!
//! The exact test of ranks (Mann and Whitney, "On a test of whether one of two random variables is stochastically larger than
//! the other", 1947) is a permutation test: if both samples come from the same distribution, every order of their values is
//! as likely as any other. The interval is that of Hodges and Lehmann ("Estimates of location based on rank tests", 1963): all
//! differences between a value of the one and a value of the other, without as many at either end as the test allows. Test and
//! interval agree: they differ exactly when the interval does not hold 0.

use std::collections::BTreeMap;

/// By how much the values of one sample lie above those of another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shift {
    /// The median of all differences.
    pub(crate) middle: f64,
    /// Both ends of the interval; `None` when the samples are too small for the confidence that was asked for.
    pub(crate) interval: Option<(f64, f64)>,
}

/// The test, at one confidence. What it computed for samples of some size it keeps.
pub(crate) struct Ranks {
    /// Between 0 and 1.
    confidence: f64,
    known: BTreeMap<(usize, usize), Option<usize>>,
}

impl Ranks {
    pub(crate) fn new(confidence: f64) -> Self {
        Self {
            confidence,
            known: BTreeMap::new(),
        }
    }

    /// By how much `to` lies above `from`. `None` when one of them is empty.
    pub(crate) fn shift(&mut self, from: &[f64], to: &[f64]) -> Option<Shift> {
        let mut all: Vec<f64> = to
            .iter()
            .flat_map(|to| from.iter().map(move |from| to - from))
            .collect();
        all.sort_by(f64::total_cmp);
        let half = all.len() / 2;
        let middle = match all.len() {
            0 => return None,
            even if even.is_multiple_of(2) => f64::midpoint(all[half - 1], all[half]),
            _ => all[half],
        };
        let sizes = (from.len(), to.len());
        let rank = *self
            .known
            .entry(sizes)
            .or_insert_with(|| rank_of_ends(sizes.0, sizes.1, self.confidence));
        Some(Shift {
            middle,
            interval: rank.map(|rank| (all[rank - 1], all[all.len() - rank])),
        })
    }
}

impl Shift {
    /// Whether 0 is outside of the interval.
    #[cfg(test)]
    pub(crate) fn differs(&self) -> bool {
        self.interval.is_some_and(|(low, high)| low > 0.0 || high < 0.0)
    }
}

/// The ends of the interval are the differences of this rank, from 1, from below and from above; `None` when even all
/// differences together do not have the confidence.
fn rank_of_ends(from: usize, to: usize, confidence: f64) -> Option<usize> {
    let most = (1.0 - confidence) / 2.0;
    let mut below = 0.0;
    let rank = tail(from, to)
        .iter()
        .take_while(|probability| {
            below += **probability;
            below <= most
        })
        .count();
    (rank > 0).then_some(rank)
}

/// The probability that `u` of all pairs are the wrong way round, for `u` from 0 to half of the pairs.
fn tail(from: usize, to: usize) -> Vec<f64> {
    let length = from * to / 2 + 1;
    // counts[j][u]: orders of i values of the one and j of the other in which u pairs are the wrong way round. The last value
    // is of the one, and then comes after all j, or of the other.
    let mut counts = vec![vec![0.0_f64; length]; to + 1];
    counts.iter_mut().for_each(|counts| counts[0] = 1.0);
    for _ in 0..from {
        for j in 1..=to {
            let (before, rest) = counts.split_at_mut(j);
            let (fewer, same) = (&before[j - 1], &mut rest[0]);
            for u in (0..length).rev() {
                let without = if u >= j { same[u - j] } else { 0.0 };
                same[u] = without + fewer[u];
            }
        }
    }
    let mut orders = 1.0;
    for (over, under) in (1..=to).map(|j| (float(from + j), float(j))) {
        orders *= over / under;
    }
    counts[to].iter().map(|count| count / orders).collect()
}

fn float(number: usize) -> f64 {
    crate::stats::float(number as u64)
}

/// Random numbers of a distribution, for tests of what is said of samples.
#[cfg(test)]
pub(crate) mod samples {
    use romulus_guest_core::random::Random;

    /// Evenly from 0 to 1.
    fn even(random: &mut Random) -> f64 {
        crate::stats::float(random.number() >> 11) / crate::stats::float(1 << 53)
    }

    /// Normally distributed, with this deviation.
    pub(crate) fn normal(random: &mut Random, deviation: f64) -> f64 {
        let (one, other) = (1.0 - even(random), even(random));
        deviation * (-2.0 * one.ln()).sqrt() * (other * std::f64::consts::TAU).cos()
    }

    /// The logarithms of repetitions around `middle`.
    pub(crate) fn of(random: &mut Random, count: usize, middle: f64, deviation: f64) -> Vec<f64> {
        (0..count).map(|_| middle + normal(random, deviation)).collect()
    }
}

#[cfg(test)]
mod tests {
    use romulus_guest_core::random::Random;

    use super::*;

    const TRIALS: u32 = 4000;

    /// How many of the trials do so.
    fn part(mut trial: impl FnMut(&mut Random) -> bool) -> f64 {
        let mut random = Random::new(7);
        let count = (0..TRIALS).filter(|_| trial(&mut random)).count();
        float(count) / f64::from(TRIALS)
    }

    #[test]
    fn the_distribution_of_ranks_is_the_published_one() {
        // Of 3 and 3 values: 1, 1, 2, 3, 3 of 20 orders.
        let published = [1.0, 1.0, 2.0, 3.0, 3.0].map(|count| count / 20.0);
        for (own, published) in tail(3, 3).iter().zip(published) {
            assert!((own - published).abs() < 1e-12, "{own} {published}");
        }
        // Critical values of U at 5 %, two-sided: 2 for 5 and 5, 23 for 10 and 10, 8 for 8 and 6; none for 3 and 3.
        let critical = |from, to| rank_of_ends(from, to, 0.95).map(|rank| rank - 1);
        assert_eq!(critical(5, 5), Some(2));
        assert_eq!(critical(10, 10), Some(23));
        assert_eq!(critical(8, 6), Some(8));
        assert_eq!(critical(4, 4), Some(0));
        assert_eq!(critical(3, 3), None);
        // As many repetitions as a plan may have.
        let most = tail(100, 100);
        assert!(most.iter().all(|probability| probability.is_finite()));
        assert!((most.iter().sum::<f64>() - 0.5).abs() < 0.01);
    }

    #[test]
    fn two_samples_of_the_same_differ_at_most_as_often_as_promised() {
        for (count, confidence) in [(4, 0.95), (5, 0.95), (5, 0.99), (8, 0.9), (12, 0.95)] {
            let wrong = part(|random| {
                let [a, b] = [0, 1].map(|_| samples::of(random, count, 0.0, 0.05));
                Ranks::new(confidence).shift(&a, &b).unwrap().differs()
            });
            assert!(wrong <= 1.0 - confidence, "{count} repetitions: {wrong}");
        }
    }

    #[test]
    fn outliers_do_not_make_two_samples_of_the_same_differ_more_often() {
        let wrong = part(|random| {
            let [a, b] = [0, 1].map(|_| {
                let mut values = samples::of(random, 5, 0.0, 0.02);
                values.iter_mut().for_each(|value| {
                    if random.number().is_multiple_of(5) {
                        *value += 3.0;
                    }
                });
                values
            });
            Ranks::new(0.95).shift(&a, &b).unwrap().differs()
        });
        assert!(wrong <= 0.05, "{wrong}");
    }

    #[test]
    fn a_fifth_more_is_found_under_a_twentieth_of_noise() {
        let found = part(|random| {
            let a = samples::of(random, 5, 0.0, 0.05);
            let b = samples::of(random, 5, 1.2_f64.ln(), 0.05);
            Ranks::new(0.95).shift(&a, &b).unwrap().differs()
        });
        assert!(found > 0.95, "{found}");
    }

    #[test]
    fn the_interval_holds_the_true_shift_as_often_as_it_says() {
        let held = part(|random| {
            let a = samples::of(random, 6, 1.0, 0.1);
            let b = samples::of(random, 6, 1.25, 0.1);
            let (low, high) = Ranks::new(0.95).shift(&a, &b).unwrap().interval.unwrap();
            (low..=high).contains(&0.25)
        });
        assert!(held >= 0.95, "{held}");
    }

    #[test]
    fn too_few_repetitions_never_differ_and_none_are_no_shift() {
        let shift = Ranks::new(0.95).shift(&[1.0, 1.1], &[9.0, 9.1]).unwrap();
        assert_eq!(shift.interval, None);
        assert!(!shift.differs());
        assert!((shift.middle - 8.0).abs() < 1e-9);
        assert_eq!(Ranks::new(0.95).shift(&[], &[1.0]), None);
    }

    #[test]
    fn equal_values_do_not_differ() {
        let shift = Ranks::new(0.95).shift(&[1.0; 5], &[1.0; 5]).unwrap();
        assert!(!shift.differs());
        assert_eq!(shift.interval, Some((0.0, 0.0)));
    }
}
