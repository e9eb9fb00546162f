//! `advise.check`: what `bench advise` predicts of a guest, and what then comes when the same guest is protected.

use std::collections::BTreeSet;
use std::time::Duration;

use romulus_config::Replicator;
use romulus_epoch::{Prediction, Profile};
use romulus_hypervisor::source::{CHECKPOINT_PAGES_MAX, PAUSE_LIMIT_NS};
use serde::Deserialize;

use super::stand::{Free, Protected, Stand};
use super::task::{Machine, Task};
use super::{SETTLE, repetitions, scaled};
use crate::advise::answer::Link;
use crate::advise::attach::{Attached, Wanted};
use crate::advise::observe::{Watch, observe};
use crate::measures::kvm::dirty_problem;
use crate::measures::{Measure, outside};
use crate::run::{Effort, Finding, Run, Unable};
use crate::stats::Figure;

/// What the lab's loopback is; the rest is what `bench advise` assumes by itself.
const ROUND_TRIP_NS: f64 = 100_000.0;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Check {
    /// What the guest writes; each is checked.
    #[serde(default = "dirty")]
    dirty: Vec<String>,
    /// Lengths at which it is looked at.
    #[serde(default = "seen_ms")]
    seen_ms: Vec<u32>,
    /// Lengths at which it is then protected.
    #[serde(default = "epoch_ms")]
    epoch_ms: Vec<u32>,
    /// How long it is looked at, and watched, with each length.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
}

fn dirty() -> Vec<String> {
    ["random/counter:500:25:16", "hotcold/text:1000:25:32"]
        .map(str::to_owned)
        .to_vec()
}

fn seen_ms() -> Vec<u32> {
    vec![10, 25, 75, 200]
}

/// Neither is among those at which it is looked at.
fn epoch_ms() -> Vec<u32> {
    vec![15, 60]
}

const fn slice_ms() -> u32 {
    3000
}

const fn memory_mib() -> u32 {
    128
}

/// What was predicted and what came, in the unit of their row.
struct Both {
    predicted: Vec<f64>,
    came: Vec<f64>,
}

/// What is compared.
const COMPARED: [(&str, &str); 4] = [
    ("pause", "us"),
    ("bandwidth", "MB/s"),
    ("latency", "ms"),
    ("speed", "% of unprotected"),
];

fn predicted(prediction: &Prediction) -> [f64; COMPARED.len()] {
    [
        prediction.epoch.pause_ns / 1e3,
        prediction.bytes_a_second / 1e6,
        prediction.held_ns / 1e6,
        100.0 * (1.0 - prediction.overhead),
    ]
}

fn came(free: &Free, protected: &Protected) -> [f64; COMPARED.len()] {
    [
        protected.pause_ms * 1e3,
        protected.megabytes_a_second,
        protected.latency_ms - free.latency_ms,
        100.0 * free.ns_a_unit / protected.ns_a_unit,
    ]
}

impl Check {
    /// What `bench advise` finds out about the guest.
    fn profile(&self, run: &Run, stand: &Stand, defaults: &Replicator) -> Result<Profile, Unable> {
        let wanted = Wanted {
            socket: stand.socket(),
            taps: Vec::new(),
            disposable: BTreeSet::new(),
            fifo_dir: "/run/romulus".into(),
            pause_limit_ns: PAUSE_LIMIT_NS,
            checkpoint_pages_max: CHECKPOINT_PAGES_MAX,
        };
        let mut guest = Attached::to(&wanted).map_err(Unable::failed("attaching"))?;
        let watch = Watch {
            lengths: self
                .seen_ms
                .iter()
                .map(|ms| Duration::from_millis((*ms).into()))
                .collect(),
            time: scaled(run, self.slice_ms),
            delta_bytes: defaults.memory.delta_memory.bytes(),
        };
        let seen = observe(guest.source(), &watch, &mut |_, _| {});
        let seen = seen.map_err(Unable::failed("looking at the guest"))?;
        guest.let_go().map_err(Unable::failed("letting the guest go"))?;
        let link = Link {
            round_trip_ns: ROUND_TRIP_NS,
            ..Link::default()
        };
        link.profile(&seen)
            .ok_or_else(|| Unable::Wrong("what was seen of the guest is no measurement".to_owned()))
    }

    fn one(&self, run: &mut Run, dirty: &str) -> Result<(), Unable> {
        let defaults = Replicator::default();
        let fault_ns = defaults.epochs.auto.fault_cost.as_secs_f64() * 1e9;
        let mut all: Vec<[Both; COMPARED.len()]> = self.epoch_ms.iter().map(|_| both()).collect();
        for repetition in 0..repetitions(run) {
            run.tell(format!("{dirty}, {} of {}", repetition + 1, repetitions(run)));
            let machine = Machine {
                memory_mib: self.memory_mib,
                vcpus: 1,
                task: Task::Dirty(dirty.to_owned()),
            };
            let mut stand = Stand::raise(&machine, run.seed())?;
            std::thread::sleep(SETTLE);
            let profile = self.profile(run, &stand, &defaults)?;
            let slice = scaled(run, self.slice_ms);
            let free = stand.free(slice)?;
            for (epoch_ms, all) in self.epoch_ms.iter().zip(&mut all) {
                stand.protect(&format!("[epochs]\nlength = \"{epoch_ms}ms\"\n"))?;
                let came = came(&free, &stand.protected(slice)?);
                stand.unprotect()?;
                let predicted = predicted(&profile.at(f64::from(*epoch_ms) * 1e6, fault_ns));
                for ((both, predicted), came) in all.iter_mut().zip(predicted).zip(came) {
                    both.predicted.push(predicted);
                    both.came.push(came);
                }
            }
        }
        for (epoch_ms, all) in self.epoch_ms.iter().zip(all) {
            for ((what, unit), both) in COMPARED.into_iter().zip(all) {
                let case = format!("{what}/{dirty}/{epoch_ms}ms");
                let figures = Figure::of(&both.predicted).zip(Figure::of(&both.came));
                let Some((value, reference)) = figures else {
                    run.missed(&case, Unable::Wrong("it is no number".to_owned()));
                    continue;
                };
                let at = [
                    ("epoch_ms", (*epoch_ms).into()),
                    ("dirty", dirty.into()),
                    ("what", what.into()),
                ];
                let finding = Finding {
                    case,
                    unit,
                    value,
                    reference: Some(("as it came".to_owned(), reference)),
                    note: None,
                };
                run.found_at(at, finding);
            }
        }
        Ok(())
    }
}

fn both() -> [Both; COMPARED.len()] {
    std::array::from_fn(|_| Both {
        predicted: Vec::new(),
        came: Vec::new(),
    })
}

impl Measure for Check {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let dirty = match run.effort() {
            Effort::Shortest => &self.dirty[..1],
            _ => &self.dirty[..],
        };
        for dirty in dirty {
            self.one(run, dirty)?;
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let mut lengths = self.seen_ms.iter().chain(&self.epoch_ms);
        if self.dirty.is_empty() || self.seen_ms.is_empty() || self.epoch_ms.is_empty() {
            return Some("dirty, seen_ms and epoch_ms need a value each".to_owned());
        }
        lengths
            .find_map(|ms| outside("seen_ms, epoch_ms", (*ms).into(), 1, 1000))
            .or_else(|| self.dirty.iter().find_map(|dirty| dirty_problem(dirty)))
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 100, 600_000))
            .or_else(|| outside("memory_mib", self.memory_mib.into(), 64, 1024))
    }
}
