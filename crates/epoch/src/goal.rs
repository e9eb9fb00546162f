//! What an operator wants of epochs.

use crate::cost::Cost;

/// What steering is to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// The guest's output is held for at most so long at the median, in nanoseconds.
    Latency {
        /// The median.
        held_ns: f64,
    },
    /// Protection takes at most this part of the guest's time.
    Overhead {
        /// 0.1 is a tenth.
        ratio: f64,
    },
}

/// Whether a goal can be reached by the length of epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// With this length, or one near it.
    Reached,
    /// Not with any length that is allowed: this is the best one.
    OutOfReach,
}

impl Goal {
    /// The length that reaches the goal at this cost, within `least_ns` and `most_ns`, in nanoseconds.
    pub fn length_ns(&self, cost: &Cost, least_ns: f64, most_ns: f64) -> (f64, Reach) {
        match *self {
            // Output waits for half an epoch at the median, then for the pause and the commit of its checkpoint.
            Self::Latency { held_ns } => {
                let (fixed, growth) = cost.delay();
                let wanted = (held_ns - fixed) / (0.5 + growth);
                within(wanted, least_ns, most_ns, wanted >= least_ns)
            }
            Self::Overhead { ratio } => {
                let (fixed, growth) = cost.taken();
                let room = ratio - growth;
                if room > 0.0 && fixed / room <= most_ns {
                    return within(fixed / room, least_ns, most_ns, true);
                }
                // What grows with the epoch can't be saved by a longer one: a tenth above it is near enough.
                let near = if growth > 0.0 {
                    fixed / (0.1 * growth)
                } else {
                    most_ns
                };
                within(near, least_ns, most_ns, false)
            }
        }
    }
}

fn within(wanted_ns: f64, least_ns: f64, most_ns: f64, reached: bool) -> (f64, Reach) {
    let reach = if reached {
        Reach::Reached
    } else {
        Reach::OutOfReach
    };
    (wanted_ns.clamp(least_ns, most_ns), reach)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: f64 = 1e6;

    #[test]
    fn a_latency_goal_leaves_room_for_pause_and_commit() {
        let cost = Cost::new((MS, 0.0), (2.0 * MS, 0.0));
        let goal = Goal::Latency { held_ns: 10.0 * MS };
        assert_eq!(goal.length_ns(&cost, MS, 200.0 * MS), (16.0 * MS, Reach::Reached));
        let goal = Goal::Latency { held_ns: 2.1 * MS };
        assert_eq!(goal.length_ns(&cost, MS, 200.0 * MS), (MS, Reach::OutOfReach));
    }

    #[test]
    fn an_overhead_goal_spreads_what_does_not_grow_with_the_epoch() {
        let cost = Cost::new((MS, 0.05), (MS, 0.0));
        let goal = Goal::Overhead { ratio: 0.1 };
        let (length, reach) = goal.length_ns(&cost, MS, 200.0 * MS);
        assert!((length - 20.0 * MS).abs() < 1.0, "{length}");
        assert_eq!(reach, Reach::Reached);
    }

    #[test]
    fn an_overhead_that_grows_with_the_epoch_is_not_chased_to_the_longest_one() {
        let cost = Cost::new((MS, 0.2), (MS, 0.0));
        let goal = Goal::Overhead { ratio: 0.1 };
        let (length, reach) = goal.length_ns(&cost, MS, 200.0 * MS);
        assert!((length - 50.0 * MS).abs() < 1.0, "{length}");
        assert_eq!(reach, Reach::OutOfReach);
    }
}
