//! `epochs.length = "auto"`: what each epoch cost, from its capture to its commit, and the length that follows from it.

use std::time::Duration;

use romulus_config::{EpochGoal, EpochLength, Epochs};
use romulus_epoch::{Goal, Limits, Reach, Sample, Steering};
use romulus_types::Time;

/// What a capture says of its epoch.
#[derive(Clone, Copy, Debug)]
pub struct EpochFigures {
    /// From the capture before to this one, in nanoseconds; 0 for one that is no measure: the first of a session, and an idle guest's,
    /// whose length is not the one that was set.
    pub interval_ns: u64,
    /// The guest's pause, in nanoseconds.
    pub pause_ns: u64,
    /// Pages that the guest wrote.
    pub dirty_pages: u64,
}

/// Steers the length of epochs, where that is wanted.
pub struct Tuner {
    steering: Option<Steering>,
}

impl Tuner {
    /// As the settings have it.
    pub fn new(epochs: &Epochs) -> Self {
        let steering = (epochs.length == EpochLength::Auto).then(|| {
            let auto = &epochs.auto;
            let goal = match auto.goal() {
                EpochGoal::Latency(held) => Goal::Latency { held_ns: float(held) },
                EpochGoal::OverheadPercent(percent) => Goal::Overhead {
                    ratio: f64::from(percent) / 100.0,
                },
            };
            let limits = Limits {
                least_ns: float(auto.length_min),
                most_ns: float(auto.length_max),
                fault_ns: float(auto.fault_cost),
            };
            Steering::new(goal, limits, float(epochs.first_length()))
        });
        Self { steering }
    }

    /// Another session begins: its first epochs are no measure.
    pub fn interrupt(&mut self) {
        if let Some(steering) = &mut self.steering {
            steering.interrupt();
        }
    }

    /// An epoch that was captured at `captured` is committed at `now`. Where it ends a window, the length from now on in
    /// nanoseconds, and whether the goal can be reached.
    pub fn committed(&mut self, figures: EpochFigures, captured: Time, now: Time) -> Option<(u64, Reach)> {
        let steering = self.steering.as_mut()?;
        if figures.interval_ns == 0 {
            return None;
        }
        let ended = steering.add(Sample {
            length_ns: lossy(figures.interval_ns),
            pause_ns: lossy(figures.pause_ns),
            dirty_pages: lossy(figures.dirty_pages),
            commit_ns: lossy(now.since_ns(captured)),
        });
        ended.then(|| (whole(steering.length_ns()), steering.reach()))
    }
}

fn float(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e9
}

#[expect(clippy::cast_precision_loss, reason = "53 bits of nanoseconds are 104 days")]
fn lossy(number: u64) -> f64 {
    number as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a length within the limits of the settings"
)]
fn whole(length_ns: f64) -> u64 {
    length_ns as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn after_windows(epochs: &Epochs, pause_ns: u64) -> Option<u64> {
        let mut tuner = Tuner::new(epochs);
        let mut length_ns = 25 * MS;
        let mut last = None;
        for _ in 0..400 {
            let figures = EpochFigures {
                interval_ns: length_ns,
                pause_ns,
                dirty_pages: 0,
            };
            if let Some((changed_ns, _)) =
                tuner.committed(figures, Time::default(), Time::default().after_ns(2 * MS))
            {
                (length_ns, last) = (changed_ns, Some(changed_ns));
            }
        }
        last
    }

    #[test]
    fn a_fixed_length_is_never_changed() {
        assert_eq!(after_windows(&Epochs::default(), 5 * MS), None);
    }

    #[test]
    fn automatic_epochs_get_to_their_goal() {
        let mut epochs = Epochs {
            length: EpochLength::Auto,
            ..Epochs::default()
        };
        let length_ns = after_windows(&epochs, 4 * MS).unwrap();
        assert!(
            (37 * MS..44 * MS).contains(&length_ns),
            "10 % of 40 ms: {length_ns}"
        );
        epochs.auto.latency = Some(Duration::from_millis(13));
        let length_ns = after_windows(&epochs, MS).unwrap();
        assert!(
            (18 * MS..22 * MS).contains(&length_ns),
            "2 (13 - 1 - 2) ms: {length_ns}"
        );
    }
}
