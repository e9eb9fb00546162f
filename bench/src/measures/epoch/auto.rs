//! `epoch.auto`: how long `epochs.length = "auto"` takes to follow a load that changes at a stroke, and where it goes meanwhile.

use std::time::{Duration, Instant};

use serde::Deserialize;

use super::stand::{Stand, number};
use super::task::{Machine, Task};
use super::{SETTLE, repetitions, scaled};
use crate::measures::kvm::dirty_problem;
use crate::measures::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Effort, Finding, Run, Unable};
use crate::series::{Series, SeriesLine};
use crate::stats::Figure;

/// How often the length is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A guest that is not protected for so long, all in all, won't be.
const LOST_MAX: Duration = Duration::from_secs(30);
/// A length so near to where it stays has arrived.
const NEAR: f64 = 0.15;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Auto {
    /// What epochs are steered to: keys of the replicator's `[epochs.auto]`; each a row.
    #[serde(default = "goals")]
    goals: Vec<String>,
    /// What the guest writes, one after the other.
    #[serde(default = "loads")]
    loads: Vec<String>,
    /// For how long each.
    #[serde(default = "phase_ms")]
    phase_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
}

fn goals() -> Vec<String> {
    ["overhead_percent = 10", "latency = \"15ms\""]
        .map(str::to_owned)
        .to_vec()
}

fn loads() -> Vec<String> {
    [
        "random/counter:100:25:8",
        "random/counter:2000:25:32",
        "random/counter:100:25:8",
    ]
    .map(str::to_owned)
    .to_vec()
}

const fn phase_ms() -> u32 {
    12_000
}

const fn memory_mib() -> u32 {
    128
}

/// With one load.
#[derive(Clone, Debug, PartialEq)]
struct Phase {
    load: String,
    /// Seconds since the first phase began, and the length in milliseconds.
    points: Vec<(f64, f64)>,
    /// What the replicator said at its end.
    reached: Option<bool>,
    /// Looks at which the guest was not protected: there was no length then.
    unprotected: u32,
}

