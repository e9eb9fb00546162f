//! What epochs of some lengths were measured to cost, and what any other length would.
//!
//! Between two lengths that were measured the cost goes straight from one to the other; beyond them it goes on as it did, but
//! never falls, and never grows faster than the epoch. That is how a guest's dirty pages behave: twice the time never touches
//! more than twice the pages, and never fewer. What noise makes fall is levelled out first.

use crate::cost::Cost;
use crate::goal::{Goal, Reach};
use crate::steering::{Limits, Sample, Steering, WINDOW_EPOCHS};

/// Windows after which steering has settled on a length, if it ever does: from one end of 5 to 200 ms to the other it takes ten.
const SETTLED_WINDOWS: usize = 64;

/// What epochs of one length cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// From one checkpoint to the next, in nanoseconds.
    pub length_ns: f64,
    /// The guest's pause, in nanoseconds.
    pub pause_ns: f64,
    /// Pages that the guest wrote.
    pub dirty_pages: f64,
    /// From the end of the pause until the backup's answer, in nanoseconds.
    pub commit_ns: f64,
    /// How long the slowest of those works on an epoch that work one after another (encoder, link, backup), in nanoseconds.
    pub slowest_ns: f64,
    /// What is sent, in bytes.
    pub wire_bytes: f64,
}

/// What epochs of a length would be like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// What they cost.
    pub epoch: Measured,
    /// The part of the guest's time that they take.
    pub overhead: f64,
    /// How long output is held at the median, in nanoseconds.
    pub held_ns: f64,
    /// What is sent in a second, in bytes.
    pub bytes_a_second: f64,
    /// Whether encoder, link and backup are done with an epoch before the next one comes; otherwise epochs stretch.
    pub keeps_pace: bool,
}

/// What was measured of a guest, by length.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Ascending by length, with no length twice.
    points: Vec<Measured>,
}

type Part = fn(&mut Measured) -> &mut f64;

/// Everything that is a function of the length.
const PARTS: [Part; 5] = [
    |point| &mut point.pause_ns,
    |point| &mut point.dirty_pages,
    |point| &mut point.commit_ns,
    |point| &mut point.slowest_ns,
    |point| &mut point.wire_bytes,
];

impl Profile {
    /// From what was measured, in any order. `None` when there is nothing, when a length is there twice or is not over 0, or
    /// when a figure is no number or below 0.
    pub fn new(mut points: Vec<Measured>) -> Option<Self> {
        points.sort_by(|a, b| a.length_ns.total_cmp(&b.length_ns));
        let good = |number: f64| number.is_finite() && number >= 0.0;
        let sound = points.iter().all(|point| {
            let mut point = *point;
            point.length_ns > 0.0
                && point.length_ns.is_finite()
                && PARTS.iter().all(|part| good(*part(&mut point)))
        });
        let twice = points
            .windows(2)
            .any(|pair| pair[0].length_ns >= pair[1].length_ns);
        if points.is_empty() || twice || !sound {
            return None;
        }
        for part in PARTS {
            let mut values: Vec<f64> = points.iter_mut().map(|point| *part(point)).collect();
            level(&mut values);
            for (point, value) in points.iter_mut().zip(values) {
                *part(point) = value;
            }
        }
        Some(Self { points })
    }

    /// What epochs of this length would cost, where the first write to a page in an epoch costs the guest `fault_ns`.
    ///
    /// # Panics
    /// When the length is not over 0.
    pub fn at(&self, length_ns: f64, fault_ns: f64) -> Prediction {
        assert!(length_ns > 0.0, "an epoch has a length");
        let mut epoch = Measured {
            length_ns,
            ..Measured::default()
        };
        for part in PARTS {
            *part(&mut epoch) = self.part(part, length_ns);
        }
        let cost = Cost::new(
            (epoch.pause_ns + epoch.dirty_pages * fault_ns, 0.0),
            (epoch.pause_ns + epoch.commit_ns, 0.0),
        );
        Prediction {
            epoch,
            overhead: cost.overhead(length_ns),
            held_ns: cost.held_ns(length_ns),
            bytes_a_second: epoch.wire_bytes * 1e9 / length_ns,
            keeps_pace: epoch.slowest_ns <= length_ns,
        }
    }

