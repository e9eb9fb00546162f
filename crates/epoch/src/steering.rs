//! The controller: from what epochs cost to the length of the next ones.

use crate::cost::Cost;
use crate::goal::{Goal, Reach};

/// Epochs whose median is one point: at 25 ms, half a second.
pub const WINDOW_EPOCHS: usize = 20;
/// A length this near to what is wanted stays.
const DEAD_BAND: f64 = 0.05;
/// The part of the way that one window goes…
const STEP: f64 = 0.6;
/// …and at most by this factor.
const STEP_MAX: f64 = 2.0;

/// What one epoch was like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// From the checkpoint before to this one, in nanoseconds.
    pub length_ns: f64,
    /// The guest's pause, in nanoseconds.
    pub pause_ns: f64,
    /// Pages that the guest wrote.
    pub dirty_pages: f64,
    /// From the end of the pause until the backup's answer, in nanoseconds.
    pub commit_ns: f64,
}

/// Within which the length is steered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Shortest epoch, in nanoseconds.
    pub least_ns: f64,
    /// Longest epoch, in nanoseconds.
    pub most_ns: f64,
    /// What the guest's first write to a page in an epoch costs it, in nanoseconds: with most kinds of tracking, a fault.
    pub fault_ns: f64,
}

/// Steers the length of epochs to a goal.
#[derive(Clone, Debug)]
pub struct Steering {
    goal: Goal,
    limits: Limits,
    length_ns: f64,
    cost: Cost,
    reach: Reach,
    window: Vec<Sample>,
}

impl Steering {
    /// Begins with this length, in nanoseconds.
    ///
    /// # Panics
    /// When the limits are not in order or not over 0.
    pub fn new(goal: Goal, limits: Limits, begin_ns: f64) -> Self {
        assert!(
            0.0 < limits.least_ns && limits.least_ns <= limits.most_ns && limits.fault_ns >= 0.0,
            "limits are in order"
        );
        Self {
            goal,
            limits,
            length_ns: begin_ns.clamp(limits.least_ns, limits.most_ns),
            cost: Cost::default(),
            reach: Reach::Reached,
            window: Vec::with_capacity(WINDOW_EPOCHS),
        }
    }

    /// The length of the next epochs, in nanoseconds.
    pub fn length_ns(&self) -> f64 {
        self.length_ns
    }

    /// Whether the goal can be reached, as far as is known.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// What epochs cost, as far as is known.
    pub fn cost(&self) -> &Cost {
        &self.cost
    }

    /// An epoch has been committed. True when it ends a window: length and reach are new then, if not other ones.
    pub fn add(&mut self, sample: Sample) -> bool {
        let whole = [
            sample.length_ns,
            sample.pause_ns,
            sample.dirty_pages,
            sample.commit_ns,
        ];
        if whole.iter().any(|part| !part.is_finite() || *part < 0.0) || sample.length_ns == 0.0 {
            return false;
        }
        self.window.push(sample);
        if self.window.len() < WINDOW_EPOCHS {
            return false;
        }
        self.learn();
        self.window.clear();
        self.step();
        true
    }

    /// Forgets a window that has begun: what follows is another session, or the guest stood still.
    pub fn interrupt(&mut self) {
        self.window.clear();
    }

    fn learn(&mut self) {
        let median = |of: fn(&Sample) -> f64| {
            let mut values: Vec<f64> = self.window.iter().map(of).collect();
            values.sort_unstable_by(f64::total_cmp);
            values[values.len() / 2]
        };
        // Epochs that had to stretch are longer than they should be: what they cost belongs to that length.
        let length_ns = median(|sample| sample.length_ns);
        let pause_ns = median(|sample| sample.pause_ns);
        let faults_ns = median(|sample| sample.dirty_pages) * self.limits.fault_ns;
        let commit_ns = median(|sample| sample.commit_ns);
        self.cost
            .learn(length_ns, pause_ns + faults_ns, pause_ns + commit_ns);
    }

    fn step(&mut self) {
        let Limits {
            least_ns, most_ns, ..
        } = self.limits;
        let (wanted_ns, reach) = self.goal.length_ns(&self.cost, least_ns, most_ns);
        self.reach = reach;
        if (wanted_ns - self.length_ns).abs() <= DEAD_BAND * self.length_ns {
            return;
        }
        let stepped_ns = self.length_ns + STEP * (wanted_ns - self.length_ns);
        self.length_ns = stepped_ns
            .clamp(self.length_ns / STEP_MAX, self.length_ns * STEP_MAX)
            .clamp(least_ns, most_ns);
    }
}
