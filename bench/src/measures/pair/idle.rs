//! `idle.cost` and `idle.latency`: a protected guest that does nothing, with the replicator's own `epochs.idle_length`, against epochs that are
//! all alike.

use std::time::Duration;

use romulus_e2e::Stamp;
use serde::Deserialize;

use super::super::host::figure;
use super::{BY_DEFAULT, Common, Measure, NOTHING, SETTLE, Seen, notes, protected, slice};
use crate::run::{Finding, Run, Unable};

const ALL_ALIKE: &str = "[epochs]\nidle_length = \"0s\"\n";
/// Between two requests on average: rare enough that the guest is idle in between.
const REQUESTS: Duration = Duration::from_millis(200);
const SEED: u64 = 1;

/// `idle.cost`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct IdleCost(Common);

impl Measure for IdleCost {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let look = |run: &Run, dirty: &str| {
            let all_alike = self.0.look(run, dirty, ALL_ALIKE)?;
            Ok((self.0.look(run, dirty, BY_DEFAULT)?, all_alike))
        };
        self.0.each(run, NOTHING, look, |all| {
            let both = |seen: &Seen| seen.replicator_percent + seen.agent_percent;
            Ok(Finding {
                unit: "%",
                note: notes(all, |(seen, all_alike)| {
                    Ok(format!(
                        "of a core: replicator {:.2} %, agent {:.2} %; {:.0} checkpoints in {:.1} s, {} pages each; all alike: {:.0} checkpoints",
                        seen.replicator_percent,
                        seen.agent_percent,
                        seen.epochs,
                        seen.slice.as_secs_f64(),
                        seen.of_status("dirty_pages", "p50")?,
                        all_alike.epochs,
                    ))
                })?,
                ..against_all_alike(all.iter().map(|(seen, all_alike)| (both(seen), both(all_alike))))?
            })
        })
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// What was measured with the replicator's own settings, and with epochs that are all alike.
fn against_all_alike(pairs: impl Iterator<Item = (f64, f64)>) -> Result<Finding, Unable> {
    let (value, reference): (Vec<f64>, Vec<f64>) = pairs.unzip();
    Ok(Finding {
        case: String::new(),
        unit: "",
        value: figure(&value)?,
        reference: Some(("epochs that are all alike".to_owned(), figure(&reference)?)),
        note: None,
    })
}

/// `idle.latency`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct IdleLatency(Common);

/// Of rare requests to a guest, at random times.
struct Answered {
    p50_ms: f64,
    p99_ms: f64,
    requests: usize,
}

impl IdleLatency {
    fn answered(&self, run: &Run, dirty: &str, settings: &str) -> Result<Answered, Unable> {
        let crowd = protected(dirty, self.0.memory_mib, settings)?;
        let probe = crowd
            .probe(super::VM, REQUESTS, SEED)
            .map_err(Unable::failed("connecting to the guest"))?;
        let slice = slice(run, self.0.slice_ms);
        std::thread::sleep(SETTLE.min(slice));
        let from = Stamp::now();
        std::thread::sleep(slice);
        let (quantiles, requests) = probe.quantiles(from, Stamp::now());
        if requests == 0 {
            return Err(Unable::Wrong("no request was answered".to_owned()));
        }
        Ok(Answered {
            p50_ms: quantiles.p50,
            p99_ms: quantiles.p99,
            requests,
        })
    }
}

impl Measure for IdleLatency {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let look = |run: &Run, dirty: &str| {
            let all_alike = self.answered(run, dirty, ALL_ALIKE)?;
            Ok((self.answered(run, dirty, BY_DEFAULT)?, all_alike))
        };
        self.0.each(run, NOTHING, look, |all| {
            Ok(Finding {
                unit: "ms",
                note: notes(all, |(answered, all_alike)| {
                    Ok(format!(
                        "{} and {} requests, p99 {:.1} and {:.1} ms",
                        answered.requests, all_alike.requests, answered.p99_ms, all_alike.p99_ms
                    ))
                })?,
                ..against_all_alike(
                    all.iter()
                        .map(|(answered, all_alike)| (answered.p50_ms, all_alike.p50_ms)),
                )?
            })
        })
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}
