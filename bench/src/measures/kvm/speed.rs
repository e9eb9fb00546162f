//! `kvm.speed`: how fast a guest works while it is protected, against the same guest a moment before.

use std::time::Duration;

use serde::Deserialize;

use super::guest::Wanted;
use super::slices::{self, Work};
use super::{Mode, default_mode, dirty_problem, interval_ms, machine_problem, memory_mib};
use crate::measures::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable};
use crate::stats::Figure;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Speed {
    /// What the guest dirties, as its command line has it; each a row. With a period of 0 pages are counted instead of work.
    #[serde(default = "dirty")]
    dirty: Vec<String>,
    #[serde(default = "default_mode")]
    tracking: Mode,
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    /// How long the guest works each time.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "one")]
    vcpus: u32,
}

pub(super) fn dirty() -> Vec<String> {
    [
        "off",
        "random:64:25:4",
        "random:1024:25:64",
        "hotcold:1024:25:64",
        "random:2048:25:64",
    ]
    .map(str::to_owned)
    .to_vec()
}

pub(super) const fn slice_ms() -> u32 {
    2000
}

const fn one() -> u32 {
    1
}

impl Speed {
    fn parameters(&self, dirty: &str) -> [(&'static str, Parameter); 5] {
        [
            ("dirty", dirty.into()),
            ("tracking", self.tracking.name().into()),
            ("epoch_ms", self.interval_ms.into()),
            ("memory_mib", self.memory_mib.into()),
            ("vcpus", self.vcpus.into()),
        ]
    }

    fn one(&self, run: &Run, dirty: &str, slice: Duration, interval: Duration) -> Result<Finding, Unable> {
        let (mut all, mut free, mut protected) = (Vec::new(), Vec::new(), Vec::new());
        for repetition in 0..run.repetitions() {
            run.say(format!(
                "dirty={dirty}, {} of {}",
                repetition + 1,
                run.repetitions()
            ));
            let wanted = Wanted {
                memory_mib: self.memory_mib,
                vcpus: self.vcpus,
                mode: self.tracking,
                words: slices::words(dirty),
            };
            let both = slices::both(&wanted, slice, interval)?;
            free.push(both.free.ns_a_unit(Work::of(dirty))?);
            protected.push(both.protected.ns_a_unit(Work::of(dirty))?);
            all.push(both);
        }
        let figures = Figure::of(&protected).zip(Figure::of(&free));
        let (value, reference) =
            figures.ok_or_else(|| Unable::Wrong("the guest's speed is no number".to_owned()))?;
        Ok(Finding {
            case: dirty.to_owned(),
            unit: "ns/unit",
            value,
            reference: Some(("the same guest unprotected".to_owned(), reference)),
            note: Some(slices::describe(&all)),
        })
    }
}

impl Measure for Speed {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (slice, interval) = (
            slices::slice(run, self.slice_ms),
            Duration::from_millis(self.interval_ms.into()),
        );
        for dirty in &self.dirty {
            match self.one(run, dirty, slice, interval) {
                Ok(finding) => run.found_at(self.parameters(dirty), finding),
                // A guest that has no time left at this rate says nothing of the other rates.
                Err(error @ Unable::Wrong(_)) => run.missed(dirty, error),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        machine_problem(self.memory_mib, self.vcpus)
            .or_else(|| self.dirty.iter().find_map(|dirty| dirty_problem(dirty)))
            .or_else(|| outside("interval_ms", self.interval_ms.into(), 5, 10_000))
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 100, 600_000))
    }
}