    /// The length on which [`Steering`] to a goal settles with this guest, in nanoseconds, and whether it reaches the goal.
    pub fn settle(&self, goal: Goal, limits: Limits) -> (f64, Reach) {
        let middle_ns = (limits.least_ns * limits.most_ns).sqrt();
        let mut steering = Steering::new(goal, limits, middle_ns);
        for _ in 0..SETTLED_WINDOWS * WINDOW_EPOCHS {
            let epoch = self.at(steering.length_ns(), limits.fault_ns).epoch;
            // An epoch that what comes after it can't keep up with stretches.
            steering.add(Sample {
                length_ns: epoch.length_ns.max(epoch.slowest_ns),
                pause_ns: epoch.pause_ns,
                dirty_pages: epoch.dirty_pages,
                commit_ns: epoch.commit_ns,
            });
        }
        // Steering stays where it is when it is near; here it costs nothing to go all the way.
        goal.length_ns(steering.cost(), limits.least_ns, limits.most_ns)
    }

    fn part(&self, part: Part, length_ns: f64) -> f64 {
        let value = |point: &Measured| *part(&mut point.clone());
        let last = self.points.len() - 1;
        let after = self.points.iter().position(|point| point.length_ns >= length_ns);
        let (from, to) = match after {
            Some(0) => (0, 1.min(last)),
            Some(after) => (after - 1, after),
            None => (last.saturating_sub(1), last),
        };
        let (from, to) = (&self.points[from], &self.points[to]);
        // Beyond what was measured from the nearest of the two.
        let near = if after == Some(0) { from } else { to };
        let apart_ns = to.length_ns - from.length_ns;
        let slope = if apart_ns > 0.0 {
            (value(to) - value(from)) / apart_ns
        } else {
            0.0
        };
        let slope = match after {
            Some(after) if after > 0 => slope,
            _ => slope.min(value(near) / near.length_ns),
        };
        (value(near) + slope * (length_ns - near.length_ns)).max(0.0)
    }
}

