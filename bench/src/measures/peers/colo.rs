//! `peer.colo`: the guest's pause at a checkpoint of ours, against QEMU's own COLO with a real secondary.
//!
//! COLO ("COarse-grain LOck-stepping") stops the guest, sends its dirty pages and its devices' state to the secondary, waits until that has
//! loaded them, and lets both run. Its guest here is firmware under KVM (`romulus_testbed::firmware`): under TCG the checkpoints of
//! QEMU 7.2's COLO deadlock. No network is compared, so that checkpoints come by the clock alone.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use romulus_testbed::firmware::{self, Payload};
use serde::Deserialize;
use serde_json::json;

use super::qemu::{Kind, LIMIT, Qemu};
use super::{figure, folder, needs, ours};
use crate::measures::{Measure, outside};
use crate::run::{Finding, Run, Unable};

/// Settings.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Colo {
    /// Pages that the guest writes to all the time.
    #[serde(default = "pages")]
    pages: u32,
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    /// Checkpoints of each in a repetition.
    #[serde(default = "checkpoints")]
    checkpoints: u32,
    /// Of the pauses: 50, 99 or both; each a row.
    #[serde(default = "percentiles")]
    percentiles: Vec<u32>,
}

const fn pages() -> u32 {
    500
}

const fn interval_ms() -> u32 {
    25
}

const fn checkpoints() -> u32 {
    200
}

fn percentiles() -> Vec<u32> {
    vec![50, 99]
}

/// COLO gave up.
const ENDS: &str = "COLO_EXIT";
/// Of the first checkpoints, which are as large as memory that nobody has seen yet.
const SETTLING: usize = 8;

/// What one repetition found: ours, COLO's, and pages of a checkpoint of each.
#[derive(Clone, Debug)]
struct Both {
    ours_us: Vec<u64>,
    colo_us: Vec<u64>,
    ours_pages: f64,
    colo_pages: f64,
}

/// What was run last, and how: measures that ask for the same share one run.
static LAST: Mutex<Option<(Colo, u32, Vec<Both>)>> = Mutex::new(None);

impl Measure for Colo {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        needs(true)?;
        let all = self.both(run)?;
        let (ours, colo): (Vec<_>, Vec<_>) = all
            .iter()
            .map(|both| (both.ours_us.clone(), both.colo_us.clone()))
            .unzip();
        for percent in &self.percentiles {
            let at = [
                ("pages", self.pages.into()),
                ("percentile", (*percent).into()),
                ("epoch_ms", self.interval_ms.into()),
            ];
            let finding = Finding {
                case: format!("p{percent}"),
                unit: super::MS.name,
                value: figure(&ours, *percent)?,
                reference: Some(("QEMU's COLO".to_owned(), figure(&colo, *percent)?)),
                note: Some(format!(
                    "STOP to RESUME by QEMU's clock; {:.0} pages a checkpoint, COLO {:.0}; COLO's secondary runs on the same machine",
                    all[0].ours_pages, all[0].colo_pages
                )),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let mut percentiles = self.percentiles.iter();
        outside("pages", self.pages.into(), 1, firmware::PAGES_MAX.into())
            .or_else(|| outside("interval_ms", self.interval_ms.into(), 1, 10_000))
            .or_else(|| outside("checkpoints", self.checkpoints.into(), 1, 10_000))
            .or_else(|| {
                let wrong = percentiles.find(|percent| ![50, 99].contains(*percent))?;
                Some(format!("percentiles = [{wrong}]: 50 and 99 there are"))
            })
    }
}

impl Colo {
    fn both(&self, run: &Run) -> Result<Vec<Both>, Unable> {
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let alike = |colo: &Colo| Self {
            percentiles: self.percentiles.clone(),
            ..colo.clone()
        };
        let count = run.rounds(self.checkpoints);
        if let Some((colo, done, both)) = last.as_ref()
            && alike(colo) == *self
            && *done == count
        {
            return Ok(both.clone());
        }
        let mut all = Vec::new();
        for repetition in 0..run.repetitions() {
            run.say(format!("{} of {}", repetition + 1, run.repetitions()));
            all.push(self.once(count as usize)?);
        }
        *last = Some((self.clone(), count, all.clone()));
        Ok(all)
    }

    /// One guest that we checkpoint, then one that COLO does.
    fn once(&self, count: usize) -> Result<Both, Unable> {
        let kind = Kind::Firmware(Payload::writes(self.pages));
        let interval = Duration::from_millis(self.interval_ms.into());
        let dir = folder()?;
        let mut guest = Qemu::start(kind, dir.path(), "ours", false)?;
        guest.wait_for_work(kind)?;
        let ours = ours::checkpoints(&mut guest, dir.path(), interval, count)?;
        drop(guest);
        let (colo_us, colo_pages) = self.colo(kind, dir.path(), count)?;
        Ok(Both {
            ours_us: ours.pauses_us,
            colo_us,
            ours_pages: ours.pages,
            colo_pages,
        })
    }

    /// A primary and a secondary of QEMU's own: pauses of the primary, and pages of a checkpoint.
    fn colo(&self, kind: Kind, dir: &Path, count: usize) -> Result<(Vec<u64>, f64), Unable> {
        let uri = format!("unix:{}", dir.join("colo").display());
        let mut secondary = Qemu::start(kind, dir, "secondary", true)?;
        secondary.capable(&["x-colo"])?;
        secondary.ask("migrate-incoming", json!({"uri": uri}))?;
        let mut primary = Qemu::start(kind, dir, "primary", false)?;
        primary.wait_for_work(kind)?;
        primary.capable(&["x-colo"])?;
        // No limit of bandwidth that a network would have: the best case.
        let parameters = json!({"x-checkpoint-delay": self.interval_ms, "max-bandwidth": 1_u64 << 40});
        primary.ask("migrate-set-parameters", parameters)?;
        primary.ask("migrate", json!({"uri": uri}))?;
        wait_for_colo(&mut primary)?;
        primary.pauses_us(SETTLING, LIMIT, ENDS)?;
        let before = transferred_pages(&mut primary)?;
        let counted = primary.count()?;
        let pauses_us = primary.pauses_us(count, LIMIT, ENDS)?;
        let after = transferred_pages(&mut primary)?;
        if pauses_us.len() != count {
            let what = format!("COLO made {} checkpoints, not {count}", pauses_us.len());
            return Err(Unable::Wrong(what));
        }
        // Among few checkpoints on a busy machine there may be no time for a whole round.
        primary.wait_for_more_than(counted)?;
        Ok((pauses_us, (after - before) / crate::stats::float(count as u64)))
    }
}

/// Until the state is COLO's.
fn wait_for_colo(primary: &mut Qemu) -> Result<(), Unable> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = primary.ask("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("colo") => return Ok(()),
            Some("failed" | "cancelled" | "completed") => {
                return Err(Unable::Wrong(format!("COLO did not begin: {answer}")));
            }
            _ if Instant::now() > deadline => {
                return Err(Unable::Wrong(format!("COLO did not begin in time: {answer}")));
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Pages that were sent as they are since the migration began.
fn transferred_pages(primary: &mut Qemu) -> Result<f64, Unable> {
    let answer = primary.ask("query-migrate", json!({}))?;
    Ok(answer["ram"]["normal"].as_f64().unwrap_or_default())
}
