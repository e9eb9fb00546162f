//! `peer.migration`: our first copy and our pauses, against a plain live migration of the same Linux guest by stock QEMU.
//!
//! A migration copies all memory once while the guest runs, then what changed, and stops the guest for the rest; checkpoints do the last
//! of it forty times a second. The guest is Debian's kernel under TCG, so that it runs on every machine.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::qemu::{Kind, LIMIT, Qemu};
use super::{figure, folder, needs, ours};
use crate::measures::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::{Figure, float};

/// Settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Migration {
    /// Pages that the guest writes to every 25 ms.
    #[serde(default = "pages")]
    pages: u32,
    /// Between two checkpoints of ours, and how many in a repetition.
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    #[serde(default = "checkpoints")]
    checkpoints: u32,
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

/// What QEMU says of a migration.
struct Migrated {
    total_ms: f64,
    downtime_ms: f64,
    bytes: f64,
}

impl Measure for Migration {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        needs(false)?;
        let kind = Kind::Linux { pages: self.pages };
        let count = run.rounds(self.checkpoints) as usize;
        let interval = Duration::from_millis(self.interval_ms.into());
        let (mut migrations, mut ours) = (Vec::new(), Vec::new());
        for repetition in 0..run.repetitions() {
            run.say(format!("{} of {}", repetition + 1, run.repetitions()));
            let dir = folder()?;
            let mut guest = Qemu::start(kind, dir.path(), "guest", false)?;
            guest.wait_for_work(kind)?;
            ours.push(ours::checkpoints(&mut guest, dir.path(), interval, count)?);
            // The very same guest: we left no trace.
            migrations.push(migrate(&mut guest, kind, dir.path())?);
        }
        let each = |values: Vec<f64>| {
            Figure::of(&values).ok_or_else(|| Unable::Wrong("nothing was measured".to_owned()))
        };
        let theirs = |of: &dyn Fn(&Migrated) -> f64| each(migrations.iter().map(of).collect());
        let mine = |of: &dyn Fn(&ours::Checkpoints) -> f64| each(ours.iter().map(of).collect());
        let pauses: Vec<Vec<u64>> = ours.iter().map(|ours| ours.pauses_us.clone()).collect();
        let mib = float(1 << 20);
        let rows = [
            (
                "pause",
                "ms",
                figure(&pauses, 50)?,
                theirs(&|migrated| migrated.downtime_ms)?,
                format!("p50 of a checkpoint of {:.0} pages; its one downtime", ours[0].pages),
            ),
            (
                "first-copy",
                "ms",
                mine(&|ours| ours.first_copy_ms)?,
                theirs(&|migrated| migrated.total_ms)?,
                "attached, copied and encoded, not sent; its total time, to another QEMU through a Unix socket".to_owned(),
            ),
            (
                "bytes",
                "MiB",
                mine(&|ours| float(ours.first_copy_bytes) / mib)?,
                theirs(&|migrated| migrated.bytes / mib)?,
                format!("for all memory of {} MiB", kind.memory_mib()),
            ),
        ];
        for (what, unit, value, reference, note) in rows {
            let finding = Finding {
                case: what.to_owned(),
                unit,
                value,
                reference: Some(("live migration".to_owned(), reference)),
                note: Some(note),
            };
            run.found_at([("what", what.into()), ("pages", self.pages.into())], finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        outside("pages", self.pages.into(), 1, 20_000)
            .or_else(|| outside("interval_ms", self.interval_ms.into(), 1, 10_000))
            .or_else(|| outside("checkpoints", self.checkpoints.into(), 1, 10_000))
    }
}

/// To another QEMU on this machine, with no limit of bandwidth that a network would have.
fn migrate(guest: &mut Qemu, kind: Kind, dir: &Path) -> Result<Migrated, Unable> {
    let uri = format!("unix:{}", dir.join("migration").display());
    let mut other = Qemu::start(kind, dir, "other", true)?;
    other.ask("migrate-incoming", json!({"uri": uri}))?;
    guest.ask("migrate-set-parameters", json!({"max-bandwidth": 1_u64 << 40}))?;
    guest.ask("migrate", json!({"uri": uri}))?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = guest.ask("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return migrated(&answer),
            Some("failed" | "cancelled") => {
                return Err(Unable::Wrong(format!("the migration failed: {answer}")));
            }
            _ if Instant::now() > deadline => {
                return Err(Unable::Wrong(format!("the migration does not end: {answer}")));
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn migrated(answer: &Value) -> Result<Migrated, Unable> {
    let number = |value: &Value| {
        let found = value.as_f64();
        found.ok_or_else(|| Unable::Wrong(format!("QEMU does not say how the migration went: {answer}")))
    };
    Ok(Migrated {
        total_ms: number(&answer["total-time"])?,
        downtime_ms: number(&answer["downtime"])?,
        bytes: number(&answer["ram"]["transferred"])?,
    })
}
