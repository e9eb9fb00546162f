//! Where a new number is to be expected after some others of the same kind.

/// Between which numbers one more of a normal distribution lies, with this confidence, after these. `None` with fewer than two.
pub(super) fn expected(before: &[f64], confidence: f64) -> Option<(f64, f64)> {
    let count = float(before.len());
    if before.len() < 2 {
        return None;
    }
    let mean = before.iter().sum::<f64>() / count;
    let squares: f64 = before.iter().map(|number| (number - mean).powi(2)).sum();
    let deviation = (squares / (count - 1.0)).sqrt();
    let reach = student(before.len() - 1, confidence) * deviation * (1.0 + 1.0 / count).sqrt();
    Some((mean - reach, mean + reach))
}

/// The part of Student's distribution within ±t (Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 26.7.3 and
/// 26.7.4).
fn within(t: f64, freedom: usize) -> f64 {
    let angle = (t / float(freedom).sqrt()).atan();
    let (sine, cosine) = angle.sin_cos();
    let odd = !freedom.is_multiple_of(2);
    let mut term = if odd { cosine } else { 1.0 };
    let mut sum = 0.0;
    for step in 0..freedom / 2 {
        sum += term;
        let step = 2 * step + 1;
        let factor = if odd {
            float(step + 1) / float(step + 2)
        } else {
            float(step) / float(step + 1)
        };
        term *= factor * cosine * cosine;
    }
    if odd {
        std::f64::consts::FRAC_2_PI * (angle + sine * sum)
    } else {
        sine * sum
    }
}

/// The t within whose reach this part of the distribution is.
fn student(freedom: usize, part: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while within(high, freedom) < part && high < 1e9 {
        high *= 2.0;
    }
    // Halved until nothing is left of the numbers' digits.
    for _ in 0..64 {
        let middle = f64::midpoint(low, high);
        if within(middle, freedom) < part {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

fn float(number: usize) -> f64 {
    crate::stats::float(number as u64)
}

#[cfg(test)]
mod tests {
    use romulus_guest_core::random::Random;

    use super::*;
    use crate::compare::ranks::samples;

    #[test]
    fn students_t_is_that_of_the_tables() {
        for (freedom, part, table) in [
            (1, 0.95, 12.706),
            (2, 0.95, 4.303),
            (3, 0.99, 5.841),
            (4, 0.99, 4.604),
            (9, 0.99, 3.250),
            (10, 0.95, 2.228),
            (29, 0.95, 2.045),
        ] {
            let own = student(freedom, part);
            assert!((own - table).abs() < 0.001, "{freedom} {part}: {own}");
        }
    }

    #[test]
    fn one_more_of_the_same_is_outside_no_more_often_than_promised() {
        let mut random = Random::new(3);
        for count in [3, 5, 20] {
            let trials = 4000;
            let outside = (0..trials)
                .filter(|_| {
                    let before = samples::of(&mut random, count, 0.0, 0.05);
                    let (low, high) = expected(&before, 0.99).unwrap();
                    !(low..=high).contains(&samples::normal(&mut random, 0.05))
                })
                .count();
            // One in a hundred, and what chance adds to that in so many trials.
            assert!(outside <= trials / 100 + 25, "{count}: {outside}");
        }
    }

    #[test]
    fn one_number_says_nothing_of_the_next() {
        assert_eq!(expected(&[1.0], 0.99), None);
    }
}