impl Phase {
    /// With this load, for so long.
    fn watch(stand: &Stand, load: &str, length: Duration, begun: Instant) -> Result<Self, Unable> {
        let (mut phase, started) = (Self::of(load), Instant::now());
        while started.elapsed() < length || phase.points.len() < 3 {
            let status = stand.status()?;
            if status["state"] == "protected" {
                let length_ms = number(&status["epoch_ms"])?;
                phase.points.push((begun.elapsed().as_secs_f64(), length_ms));
                phase.reached = status["epoch_goal_reached"].as_bool();
            } else {
                phase.unprotected += 1;
                if phase.unprotected * LOOK_EVERY > LOST_MAX {
                    return Err(Unable::Wrong(format!("the guest is not protected: {status}")));
                }
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(phase)
    }

    fn of(load: &str) -> Self {
        Self {
            load: load.to_owned(),
            points: Vec::new(),
            reached: None,
            unprotected: 0,
        }
    }

    /// Where it stays: the median of its last third, in milliseconds.
    fn settled_ms(&self) -> Option<f64> {
        let last = &self.points[self.points.len() * 2 / 3..];
        Figure::of(&last.iter().map(|(_, ms)| *ms).collect::<Vec<_>>()).map(|figure| figure.p50)
    }

    /// From its first look to its last.
    fn took_s(&self) -> f64 {
        let ends = self.points.first().zip(self.points.last());
        ends.map_or(0.0, |((first_s, _), (last_s, _))| last_s - first_s)
    }

    /// Seconds from its beginning until the length stays near to where it then is.
    fn settling_s(&self) -> Option<f64> {
        let settled_ms = self.settled_ms()?;
        let (begun_s, _) = self.points.first()?;
        let away = |(_, ms): &&(f64, f64)| (ms - settled_ms).abs() > NEAR * settled_ms;
        // The look after the last one that was not near.
        let next = self
            .points
            .iter()
            .rposition(|point| away(&point))
            .map_or(0, |place| place + 1);
        let (arrived_s, _) = self.points.get(next)?;
        Some(arrived_s - begun_s)
    }
}

impl Auto {
    /// One run through all loads.
    fn phases(&self, run: &Run, goal: &str) -> Result<Vec<Phase>, Unable> {
        let machine = Machine {
            memory_mib: self.memory_mib,
            vcpus: 1,
            task: Task::Dirty(self.loads[0].clone()),
        };
        let mut stand = Stand::raise(&machine, run.seed())?;
        stand.protect(&format!("[epochs]\nlength = \"auto\"\n[epochs.auto]\n{goal}\n"))?;
        std::thread::sleep(SETTLE);
        let begun = Instant::now();
        let mut phases = Vec::new();
        for load in &self.loads {
            stand.write(load)?;
            phases.push(Phase::watch(&stand, load, scaled(run, self.phase_ms), begun)?);
        }
        stand.unprotect()?;
        Ok(phases)
    }

    fn one(&self, run: &mut Run, goal: &str) -> Result<(), Unable> {
        let (mut values, mut last) = (Vec::new(), Vec::new());
        for repetition in 0..repetitions(run) {
            run.tell(format!("{goal}, {} of {}", repetition + 1, repetitions(run)));
            last = self.phases(run, goal)?;
            // The first phase is where protection begins; each further one is a step.
            let steps = last.get(1..).filter(|steps| !steps.is_empty()).unwrap_or(&last);
            let slowest = steps
                .iter()
                .map(|step| step.settling_s().unwrap_or(step.took_s()));
            values.push(slowest.fold(0.0, f64::max));
        }
        let case = goal.replace(['"', ' '], "").replace('=', "-");
        let at: [(&str, Parameter); 2] = [
            ("goal", goal.into()),
            ("phase_ms", Parameter::Whole(self.phase_ms.into())),
        ];
        let value = Figure::of(&values);
        let finding = Finding {
            case: case.clone(),
            unit: "s",
            value: value.ok_or_else(|| Unable::Wrong("it is no number".to_owned()))?,
            reference: None,
            note: Some(describe(&last)),
        };
        run.found_at(at, finding);
        run.went(&case, series(&last));
        Ok(())
    }
}

fn describe(phases: &[Phase]) -> String {
    let one = |phase: &Phase| {
        format!(
            "{}: {:.1} ms{}, {}{}",
            phase.load,
            phase.settled_ms().unwrap_or_default(),
            match phase.reached {
                Some(true) => ", goal reached",
                Some(false) => ", goal out of reach",
                None => "",
            },
            match phase.settling_s() {
                Some(seconds) => format!("there after {seconds:.1} s"),
                None => "not there at the end".to_owned(),
            },
            match phase.unprotected {
                0 => String::new(),
                looks => format!(
                    ", not protected for {:.1} s",
                    f64::from(looks) * LOOK_EVERY.as_secs_f64()
                ),
            }
        )
    };
    let all: Vec<String> = phases.iter().map(one).collect();
    format!("the slowest step; {}", all.join("; "))
}

fn series(phases: &[Phase]) -> Series {
    Series {
        across: "time_s".to_owned(),
        unit: "ms".to_owned(),
        lines: phases
            .iter()
            .enumerate()
            .map(|(number, phase)| SeriesLine {
                label: format!("{}. {}", number + 1, phase.load),
                points: phase.points.clone(),
            })
            .collect(),
    }
}

impl Measure for Auto {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let goals = match run.effort() {
            Effort::Shortest => &self.goals[..1],
            _ => &self.goals[..],
        };
        for goal in goals {
            self.one(run, goal)?;
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        if self.goals.is_empty() || self.loads.is_empty() || self.loads.len() > crate::series::LINES_MAX {
            return Some(format!(
                "goals and loads need a value each, and there are at most {} loads",
                crate::series::LINES_MAX
            ));
        }
        self.loads
            .iter()
            .find_map(|load| dirty_problem(load))
            .or_else(|| {
                self.goals.iter().find_map(|goal| {
                    let wrong = toml::from_str::<romulus_config::AutoEpochs>(goal).err()?;
                    Some(format!("goals = {goal:?}: {}", wrong.message()))
                })
            })
            .or_else(|| outside("phase_ms", self.phase_ms.into(), 1000, 120_000))
            .or_else(|| outside("memory_mib", self.memory_mib.into(), 64, 1024))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(lengths: &[f64]) -> Phase {
        Phase {
            points: (0..).map(f64::from).zip(lengths.iter().copied()).collect(),
            reached: Some(true),
            ..Phase::of("random:1:25")
        }
    }

    #[test]
    fn a_length_has_arrived_when_it_stays_near_to_where_it_ends() {
        let stepped = phase(&[25.0, 40.0, 52.0, 48.0, 80.0, 51.0, 50.0, 49.0, 50.0]);
        assert_eq!(stepped.settled_ms(), Some(50.0));
        assert_eq!(stepped.settling_s(), Some(5.0));
        assert_eq!(phase(&[25.0; 9]).settling_s(), Some(0.0));
        // One that still goes at its end never arrived.
        assert_eq!(phase(&[25.0, 25.0, 25.0, 25.0, 25.0, 90.0]).settling_s(), None);
        assert_eq!(phase(&[]).settling_s(), None);
    }

    #[test]
    fn protection_that_was_lost_for_a_while_is_told() {
        let mut lost = phase(&[25.0; 9]);
        assert!(!describe(std::slice::from_ref(&lost)).contains("not protected"));
        lost.unprotected = 12;
        assert!(describe(&[lost]).ends_with(", not protected for 1.2 s"));
    }

    #[test]
    fn a_goal_that_the_replicator_does_not_know_is_said_before() {
        let auto = |text: &str| toml::from_str::<Auto>(text).unwrap().problem();
        assert_eq!(auto(""), None);
        assert!(auto("goals = ['speed = 3']").is_some());
        assert!(auto("loads = ['x']").is_some());
        assert!(auto("loads = []").is_some());
    }
}
