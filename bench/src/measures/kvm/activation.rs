//! `kvm.activation`: from the decision to take over until the guest runs on a standby that waits, all of whose memory is in place.
//!
//! A checkpoint of a working guest is taken once, and activated again and again, each time in a process of its own on a fresh copy
//! of its memory. The reference is giving the same state to a machine inside of this process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use romulus_guest_core::abi::{PROGRESS, Progress};
use romulus_host_sys::SharedView;
use romulus_hypervisor::kvm::standby::{KvmStandby, StandbyOptions};
use romulus_hypervisor::source::GuestSource;
use romulus_hypervisor::spec::MachineSpec;
use romulus_hypervisor::standby::{ActivationReport, Committed, Standby};
use romulus_types::PAGE_BYTES;
use serde::Deserialize;
use tempfile::TempDir;

use super::alone::Alone;
use super::guest::{Guest, Wanted};
use super::session::Session;
use super::{Mode, default_mode, dirty_problem, machine_problem};
use crate::measures::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::Unit;

/// Where images lie, as the agent's do.
const MEMORY_FOLDER: &str = "/dev/shm";
/// How long the guest works before its checkpoint.
const WORK: Duration = Duration::from_millis(500);
/// How long it may take until it is seen to go on.
const SIGN_LIMIT: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Activation {
    /// What the guest dirties.
    #[serde(default = "dirty")]
    dirty: String,
    #[serde(default = "default_mode")]
    tracking: Mode,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "one")]
    vcpus: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

fn dirty() -> String {
    "random:1024:25".to_owned()
}

const fn memory_mib() -> u32 {
    128
}

const fn one() -> u32 {
    1
}

const fn rounds() -> u32 {
    10
}

/// A committed checkpoint.
struct Saved {
    spec: MachineSpec,
    memory: Vec<u8>,
    state: Vec<u8>,
}

impl Saved {
    fn of(wanted: &Wanted) -> Result<Self, Unable> {
        let mut guest = Guest::start(wanted)?;
        guest.done()?;
        std::thread::sleep(WORK);
        let mut memory = vec![0; (wanted.memory_mib as usize) << 20];
        let mut put = |page: romulus_types::PageIndex, bytes: &[u8]| {
            let at = usize::try_from(page.0)
                .unwrap_or(usize::MAX)
                .saturating_mul(PAGE_BYTES);
            if let Some(into) = memory.get_mut(at..at + bytes.len()) {
                into.copy_from_slice(bytes);
            }
        };
        let mut session = Session::begin(&guest, &mut put)?;
        session.capture()?;
        for (page, bytes) in session.checkpoint.page_contents() {
            put(page, bytes);
        }
        let spec = session.source().machine().clone();
        let state = session.checkpoint.device_state.clone();
        session.end()?;
        Ok(Self { spec, memory, state })
    }

    /// Activates it in a process of its own, and ends that.
    fn activate(&self, folder: &Path) -> Result<ActivationReport, Unable> {
        let image = folder.join("ram");
        // A new file: the last one belongs to a guest that ran on it.
        let _ = std::fs::remove_file(&image);
        std::fs::write(&image, &self.memory).map_err(Unable::failed("writing the image"))?;
        let ram: [PathBuf; 1] = [image];
        let exe = std::env::current_exe().map_err(Unable::failed("finding this program"))?;
        let exe = exe
            .to_str()
            .ok_or_else(|| Unable::Wrong("this program's path is no text".to_owned()))?;
        let command = [exe, "testbed", "standby"].map(str::to_owned).to_vec();
        let mut standby = KvmStandby::prepare(
            &self.spec,
            StandbyOptions::new(folder.join("run"), "rbench", command),
        )
        .map_err(Unable::failed("preparing a standby"))?;
        let outcome = self.take_over(&mut standby, &ram);
        standby.kill();
        outcome
    }

    fn take_over(&self, standby: &mut KvmStandby, ram: &[PathBuf]) -> Result<ActivationReport, Unable> {
        standby
            .start_waiting(ram)
            .map_err(Unable::failed("starting a standby"))?;
        let committed = Committed {
            ram,
            device_state: &self.state,
            memory: None,
        };
        let report = standby
            .activate(&committed, &mut || Ok(()))
            .map_err(Unable::failed("activating a standby"))?;
        if !report.warm {
            return Err(Unable::Wrong("the standby had not been waiting".to_owned()));
        }
        if !self.goes_on(&ram[0])? {
            let end = standby.guest_end().unwrap_or_else(|| "its VMM runs".to_owned());
            return Err(Unable::Wrong(format!(
                "the guest did not go on after its activation: {end}"
            )));
        }
        Ok(report)
    }

    /// An activation counts only when the guest is then seen to work.
    fn goes_on(&self, image: &Path) -> Result<bool, Unable> {
        let file = File::open(image).map_err(Unable::failed("opening the image"))?;
        let view = SharedView::map(&file, 0, self.memory.len() as u64)
            .map_err(Unable::failed("mapping the image"))?;
        let look = || -> Result<Option<Progress>, Unable> {
            let mut bytes = [0; Progress::BYTES];
            view.copy_to(PROGRESS, &mut bytes)
                .map_err(Unable::failed("reading the image"))?;
            Ok(Progress::from_bytes(&bytes))
        };
        let (before, begun) = (look()?, Instant::now());
        while begun.elapsed() < SIGN_LIMIT {
            let now = look()?;
            if now.is_some() && now != before {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Unable::Wrong(
            "the guest did not go on after its activation".to_owned(),
        ))
    }
}

impl Measure for Activation {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let wanted = Wanted {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            mode: self.tracking,
            words: format!("progress=on log=off dirty={}", self.dirty),
        };
        run.say("taking a checkpoint");
        let saved = Saved::of(&wanted)?;
        let folder: TempDir = tempfile::Builder::new()
            .prefix("romulus-bench-")
            .tempdir_in(MEMORY_FOLDER)
            .map_err(Unable::failed("making a folder in /dev/shm"))?;
        let mut alone = Alone::build_still(&wanted)?;
        let mut restores_us = Vec::new();
        let [reference, value] = run.in_turn("activations", self.rounds, |one| match one {
            0 => alone.restore(&saved.state),
            _ => {
                let report = saved.activate(folder.path())?;
                restores_us.push(report.stream_us);
                Ok(report.total_us * 1000)
            }
        })?;
        restores_us.sort_unstable();
        let restore_us = restores_us.get(restores_us.len() / 2).copied().unwrap_or(0);
        if let Some((value, reference)) = value.figure(Unit::US).zip(reference.figure(Unit::US)) {
            let at = [
                ("dirty", (&self.dirty).into()),
                ("tracking", self.tracking.name().into()),
                ("memory_mib", self.memory_mib.into()),
                ("vcpus", self.vcpus.into()),
            ];
            let finding = Finding {
                case: String::new(),
                unit: Unit::US.name,
                value,
                reference: Some(("restoring the state alone".to_owned(), reference)),
                note: Some(format!(
                    "{} bytes of state, which take {restore_us} us of it; nothing left to apply",
                    saved.state.len()
                )),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        machine_problem(self.memory_mib, self.vcpus)
            .or_else(|| {
                (self.memory_mib > 3072).then(|| "memory_mib must be at most 3072, in one piece".to_owned())
            })
            .or_else(|| dirty_problem(&self.dirty))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 100_000))
    }
}
