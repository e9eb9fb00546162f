//! `kvm.tracking`: whether the default way to ask KVM for dirty pages is the one that costs the guest least.
//!
//! The cost of a way is by how much a guest slows down when it is protected. Each row compares the default's with another's.

use std::time::Duration;

use serde::Deserialize;

use super::guest::Wanted;
use super::slices::{self, Work};
use super::speed;
use super::{Mode, default_mode, dirty_problem, interval_ms, machine_problem, memory_mib};
use crate::measures::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::Figure;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Modes {
    /// What the guest dirties; each a row for each other way.
    #[serde(default = "dirty")]
    dirty: Vec<String>,
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    #[serde(default = "speed::slice_ms")]
    slice_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
}

fn dirty() -> Vec<String> {
    ["random:1024:25:64", "hotcold:1024:25:64", "sequential:1024:25:4"]
        .map(str::to_owned)
        .to_vec()
}

impl Modes {
    /// By how much the guest slows down, for each way.
    fn slowdowns(
        &self,
        run: &Run,
        dirty: &str,
        all: &mut [Vec<slices::Both>; 3],
    ) -> Result<[f64; 3], Unable> {
        let (slice, interval) = (
            slices::slice(run, self.slice_ms),
            Duration::from_millis(self.interval_ms.into()),
        );
        let mut slowdowns = [0.0; 3];
        for ((mode, slowdown), all) in Mode::ALL.into_iter().zip(&mut slowdowns).zip(all) {
            let wanted = Wanted {
                memory_mib: self.memory_mib,
                vcpus: 1,
                mode,
                words: slices::words(dirty),
            };
            let both = slices::both(&wanted, slice, interval)?;
            let work = Work::of(dirty);
            *slowdown = both.protected.ns_a_unit(work)? / both.free.ns_a_unit(work)?;
            all.push(both);
        }
        Ok(slowdowns)
    }
}

impl Measure for Modes {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        for dirty in &self.dirty {
            let mut all = [Vec::new(), Vec::new(), Vec::new()];
            let mut repetitions = Vec::new();
            for repetition in 0..run.repetitions() {
                run.say(format!(
                    "dirty={dirty}, {} of {}",
                    repetition + 1,
                    run.repetitions()
                ));
                repetitions.push(self.slowdowns(run, dirty, &mut all)?);
            }
            let of = |mode: Mode| {
                let values: Vec<f64> = repetitions.iter().map(|all| all[mode as usize]).collect();
                Figure::of(&values)
            };
            for other in Mode::ALL.into_iter().filter(|mode| *mode != default_mode()) {
                let Some((value, reference)) = of(default_mode()).zip(of(other)) else {
                    continue;
                };
                let told = |mode: Mode| format!("{}: {}", mode.name(), slices::describe(&all[mode as usize]));
                let at = [
                    ("dirty", dirty.into()),
                    ("other", other.name().into()),
                    ("epoch_ms", self.interval_ms.into()),
                ];
                let finding = Finding {
                    case: format!("{dirty}/{}", other.name()),
                    unit: "slowdown",
                    value,
                    reference: Some((
                        format!("{} instead of {}", other.name(), default_mode().name()),
                        reference,
                    )),
                    note: Some(format!("{}; {}", told(default_mode()), told(other))),
                };
                run.found_at(at, finding);
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        machine_problem(self.memory_mib, 1)
            .or_else(|| self.dirty.iter().find_map(|dirty| dirty_problem(dirty)))
            .or_else(|| outside("interval_ms", self.interval_ms.into(), 5, 10_000))
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 100, 600_000))
    }
}