/// The nearest values that never fall: neighbours that do are set to their mean (pool adjacent violators; Ayer and others, "An
/// Empirical Distribution Function for Sampling with Incomplete Information", 1955).
fn level(values: &mut [f64]) {
    let mut pools: Vec<(f64, u32)> = Vec::with_capacity(values.len());
    for value in values.iter() {
        pools.push((*value, 1));
        while let [.., (before, count), (after, more)] = pools[..]
            && before > after
        {
            let both = count + more;
            let mean = (before * f64::from(count) + after * f64::from(more)) / f64::from(both);
            pools.truncate(pools.len() - 2);
            pools.push((mean, both));
        }
    }
    let levelled = pools
        .into_iter()
        .flat_map(|(mean, count)| (0..count).map(move |_| mean));
    for (value, level) in values.iter_mut().zip(levelled) {
        *value = level;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: f64 = 1e6;

    fn measured(length_ms: f64, pause_ms: f64, pages: f64) -> Measured {
        Measured {
            length_ns: length_ms * MS,
            pause_ns: pause_ms * MS,
            dirty_pages: pages,
            commit_ns: 2.0 * MS,
            slowest_ns: 0.5 * MS,
            wire_bytes: pages * 100.0,
        }
    }

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() <= 1e-6 * right.abs().max(1.0)
    }

    #[test]
    fn what_was_measured_is_predicted_and_between_two_lengths_what_lies_between() {
        let profile = Profile::new(vec![measured(50.0, 2.0, 500.0), measured(10.0, 1.0, 100.0)]).unwrap();
        let at = |ms: f64| profile.at(ms * MS, 2000.0);
        assert!(near(at(10.0).epoch.pause_ns, MS) && near(at(50.0).epoch.dirty_pages, 500.0));
        assert!(near(at(30.0).epoch.dirty_pages, 300.0), "{:?}", at(30.0));
        assert!(near(at(10.0).overhead, 0.12), "{:?}", at(10.0));
        assert!(near(at(10.0).held_ns, 8.0 * MS));
        assert!(near(at(10.0).bytes_a_second, 1e6));
        assert!(at(1.0).keeps_pace && !at(0.4).keeps_pace);
    }

    #[test]
    fn beyond_what_was_measured_nothing_falls_below_0_or_grows_faster_than_the_epoch() {
        let steep = Profile::new(vec![measured(10.0, 1.0, 10.0), measured(20.0, 4.0, 400.0)]).unwrap();
        assert!(near(steep.at(5.0 * MS, 0.0).epoch.dirty_pages, 5.0));
        assert!(near(steep.at(40.0 * MS, 0.0).epoch.dirty_pages, 800.0));
        let flat = Profile::new(vec![measured(10.0, 1.0, 100.0), measured(20.0, 1.0, 100.0)]).unwrap();
        for ms in [1.0, 5.0, 15.0, 200.0] {
            assert!(near(flat.at(ms * MS, 0.0).epoch.dirty_pages, 100.0));
        }
        let one = Profile::new(vec![measured(10.0, 1.0, 100.0)]).unwrap();
        assert!(near(one.at(200.0 * MS, 0.0).epoch.dirty_pages, 100.0));
    }

    #[test]
    fn noise_never_makes_a_longer_epoch_cheaper() {
        let lengths = [(10.0, 3.0), (20.0, 1.0), (30.0, 2.0), (40.0, 6.0), (50.0, 5.0)];
        let points = lengths.map(|(length, pause)| measured(length, pause, 10.0));
        let profile = Profile::new(points.to_vec()).unwrap();
        let pauses: Vec<f64> = lengths
            .iter()
            .map(|(length, _)| profile.at(length * MS, 0.0).epoch.pause_ns / MS)
            .collect();
        assert!(
            pauses
                .iter()
                .zip([2.0, 2.0, 2.0, 5.5, 5.5])
                .all(|(pause, level)| near(*pause, level)),
            "{pauses:?}"
        );
    }

    #[test]
    fn what_is_no_measurement_is_no_profile() {
        let good = measured(10.0, 1.0, 10.0);
        assert_eq!(Profile::new(Vec::new()), None);
        assert_eq!(Profile::new(vec![good, good]), None);
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            assert_eq!(
                Profile::new(vec![Measured {
                    pause_ns: bad,
                    ..good
                }]),
                None
            );
            assert_eq!(
                Profile::new(vec![Measured {
                    length_ns: bad,
                    ..good
                }]),
                None
            );
        }
        assert_eq!(
            Profile::new(vec![Measured {
                length_ns: 0.0,
                ..good
            }]),
            None
        );
    }

    #[test]
    fn steering_settles_where_the_profile_reaches_the_goal() {
        let points = [5.0, 25.0, 200.0].map(|ms: f64| measured(ms, 1.0 + ms / 100.0, 10.0 * ms.sqrt()));
        let profile = Profile::new(points.to_vec()).unwrap();
        let limits = Limits {
            least_ns: 5.0 * MS,
            most_ns: 200.0 * MS,
            fault_ns: 2000.0,
        };
        let (length_ns, reach) = profile.settle(Goal::Latency { held_ns: 10.0 * MS }, limits);
        assert_eq!(reach, Reach::Reached);
        let held_ns = profile.at(length_ns, limits.fault_ns).held_ns;
        assert!((held_ns - 10.0 * MS).abs() < 0.3 * MS, "{length_ns} {held_ns}");
        let (length_ns, reach) = profile.settle(Goal::Overhead { ratio: 0.05 }, limits);
        assert_eq!(reach, Reach::Reached);
        let overhead = profile.at(length_ns, limits.fault_ns).overhead;
        assert!((overhead - 0.05).abs() < 0.003, "{length_ns} {overhead}");
        let (_, reach) = profile.settle(Goal::Latency { held_ns: 4.0 * MS }, limits);
        assert_eq!(reach, Reach::OutOfReach);
    }
}
