//! `kvm.pause`: how long a guest stands still for a checkpoint, against the sum of what has to be done meanwhile.
//!
//! Two machines of the same shape and the same guest: one is attached to, as the replicator does it; the other is inside of this process,
//! where kick, harvest, saving the state and copying the same number of pages, as far apart, are timed one after the other. While one
//! guest dirties its pages the other one stands still.

use std::time::Duration;

use romulus_hypervisor::source::CaptureReport;
use serde::Deserialize;

use super::alone::{Alone, PartsNs};
use super::guest::{Guest, Wanted};
use super::session::Session;
use super::{Mode, default_mode, machine_problem};
use crate::measures::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::{Unit, float};

/// How long a guest that writes nothing runs between two checkpoints.
const IDLE: Duration = Duration::from_millis(25);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pause {
    /// Pages that the guest dirties before each checkpoint; each a row.
    #[serde(default = "pages")]
    pages: Vec<u32>,
    #[serde(default = "default_mode")]
    tracking: Mode,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "one")]
    vcpus: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

fn pages() -> Vec<u32> {
    vec![0, 64, 1024, 4096, 16384]
}

const fn memory_mib() -> u32 {
    1024
}

const fn one() -> u32 {
    1
}

const fn rounds() -> u32 {
    30
}

/// Dirties so many pages in a burst, all over its memory, and then sleeps for at least as long again.
fn words(pages: u32) -> String {
    match pages {
        0 => "check=off log=off dirty=off".to_owned(),
        _ => format!(
            "progress=on check=off log=off dirty=random:{pages}:{}",
            25 + pages / 64
        ),
    }
}

/// The two machines.
struct Pair {
    guest: Guest,
    session: Session,
    alone: Alone,
    /// Bursts that each guest has completed.
    rounds: [u64; 2],
    parts: Vec<PartsNs>,
    reports: Vec<CaptureReport>,
}

impl Pair {
    fn start(wanted: &Wanted) -> Result<Self, Unable> {
        let guest = Guest::start(wanted)?;
        let mut session = Session::begin(&guest, |_, _| {})?;
        session.capture()?;
        session.hold()?;
        let mut alone = Alone::build(wanted)?;
        alone.take_apart()?;
        Ok(Self {
            guest,
            session,
            alone,
            rounds: [0; 2],
            parts: Vec::new(),
            reports: Vec::new(),
        })
    }

    /// The whole pause, in nanoseconds: from the kick until the vCPUs run.
    fn pause(&mut self, pages: u32) -> Result<u64, Unable> {
        self.session.go_on()?;
        match pages {
            0 => std::thread::sleep(IDLE),
            _ => self.rounds[0] = self.guest.next_round(self.rounds[0])?.dirty_rounds,
        }
        let report = self.session.capture()?;
        self.session.hold()?;
        self.reports.push(report);
        Ok(report.kick_ns + report.pause_ns)
    }

    /// Its parts alone, in nanoseconds.
    fn parts(&mut self, pages: u32) -> Result<u64, Unable> {
        match pages {
            0 => self.alone.let_sleep(IDLE),
            _ => {
                let before = self.rounds[1];
                let rounds = &mut self.rounds[1];
                self.alone.let_run(Duration::ZERO, |progress| {
                    *rounds = progress.dirty_rounds;
                    progress.dirty_rounds > before
                })?;
            }
        }
        let parts = self.alone.take_apart()?;
        self.parts.push(parts);
        Ok(parts.sum())
    }

    /// The medians of the parts, in words.
    fn describe(&self) -> String {
        let alone = |of: fn(&PartsNs) -> u64| middle(self.parts.iter().map(of));
        let here = |of: fn(&CaptureReport) -> u64| middle(self.reports.iter().map(of));
        let us = |ns: u64| float(ns) / 1e3;
        format!(
            "alone: {} pages, kick {:.0} us, harvest {:.0}, state {:.0}, copy {:.0}; pause: {} pages, kick {:.0}, until we \
             know {:.0}, scan {:.0}, copy {:.0}, rest {:.0}",
            alone(|parts| parts.dirty_pages),
            us(alone(|parts| parts.kick)),
            us(alone(|parts| parts.harvest)),
            us(alone(|parts| parts.state)),
            us(alone(|parts| parts.copy)),
            here(|report| report.dirty_pages),
            us(here(|report| report.kick_ns)),
            us(here(|report| report.stop_ns)),
            us(here(|report| report.scan_ns)),
            us(here(|report| report.copy_ns)),
            us(here(|report| report.resume_ns)),
        )
    }
}

/// The median.
fn middle(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

impl Measure for Pause {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        for pages in &self.pages {
            let wanted = Wanted {
                memory_mib: self.memory_mib,
                vcpus: self.vcpus,
                mode: self.tracking,
                words: words(*pages),
            };
            run.say(format!("{pages} pages: starting"));
            let mut pair = Pair::start(&wanted)?;
            let [parts, pause] = run.in_turn(&format!("{pages} pages"), self.rounds, |one| match one {
                0 => pair.parts(*pages),
                _ => pair.pause(*pages),
            })?;
            if let Some((value, reference)) = pause.figure(Unit::US).zip(parts.figure(Unit::US)) {
                let at = [
                    ("pages", (*pages).into()),
                    ("tracking", self.tracking.name().into()),
                    ("memory_mib", self.memory_mib.into()),
                    ("vcpus", self.vcpus.into()),
                ];
                let finding = Finding {
                    case: pages.to_string(),
                    unit: Unit::US.name,
                    value,
                    reference: Some(("kick + harvest + state + memcpy alone".to_owned(), reference)),
                    note: Some(pair.describe()),
                };
                run.found_at(at, finding);
            }
            pair.session.end()?;
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let most = u64::from(self.memory_mib) * 256 / 4;
        let mut pages = self.pages.iter();
        machine_problem(self.memory_mib, self.vcpus)
            .or_else(|| {
                (self.memory_mib > 3072).then(|| "memory_mib must be at most 3072, in one piece".to_owned())
            })
            .or_else(|| {
                (self.tracking == Mode::Ring)
                    .then(|| "tracking = \"ring\": nobody empties full rings of the machine alone".to_owned())
            })
            .or_else(|| pages.find_map(|pages| outside("pages", (*pages).into(), 0, most)))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
    }
}
