//! `harvest.large`: finding the few pages that a guest with much memory has written, against the same of a small guest.
//!
//! The machines are inside of this process, with nobody between us and KVM. A harvest is what a checkpoint needs: asking the kernel, protecting
//! the pages again, and taking their numbers out of the bitmap that VMM and replicator share.

use std::ffi::OsString;
use std::fs;
use std::time::{Duration, Instant};

use clap::Parser;
use romulus_guest_core::abi::{PROGRESS, Progress};
use romulus_host_sys::{SharedView, priority};
use romulus_testbed::cli::{Cli, Command};
use romulus_testbed::machine::Devices;
use romulus_vmm_attach::kvm::{KvmParts, Moment};
use serde::Deserialize;

use super::guest::need_kvm;
use super::{Mode, default_mode, machine_problem};
use crate::measures::{Measure, outside};
use crate::run::{Effort, Finding, Run, Unable, timed};
use crate::stats::Unit;

const STOP_LIMIT: Duration = Duration::from_secs(60);
const ROUND_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_micros(50);
/// Of the guest that it is compared with.
const SMALL_MIB: u32 = 1024;
/// What is left for everybody else.
const LEFT_MIB: u32 = 3072;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Large {
    /// Memory of the large guest, all of which is there. On a machine with less, as many whole GiB as it has.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    /// Pages that the guest dirties in 25 ms. Before each harvest it does so once, or a little more.
    #[serde(default = "pages")]
    pages: u32,
    #[serde(default = "default_mode")]
    tracking: Mode,
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

/// A machine that stands still between two samples.
struct Machine {
    parts: KvmParts<Devices>,
    memory: Vec<SharedView>,
    /// Bursts that the guest has completed.
    bursts: u64,
    found: Vec<u64>,
}

impl Machine {
    fn build(memory_mib: u32, pages: u32, tracking: Mode) -> Result<Self, Unable> {
        need_kvm()?;
        let words = [
            "testbed".to_owned(),
            "run".to_owned(),
            format!("--memory={memory_mib}"),
            format!("--tracking={}", tracking.name()),
            format!("--cmdline=progress=on check=off log=off dirty=random:{pages}:25"),
        ];
        let cli = Cli::try_parse_from(words.map(OsString::from))
            .map_err(Unable::failed("giving the test VMM its settings"))?;
        let Command::Run(options) = cli.command else {
            return Err(Unable::Wrong(
                "the test VMM took `run` for something else".to_owned(),
            ));
        };
        let mut parts =
            romulus_testbed::run::build(&options).map_err(Unable::failed("building a machine"))?;
        let mut memory = Vec::new();
        for (region, file) in parts.ram.regions().iter().zip(parts.ram.files()) {
            let view = SharedView::map(file, region.fd_offset, region.bytes)
                .map_err(Unable::failed("mapping the guest's memory"))?;
            view.populate(0, region.bytes);
            memory.push(view);
        }
        parts.tracker.arm().map_err(Unable::failed("starting to track"))?;
        Ok(Self {
            parts,
            memory,
            bursts: 0,
            found: Vec::new(),
        })
    }

    fn progress(&self) -> Result<Option<Progress>, Unable> {
        let mut bytes = [0; Progress::BYTES];
        let first = self
            .memory
            .first()
            .ok_or_else(|| Unable::Wrong("the machine has no memory".to_owned()))?;
        first
            .copy_to(PROGRESS, &mut bytes)
            .map_err(Unable::failed("reading the guest's progress"))?;
        Ok(Progress::from_bytes(&bytes))
    }

    /// Lets the guest dirty its pages, stops it, and takes the time of a harvest in nanoseconds.
    fn harvest(&mut self, at_least: u32) -> Result<u64, Unable> {
        self.parts.vcpus.run();
        let begun = Instant::now();
        // It may have been stopped in the middle of one: the one after that is whole.
        let enough = self.bursts + 2;
        while self.bursts < enough {
            match self.progress()? {
                Some(progress) if progress.dirty_rounds >= enough => self.bursts = progress.dirty_rounds,
                _ if begun.elapsed() > ROUND_LIMIT => {
                    return Err(Unable::Wrong("the guest does not go on".to_owned()));
                }
                _ => std::thread::sleep(POLL),
            }
        }
        priority::raise();
        let done = self.take();
        priority::lower();
        let time_ns = done?;
        // A random choice hits a page twice now and then.
        if self.found.len() < at_least as usize * 9 / 10 {
            return Err(Unable::Wrong(format!(
                "of {at_least} dirty pages {} were found",
                self.found.len()
            )));
        }
        Ok(time_ns)
    }

    fn take(&mut self) -> Result<u64, Unable> {
        self.parts
            .vcpus
            .stop(STOP_LIMIT)
            .map_err(Unable::failed("stopping the vCPUs"))?;
        let bitmap = self.parts.ram.bitmap().clone();
        let words = usize::try_from(bitmap.pages().div_ceil(64)).map_err(Unable::failed("counting words"))?;
        self.found.clear();
        let mut done = Ok(());
        let time_ns = timed(|| {
            done = self.parts.tracker.harvest(Moment::Paused, &bitmap);
            for word in 0..words {
                let bits = bitmap.take(word);
                if bits != 0 {
                    let set = (0..64).filter(|bit| bits >> bit & 1 == 1);
                    self.found.extend(set.map(|bit| word as u64 * 64 + bit));
                }
            }
        });
        done.map_err(Unable::failed("harvesting dirty pages"))?;
        Ok(time_ns)
    }
}

/// Whole GiB that can be taken, up to `wanted`.
pub(in crate::measures) fn affordable_mib(wanted: u32) -> Result<u32, Unable> {
    let text = fs::read_to_string("/proc/meminfo").map_err(Unable::failed("reading what the kernel says"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let available = kib.map_or(0, |kib| u32::try_from(kib >> 10).unwrap_or(u32::MAX));
    let room = available.saturating_sub(LEFT_MIB + SMALL_MIB);
    if room >= wanted {
        return Ok(wanted);
    }
    match room / 1024 * 1024 {
        0 => Err(Unable::Missing {
            what: format!("{available} MiB of memory are available"),
            remedy: format!("give it {} MiB", LEFT_MIB + SMALL_MIB + 1024),
        }),
        room => Ok(room),
    }
}

impl Measure for Large {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        // Only whether it runs: no need to fill the machine's memory for that.
        let wanted = match run.effort() {
            Effort::Shortest => SMALL_MIB,
            Effort::Quick | Effort::Full => self.memory_mib,
        };
        let memory_mib = affordable_mib(wanted)?;
        run.say(format!("building a guest with {memory_mib} MiB"));
        let mut small = Machine::build(SMALL_MIB, self.pages, self.tracking)?;
        let mut large = Machine::build(memory_mib, self.pages, self.tracking)?;
        // What was written since the machine was made.
        small.harvest(0)?;
        large.harvest(0)?;
        let [reference, value] = run.in_turn(&format!("{memory_mib} MiB"), self.rounds, |one| match one {
            0 => small.harvest(self.pages),
            _ => large.harvest(self.pages),
        })?;
        if let Some((value, reference)) = value.figure(Unit::US).zip(reference.figure(Unit::US)) {
            let at = [
                ("memory_mib", memory_mib.into()),
                ("pages", self.pages.into()),
                ("tracking", self.tracking.name().into()),
            ];
            let smaller = if memory_mib < wanted {
                format!("; {wanted} MiB were planned, and the machine has not as much")
            } else {
                String::new()
            };
            let finding = Finding {
                case: "kvm".to_owned(),
                unit: Unit::US.name,
                value,
                reference: Some((format!("a guest of {SMALL_MIB} MiB"), reference)),
                note: Some(format!(
                    "{} pages found in {memory_mib} MiB{smaller}",
                    large.found.len()
                )),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        machine_problem(self.memory_mib, 1)
            .or_else(|| outside("memory_mib", self.memory_mib.into(), SMALL_MIB.into(), 1 << 19))
            .or_else(|| outside("pages", self.pages.into(), 1, 65_536))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
            .or_else(|| {
                (self.tracking == Mode::Ring)
                    .then(|| "tracking = \"ring\": nobody empties full rings of the machine".to_owned())
            })
    }
}
