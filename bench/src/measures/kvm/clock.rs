//! `kvm.clock`: whether the guest's clocks slip while it stands still forty times a second.
//!
//! The guest writes its kvmclock and its time stamp counter side by side; how fast they go is told by this host's clock. What slips
//! is what they lose under protection.

use std::time::Duration;

use serde::Deserialize;

use super::guest::Wanted;
use super::slices::{self, Both, Slice};
use super::{Mode, default_mode, dirty_problem, interval_ms, machine_problem, memory_mib};
use crate::measures::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::{Figure, float};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Clock {
    #[serde(default = "dirty")]
    dirty: String,
    #[serde(default = "default_mode")]
    tracking: Mode,
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    /// How long the clocks are watched each time.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "one")]
    vcpus: u32,
}

fn dirty() -> String {
    "random:1024:25:64".to_owned()
}

const fn slice_ms() -> u32 {
    10_000
}

const fn one() -> u32 {
    1
}

/// How far a clock is from going with the host's, in millionths.
fn kvmclock_ppm(slice: &Slice) -> f64 {
    let guest = float(slice.after.progress.kvmclock_ns - slice.before.progress.kvmclock_ns);
    ((1.0 - guest / float(slice.ns())) * 1e6).abs()
}

/// Ticks in a nanosecond of the host's.
fn tsc_rate(slice: &Slice) -> f64 {
    float(slice.after.progress.tsc - slice.before.progress.tsc) / float(slice.ns())
}

fn backwards(slice: &Slice) -> bool {
    let (before, after) = (slice.before.progress, slice.after.progress);
    after.kvmclock_ns < before.kvmclock_ns || after.tsc < before.tsc
}

impl Measure for Clock {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (slice, interval) = (
            slices::slice(run, self.slice_ms),
            Duration::from_millis(self.interval_ms.into()),
        );
        let wanted = Wanted {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            mode: self.tracking,
            words: format!("progress=on check=off log=off dirty={}", self.dirty),
        };
        let mut all: Vec<Both> = Vec::new();
        for repetition in 0..run.repetitions() {
            run.say(format!("{} of {}", repetition + 1, run.repetitions()));
            let both = slices::both(&wanted, slice, interval)?;
            if backwards(&both.free) || backwards(&both.protected) {
                return Err(Unable::Wrong("a clock of the guest went backwards".to_owned()));
            }
            all.push(both);
        }
        let values = |of: fn(&Both) -> f64| Figure::of(&all.iter().map(of).collect::<Vec<_>>());
        let note = slices::describe(&all);
        let free = values(|both| kvmclock_ppm(&both.free)).map(|figure| ("unprotected".to_owned(), figure));
        let kvmclock = values(|both| kvmclock_ppm(&both.protected));
        let tsc = values(|both| ((1.0 - tsc_rate(&both.protected) / tsc_rate(&both.free)) * 1e6).abs());
        for (case, value, reference) in [("kvmclock", kvmclock, free), ("tsc", tsc, None)] {
            if let Some(value) = value {
                let at = [
                    ("clock", case.into()),
                    ("dirty", (&self.dirty).into()),
                    ("tracking", self.tracking.name().into()),
                    ("epoch_ms", self.interval_ms.into()),
                    ("vcpus", self.vcpus.into()),
                ];
                let finding = Finding {
                    case: case.to_owned(),
                    unit: "ppm",
                    value,
                    reference,
                    note: Some(note.clone()),
                };
                run.found_at(at, finding);
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        machine_problem(self.memory_mib, self.vcpus)
            .or_else(|| dirty_problem(&self.dirty))
            .or_else(|| outside("interval_ms", self.interval_ms.into(), 5, 10_000))
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 100, 600_000))
    }
}
