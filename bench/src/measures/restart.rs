//! `host.restart`, `host.resent` and `host.pause`: the agent in its systemd unit, restarted and killed while many VMs are protected to it.
//!
//! It runs in a container with a real systemd (`cargo xtask setup` makes its tree), with the unit that the package has; the guests are
//! those of `host.*`. Each strike is also a check: a VM that is not protected again, a guest that stands still or a commit that is
//! gone makes the measure fail.

use std::sync::{Mutex, PoisonError};

use romulus_e2e::Paths;
use romulus_e2e::restarts::{Outcome, Restarts, RestartsConfig, Strike};
use serde::Deserialize;

use super::host::{LAB, figure};
use super::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable};
use crate::stats::Figure;

/// Settings of all of them.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Common {
    /// VMs on the agent.
    #[serde(default = "eight")]
    vms: u16,
    /// Memory of each guest in MiB.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    /// What each guest writes.
    #[serde(default = "dirty")]
    dirty: String,
}

const fn eight() -> u16 {
    8
}

const fn memory_mib() -> u32 {
    64
}

fn dirty() -> String {
    RestartsConfig::default().dirty
}

impl Common {
    fn problem(&self) -> Option<String> {
        outside("vms", self.vms.into(), 1, 64)
            .or_else(|| outside("memory_mib", self.memory_mib.into(), 64, 1024))
            .or_else(|| super::kvm::dirty_problem(&self.dirty))
    }

    fn parameters(&self) -> [(&'static str, Parameter); 3] {
        [
            ("vms", self.vms.into()),
            ("memory_mib", self.memory_mib.into()),
            ("dirty", self.dirty.as_str().into()),
        ]
    }

    /// What followed each strike. Measures that ask for the same one after the other share one run.
    fn outcomes(&self, run: &Run) -> Result<[Vec<Outcome>; 2], Unable> {
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, outcomes)) = last.as_ref().filter(|(done, _)| done == self) {
            return Ok(outcomes.clone());
        }
        let outcomes = self.strike(run)?;
        *last = Some((self.clone(), outcomes.clone()));
        Ok(outcomes)
    }

    /// Reports a finding for each kind of strike, made of its case and of what followed.
    fn tell(
        &self,
        run: &mut Run,
        finding: impl Fn(String, &[Outcome]) -> Result<Finding, Unable>,
    ) -> Result<(), Unable> {
        for (case, outcomes) in CASES.into_iter().zip(self.outcomes(run)?) {
            run.found_at(self.parameters(), finding(case.to_owned(), &outcomes)?);
        }
        Ok(())
    }

    /// Raises the lab and strikes: as many restarts, and as many kills, as there are repetitions.
    fn strike(&self, run: &Run) -> Result<[Vec<Outcome>; 2], Unable> {
        let config = RestartsConfig {
            vms: self.vms,
            memory_mib: self.memory_mib,
            dirty: self.dirty.clone(),
            ..RestartsConfig::default()
        };
        run.say(format!("starting {} VMs and an agent under systemd", self.vms));
        let raised = Restarts::raise(&Paths::here(), LAB, &config);
        let mut restarts = raised.map_err(Unable::failed("raising the lab"))?;
        let mut outcomes = [Vec::new(), Vec::new()];
        for _ in 0..run.repetitions() {
            for (list, strike) in outcomes.iter_mut().zip(STRIKES) {
                run.say(format!("{strike:?}"));
                let outcome = restarts.strike(strike);
                list.push(outcome.map_err(Unable::failed("restarting the agent"))?);
            }
        }
        Ok(outcomes)
    }
}

/// What followed last, and under which settings.
static LAST: Mutex<Option<(Common, [Vec<Outcome>; 2])>> = Mutex::new(None);

const STRIKES: [Strike; 2] = [Strike::Restart, Strike::Kill];
const CASES: [&str; 2] = ["restart", "kill"];

fn each(outcomes: &[Outcome], value: impl Fn(&Outcome) -> f64) -> Result<Figure, Unable> {
    figure(&outcomes.iter().map(value).collect::<Vec<_>>())
}

fn notes(outcomes: &[Outcome], note: impl Fn(&Outcome) -> String) -> String {
    outcomes.iter().map(note).collect::<Vec<_>>().join("; ")
}

/// `host.restart`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Restart(Common);

impl Measure for Restart {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        self.0.tell(run, |case, outcomes| {
            Ok(Finding {
                case,
                unit: "ms",
                value: each(outcomes, |outcome| outcome.protected_ms)?,
                reference: Some((
                    "until the agent is ready".to_owned(),
                    each(outcomes, |outcome| outcome.agent_ms)?,
                )),
                note: Some(notes(outcomes, |outcome| {
                    format!("the first VM after {:.0} ms", outcome.first_protected_ms)
                })),
            })
        })
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.resent`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Resent(Common);

impl Measure for Resent {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        self.0.tell(run, |case, outcomes| {
            Ok(Finding {
                case,
                unit: "%",
                value: each(outcomes, |outcome| outcome.sent_ratio() * 100.0)?,
                reference: None,
                note: Some(notes(outcomes, |outcome| {
                    format!("of one VM at most {:.2} %", outcome.worst_sent_ratio() * 100.0)
                })),
            })
        })
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.pause`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Pause(Common);

impl Measure for Pause {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        self.0.tell(run, |case, outcomes| {
            Ok(Finding {
                case,
                unit: "ms",
                value: each(outcomes, Outcome::pause_ms)?,
                reference: None,
                note: Some("the longest of all guests since they are protected again".to_owned()),
            })
        })
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}
