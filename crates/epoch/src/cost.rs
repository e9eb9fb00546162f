//! What an epoch costs, as a function of its length.

/// Two lines over the length of an epoch: what is fixed for each epoch, in nanoseconds, and what grows with its length, as a
/// part of it. Neither is below 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Taken from the guest: the pause, and the faults of its first writes to pages.
    taken: Line,
    /// From the end of an epoch until its output leaves: pause and commit.
    delay: Line,
}

/// `fixed + growth * length`, fitted to points that come one by one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Line {
    fixed: f64,
    growth: f64,
    last: Option<(f64, f64)>,
}

/// Lengths that differ by less tell nothing of growth that noise does not drown.
const APART: f64 = 0.1;
/// How much a new slope counts against what was known.
const NEW_SLOPE: f64 = 0.5;

impl Cost {
    /// A cost that is known: (fixed in nanoseconds, growth) of what is taken from the guest, and of the delay of its output.
    pub fn new(taken: (f64, f64), delay: (f64, f64)) -> Self {
        let line = |(fixed, growth)| Line {
            fixed,
            growth,
            last: None,
        };
        Self {
            taken: line(taken),
            delay: line(delay),
        }
    }

    /// What is taken from the guest in an epoch: fixed nanoseconds, and growth.
    pub fn taken(&self) -> (f64, f64) {
        (self.taken.fixed, self.taken.growth)
    }

    /// From the end of an epoch until its output leaves: fixed nanoseconds, and growth.
    pub fn delay(&self) -> (f64, f64) {
        (self.delay.fixed, self.delay.growth)
    }

    /// The part of the guest's time that protection takes with epochs of this length.
    pub fn overhead(&self, length_ns: f64) -> f64 {
        self.taken.at(length_ns) / length_ns
    }

    /// How long output is held at the median with epochs of this length, in nanoseconds.
    pub fn held_ns(&self, length_ns: f64) -> f64 {
        length_ns / 2.0 + self.delay.at(length_ns)
    }

    /// Epochs of this length cost so much.
    pub(crate) fn learn(&mut self, length_ns: f64, taken_ns: f64, delay_ns: f64) {
        self.taken.learn(length_ns, taken_ns);
        self.delay.learn(length_ns, delay_ns);
    }
}

impl Line {
    fn at(&self, length_ns: f64) -> f64 {
        self.fixed + self.growth * length_ns
    }

    /// The line goes through the newest point. Its slope comes from points whose lengths are apart; while the length stays, a
    /// change is the load's, and the slope stays.
    fn learn(&mut self, length_ns: f64, cost_ns: f64) {
        if let Some((last_length_ns, last_cost_ns)) = self.last {
            let apart_ns = length_ns - last_length_ns;
            if apart_ns.abs() > APART * last_length_ns {
                let slope = (cost_ns - last_cost_ns) / apart_ns;
                self.growth += NEW_SLOPE * (slope.max(0.0) - self.growth);
            }
        }
        self.growth = self.growth.clamp(0.0, cost_ns / length_ns);
        self.fixed = cost_ns - self.growth * length_ns;
        self.last = Some((length_ns, cost_ns));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_from_points_that_are_apart() {
        let mut line = Line::default();
        for step in 0..12 {
            let length = if step % 2 == 0 { 10.0 } else { 20.0 };
            line.learn(length, 3.0 + 0.25 * length);
        }
        assert!((line.growth - 0.25).abs() < 0.01, "{line:?}");
        assert!((line.at(40.0) - 13.0).abs() < 0.3, "{line:?}");
    }

    #[test]
    fn a_load_that_grows_at_one_length_does_not_bend_the_line() {
        let mut line = Line::default();
        line.learn(10.0, 1.0);
        line.learn(20.0, 2.0);
        let growth = line.growth;
        line.learn(20.0, 6.0);
        assert_eq!(line.growth, growth);
        assert_eq!(line.at(20.0), 6.0);
    }

    #[test]
    fn noise_never_makes_a_longer_epoch_cheaper_than_a_shorter_one() {
        let mut line = Line::default();
        line.learn(10.0, 5.0);
        line.learn(20.0, 1.0);
        assert!(line.growth >= 0.0 && line.fixed >= 0.0, "{line:?}");
    }
}
