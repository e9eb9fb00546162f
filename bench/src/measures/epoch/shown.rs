//! What is shown of the sweep, each as a measure of its own.

use std::marker::PhantomData;

use serde::Deserialize;

use super::stand::{Free, Protected};
use super::sweep::{At, Seen, Sweep};
use crate::measures::Measure;
use crate::parameters::Parameters;
use crate::run::{Finding, Run, Unable};
use crate::stats::Figure;

/// Other lengths are compared with this one, where there is no guest without protection to compare with.
const USUAL_MS: u32 = 25;

/// Why there is no figure of a guest that was watched.
const NOTHING_DONE: &str = "the guest got nothing done besides dirtying pages";

/// One figure of the sweep.
pub(super) trait Figures {
    const UNIT: &'static str;

    fn protected(seen: &Protected) -> f64;

    /// The same of the guest that nobody protects, where there is such a thing.
    fn free(_: &Free) -> Option<f64> {
        None
    }

    fn note(_: &Protected) -> Option<String> {
        None
    }
}

/// The measure that shows a figure.
#[derive(Deserialize)]
#[serde(transparent, bound = "")]
pub(crate) struct Shows<F> {
    sweep: Sweep,
    #[serde(skip)]
    figure: PhantomData<F>,
}

/// `epoch.speed`: host time for a unit of the guest's work.
pub(crate) struct Speed;
/// `epoch.latency`: of the guest's client.
pub(crate) struct Latency;
/// `epoch.pause`.
pub(crate) struct Pause;
/// `epoch.on_time`: epochs that began at most 2 ms late.
pub(crate) struct OnTime;
/// `epoch.lag`: from a capture to its commit.
pub(crate) struct Lag;
/// `epoch.wire`: what is sent.
pub(crate) struct Wire;
/// `epoch.cpu`: what replicator and agent take of a core.
pub(crate) struct Cpu;

impl Figures for Speed {
    const UNIT: &'static str = "ns/unit";

    fn protected(seen: &Protected) -> f64 {
        seen.ns_a_unit
    }

    fn free(free: &Free) -> Option<f64> {
        Some(free.ns_a_unit)
    }
}

impl Figures for Latency {
    const UNIT: &'static str = "ms";

    fn protected(seen: &Protected) -> f64 {
        seen.latency_ms
    }

    fn free(free: &Free) -> Option<f64> {
        Some(free.latency_ms)
    }
}

impl Figures for Pause {
    const UNIT: &'static str = "us";

    fn protected(seen: &Protected) -> f64 {
        seen.pause_ms * 1e3
    }

    fn note(seen: &Protected) -> Option<String> {
        Some(format!("{:.0} pages at the median", seen.dirty_pages))
    }
}

impl Figures for OnTime {
    const UNIT: &'static str = "%";

    fn protected(seen: &Protected) -> f64 {
        seen.on_time_percent
    }
}

impl Figures for Lag {
    const UNIT: &'static str = "ms";

    fn protected(seen: &Protected) -> f64 {
        seen.lag_ms
    }
}

impl Figures for Wire {
    const UNIT: &'static str = "MB/s";

    fn protected(seen: &Protected) -> f64 {
        seen.megabytes_a_second
    }
}

impl Figures for Cpu {
    const UNIT: &'static str = "% of a core";

    fn protected(seen: &Protected) -> f64 {
        seen.replicator_percent + seen.agent_percent
    }

    fn note(seen: &Protected) -> Option<String> {
        Some(format!(
            "replicator {:.0} %, agent {:.0} %, VMM {:.0} %",
            seen.replicator_percent, seen.agent_percent, seen.vmm_percent
        ))
    }
}

impl<F: Figures> Measure for Shows<F> {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let all = self.sweep.seen(run)?;
        for seen in all.iter() {
            for at in &seen.at {
                let case = format!("{}/{}ms", seen.load.name(), at.epoch_ms);
                match (&at.missed, finding::<F>(&case, seen, at)) {
                    (None, Some(finding)) => run.found_at(parameters(seen, at), finding),
                    (Some(why), _) => run.missed(&case, Unable::Wrong(why.clone())),
                    (None, None) => run.missed(&case, Unable::Wrong(NOTHING_DONE.to_owned())),
                }
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.sweep.problem()
    }
}

fn parameters(seen: &Seen, at: &At) -> Parameters {
    let load = seen.load.parameters();
    [("epoch_ms", at.epoch_ms.into())]
        .into_iter()
        .chain(load)
        .collect()
}

fn figure<'s, F: Figures>(all: impl IntoIterator<Item = &'s Protected>) -> Option<Figure> {
    Figure::of(&all.into_iter().map(F::protected).collect::<Vec<_>>())
}

fn finding<F: Figures>(case: &str, seen: &Seen, at: &At) -> Option<Finding> {
    let free: Option<Vec<f64>> = seen.free.iter().map(F::free).collect();
    let usual = seen.at.iter().find(|at| at.epoch_ms == USUAL_MS);
    let reference = match free {
        Some(free) => Figure::of(&free).map(|figure| ("the same guest unprotected".to_owned(), figure)),
        None => usual
            .and_then(|usual| figure::<F>(&usual.protected))
            .map(|figure| (format!("epochs of {USUAL_MS} ms"), figure)),
    };
    Some(Finding {
        case: case.to_owned(),
        unit: F::UNIT,
        value: figure::<F>(&at.protected)?,
        reference,
        note: seen.load.noted(at.protected.last().and_then(F::note)),
    })
}
