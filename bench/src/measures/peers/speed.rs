//! `qemu.speed`: the time that a guest of QEMU on KVM takes for its work while checkpoints of it are taken, against undisturbed.
//!
//! The guest (`romulus_testbed::firmware`) writes to some pages and reads many: what is done to the tables by which KVM finds its memory costs it time after
//! the pause, which no pause shows.

use std::time::{Duration, Instant};

use romulus_testbed::firmware::{self, Payload};
use serde::Deserialize;

use super::qemu::{Kind, Qemu};
use super::{figure, folder, needs, ours};
use crate::measures::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::Figure;

/// Settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Speed {
    /// Pages that the guest writes to in each of its rounds, of which there are some in an epoch.
    #[serde(default = "pages")]
    pages: u32,
    /// From one of them to the next, in pages.
    #[serde(default = "stride")]
    stride: u32,
    /// Pages that it reads in each round.
    #[serde(default = "reads")]
    reads: u32,
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    /// Checkpoints in a repetition.
    #[serde(default = "checkpoints")]
    checkpoints: u32,
}

const fn pages() -> u32 {
    50
}

const fn stride() -> u32 {
    400
}

const fn reads() -> u32 {
    20_000
}

const fn interval_ms() -> u32 {
    25
}

const fn checkpoints() -> u32 {
    200
}

/// One repetition: microseconds of a round, disturbed and not, and the pauses.
struct Seen {
    protected_us: f64,
    undisturbed_us: f64,
    pauses_us: Vec<u64>,
    pages: f64,
}

impl Measure for Speed {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        needs(true)?;
        let mut seen = Vec::new();
        for repetition in 0..run.repetitions() {
            run.say(format!("{} of {}", repetition + 1, run.repetitions()));
            seen.push(self.once(run.rounds(self.checkpoints) as usize)?);
        }
        let each = |of: &dyn Fn(&Seen) -> f64| {
            let values: Vec<f64> = seen.iter().map(of).collect();
            Figure::of(&values).ok_or_else(|| Unable::Wrong("nothing was measured".to_owned()))
        };
        let pauses: Vec<Vec<u64>> = seen.iter().map(|seen| seen.pauses_us.clone()).collect();
        let at = [
            ("pages", self.pages.into()),
            ("stride", self.stride.into()),
            ("reads", self.reads.into()),
            ("epoch_ms", self.interval_ms.into()),
        ];
        let finding = Finding {
            case: format!("{}:{}:{}", self.pages, self.stride, self.reads),
            unit: "us/round",
            value: each(&|seen| seen.protected_us)?,
            reference: Some(("undisturbed".to_owned(), each(&|seen| seen.undisturbed_us)?)),
            note: Some(format!(
                "{:.0} pages a checkpoint, pauses of {:.2} ms (p50)",
                seen[0].pages,
                figure(&pauses, 50)?.p50
            )),
        };
        run.found_at(at, finding);
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let most = f64::from(firmware::PAGES_MAX);
        outside("pages", self.pages.into(), 1, firmware::PAGES_MAX.into())
            .or_else(|| outside("stride", self.stride.into(), 1, firmware::PAGES_MAX.into()))
            .or_else(|| outside("reads", self.reads.into(), 1, firmware::PAGES_MAX.into()))
            .or_else(|| outside("interval_ms", self.interval_ms.into(), 1, 10_000))
            .or_else(|| outside("checkpoints", self.checkpoints.into(), 1, 10_000))
            .or_else(|| {
                let span = f64::from(self.pages) * f64::from(self.stride);
                (span > most).then(|| format!("pages times stride = {span}: the guest has {most} pages"))
            })
    }
}

impl Speed {
    fn once(&self, count: usize) -> Result<Seen, Unable> {
        let kind = Kind::Firmware(Payload {
            pages: self.pages,
            stride: self.stride,
            reads: self.reads,
        });
        let interval = Duration::from_millis(self.interval_ms.into());
        let dir = folder()?;
        let mut guest = Qemu::start(kind, dir.path(), "speed", false)?;
        guest.wait_for_work(kind)?;
        let (before, began) = (guest.count()?, Instant::now());
        std::thread::sleep(interval * u32::try_from(count).unwrap_or(u32::MAX));
        let undisturbed_us = guest.round_us(before, began)?;
        let ours = ours::checkpoints(&mut guest, dir.path(), interval, count)?;
        Ok(Seen {
            protected_us: ours.round_us,
            undisturbed_us,
            pauses_us: ours.pauses_us,
            pages: ours.pages,
        })
    }
}
