//! `harvest.scan`: finding the few pages that a large guest in a stock QEMU has written, against the bare scan of the same memory.
//!
//! The guest is the end-to-end tests' Linux under TCG, with all of its memory there from the start. The value is what a checkpoint spends on
//! finding pages while the guest stands still; the bare scan looks at the same page tables right before it, and changes nothing.

use std::time::Duration;

use romulus_host_sys::{Pagemap, priority};
use romulus_hypervisor::qemu::source::QemuSource;
use romulus_hypervisor::source::{Checkpoint, GuestSource};
use serde::Deserialize;

use super::kvm::affordable_mib;
use super::qemu::{Guest, Wanted};
use super::{Measure, outside};
use crate::run::{Effort, Finding, Run, Unable, timed};
use crate::stats::{Unit, float};

/// The guest's own work between two checkpoints.
const INTERVAL: Duration = Duration::from_millis(25);
const PRECOPIES: u32 = 4;
const QUICK_MIB: u32 = 512;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scan {
    /// Memory of the guest. On a machine with less, as many whole GiB as it has.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    /// Pages that the guest dirties every 25 ms.
    #[serde(default = "pages")]
    pages: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

const fn memory_mib() -> u32 {
    16_384
}

const fn pages() -> u32 {
    100
}

const fn rounds() -> u32 {
    30
}

/// A guest with its tracking, and the bare scan of it.
struct Scanned {
    source: QemuSource,
    checkpoint: Checkpoint,
    pagemap: Pagemap,
    range: (u64, u64),
    /// Pages of each checkpoint, and of each bare scan.
    found: Vec<u64>,
    seen: Vec<u64>,
    /// Whole pauses, in nanoseconds.
    pauses: Vec<u64>,
}

impl Scanned {
    /// Counts written pages, and leaves them to the next checkpoint.
    fn bare(&mut self) -> Result<u64, Unable> {
        std::thread::sleep(INTERVAL);
        let mut counted = Ok(0);
        priority::raise();
        let time_ns = timed(|| counted = self.pagemap.count_written(self.range.0, self.range.1));
        priority::lower();
        self.seen.push(counted.map_err(Unable::failed("scanning"))?);
        Ok(time_ns)
    }

    fn capture(&mut self) -> Result<u64, Unable> {
        std::thread::sleep(INTERVAL);
        priority::raise();
        let report = self.source.capture(&mut || Ok(()), false, &mut self.checkpoint);
        priority::lower();
        let report = report.map_err(Unable::failed("taking a checkpoint"))?;
        self.found.push(report.dirty_pages);
        self.pauses.push(report.pause_ns);
        Ok(report.scan_ns)
    }
}

fn middle(values: &[u64]) -> u64 {
    let mut values = values.to_vec();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

impl Measure for Scan {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let wanted = match run.effort() {
            Effort::Shortest => QUICK_MIB,
            Effort::Quick | Effort::Full => self.memory_mib,
        };
        let memory_mib = affordable_mib(wanted)?;
        run.say(format!("booting a guest with {memory_mib} MiB"));
        let guest = Guest::boot(&Wanted {
            memory_mib,
            populated: true,
            programs: false,
            tap: None,
            kernel_words: format!("wl=counter:500,dirty:{}:{}", self.pages, INTERVAL.as_millis()),
        })?;
        guest.wait_for_word("counter 4")?;
        let mut source = guest.attach()?;
        // What the guest wrote since; the first copy itself is not needed here.
        let mut checkpoint = Checkpoint::default();
        for _ in 0..PRECOPIES {
            source
                .precopy(&mut checkpoint)
                .map_err(Unable::failed("copying live"))?;
        }
        let mut scanned = Scanned {
            source,
            checkpoint,
            pagemap: Pagemap::open(guest.pid()).map_err(Unable::failed("opening a page map"))?,
            range: guest.memory(memory_mib)?,
            found: Vec::new(),
            seen: Vec::new(),
            pauses: Vec::new(),
        };
        let [reference, value] = run.in_turn(&format!("{memory_mib} MiB"), self.rounds, |one| match one {
            0 => scanned.bare(),
            _ => scanned.capture(),
        })?;
        let (found, seen) = (middle(&scanned.found), middle(&scanned.seen));
        let pause_us = middle(&scanned.pauses) / 1000;
        if found < u64::from(self.pages) || seen == 0 {
            return Err(Unable::Wrong(format!(
                "of {} dirty pages {found} were found, and {seen} seen by the bare scan",
                self.pages
            )));
        }
        Box::new(scanned.source)
            .detach()
            .map_err(Unable::failed("detaching"))?;
        if let Some((value, reference)) = value.figure(Unit::US).zip(reference.figure(Unit::US)) {
            let a_gib = value.p50 * 1024.0 / float(memory_mib.into());
            let smaller = if memory_mib < wanted {
                format!("; {wanted} MiB were planned, and the machine has not as much")
            } else {
                String::new()
            };
            let at = [("memory_mib", memory_mib.into()), ("pages", self.pages.into())];
            let finding = Finding {
                case: "qemu".to_owned(),
                unit: Unit::US.name,
                value,
                reference: Some(("PAGEMAP_SCAN of the same memory".to_owned(), reference)),
                note: Some(format!(
                    "{a_gib:.0} us a GiB, {found} pages in a checkpoint, {seen} at a bare scan; the whole pause is {pause_us} us{smaller}"
                )),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        outside("memory_mib", self.memory_mib.into(), 256, 1 << 19)
            .or_else(|| outside("pages", self.pages.into(), 1, 65_536))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
    }
}
