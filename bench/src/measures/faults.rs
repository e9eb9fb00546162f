//! `fleet.faults`: invariants that are broken when faults are injected into many VMs on one agent, in the deterministic simulator.

use romulus_sim::run_fleet;
use serde::Deserialize;

use super::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::{Figure, float};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Faults {
    /// VMs on the agent at a time.
    #[serde(default = "vms")]
    vms: u16,
    /// Until at least so many faults have happened.
    #[serde(default = "faults")]
    faults: u32,
}

const fn vms() -> u16 {
    50
}

const fn faults() -> u32 {
    10_000
}

impl Measure for Faults {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        run.say(format!("{} VMs", self.vms));
        let faults = run.rounds(self.faults);
        // Another repetition would find the same: a seed is all there is to it.
        let outcome = run_fleet(run.seed(), self.vms.into(), faults.into(), None);
        if let Some((vm, seed, violation)) = outcome.violations.first() {
            run.tell(format!("{vm} (plan {seed}): {violation}"));
        }
        let broken = [float(outcome.violations.len() as u64)];
        let value = Figure::of(&broken).ok_or_else(|| Unable::Wrong("nothing was counted".to_owned()))?;
        run.found_at(
            [("vms", self.vms.into()), ("faults", faults.into())],
            Finding {
                case: self.vms.to_string(),
                unit: "broken",
                value,
                reference: None,
                note: Some(format!(
                    "{} faults, {} VMs, {} took over, {} commits, {} lives of the agent",
                    outcome.fault_count(),
                    outcome.vms,
                    outcome.took_over,
                    outcome.commits,
                    outcome.agent_lives
                )),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        outside("vms", self.vms.into(), 1, 1000)
            .or_else(|| outside("faults", self.faults.into(), 1, 10_000_000))
    }
}
