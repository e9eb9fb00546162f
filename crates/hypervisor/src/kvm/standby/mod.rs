//! A VMM that embeds the attach library as a standby: proven by a trial, waiting with its memory on the image's files.
//!
//! ```text
//!   trial:    role Empty ── Prepare(private) ──► Prepared ── Restore ──► killed
//!   waiting:  role Empty ── Prepare(shared) ───► Prepared ── (verify), consume, Restore, Activate ──► Running: active
//! ```
//!
//! Until `Activate` the guest runs no instruction and nothing writes its memory: an agent that dies before it leaves an image that is
//! the checkpoint to the bit. Once the VMM has been told, it lets the guest run, whatever becomes of the agent.
//!
//! What is run is the operator's command for this kind of VMM; we append the socket and the names of the taps, which the VMM makes
//! itself, so that they vanish with it. Of the peer's words only the machine's description reaches it, as a message.
//!
//! Each machine is a process in a session of its own that outlives the agent. In its folder it has its attach socket, by which the
//! next agent, or a replicator that protects the guest again, finds it.

mod machine;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use romulus_host_sys::read_maps;
use romulus_page_codec::ImageDigest;
use romulus_types::BlockId;
use romulus_vmm_attach::proto::{MachineInfo, Region};

use crate::fault;
use crate::host::processor;
use crate::launcher::Launcher;
use crate::memory_check::{add_file, judge, shared_mappings, unreadable};
use crate::process::Process;
use crate::spec::{Hypervisor, KvmMachine, MachineSpec};
use crate::standby::{ActivationReport, Committed, Standby, StandbyError, TrialReport};
use machine::{Found, Machine};

/// Where and how a standby runs.
#[derive(Clone, Debug)]
pub struct StandbyOptions {
    /// A folder of its own for its socket; made if it is missing.
    pub run_dir: PathBuf,
    /// The beginning of its taps' names, at most 11 bytes; "w0" or "t0" follows.
    pub tap_prefix: String,
    /// The operator's command for a standby of this kind of VMM: a program by its absolute path, and its first arguments.
    pub command: Vec<String>,
    /// What starts it.
    pub launcher: Launcher,
    /// How long it may take to start.
    pub start_timeout: Duration,
    /// How long it may take to build a machine, to load a checkpoint and to run it, each.
    pub load_timeout: Duration,
}

impl StandbyOptions {
    /// The defaults.
    pub fn new(run_dir: impl AsRef<Path>, tap_prefix: impl Into<String>, command: Vec<String>) -> Self {
        Self {
            run_dir: run_dir.as_ref().to_owned(),
            tap_prefix: tap_prefix.into(),
            command,
            launcher: Launcher::Session,
            start_timeout: Duration::from_secs(15),
            load_timeout: Duration::from_secs(15),
        }
    }
}

/// The two machines that a standby starts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Trial,
    Wait,
}

impl Purpose {
    fn folder(self) -> &'static str {
        match self {
            Self::Trial => "trial",
            Self::Wait => "machine",
        }
    }

    fn tap(self, prefix: &str, number: usize) -> String {
        let letter = if self == Self::Trial { 't' } else { 'w' };
        format!("{prefix}{letter}{number}")
    }
}

enum State {
    Idle,
    Waiting(Box<Machine>),
    Active(Process),
}

/// A standby of one machine.
pub struct KvmStandby {
    spec: MachineSpec,
    own: KvmMachine,
    options: StandbyOptions,
    taps: Vec<String>,
    changes: Vec<String>,
    state: State,
}

impl KvmStandby {
    /// Checks that this host can be a standby for the machine.
    ///
    /// What an earlier agent left in the folder: a machine that waits is ended, a guest that runs is adopted, so that the standby
    /// is active.
    ///
    /// # Errors
    /// What is missing or different here.
    pub fn prepare(spec: &MachineSpec, options: StandbyOptions) -> Result<Self, StandbyError> {
        let mut standby = Self::idle(spec, options)?;
        standby.take_leftover()?;
        if standby.is_active() {
            return Ok(standby);
        }
        let vmm = &standby.own.vmm;
        check_command(vmm, &standby.options.command)?;
        let here = processor();
        if spec.host_cpu != here {
            // KVM's guest sees the processor itself; whether it lacks something shows only when the guest uses it.
            return Err(StandbyError::plain(format!(
                "the primary's processor is {:?} and this host's {here:?}: a guest of {vmm} needs the same on both",
                spec.host_cpu
            )));
        }
        Ok(standby)
    }

    /// The guest that an earlier agent let run from the image, if it still does. A machine that has never run is ended. What this host
    /// would need to start one is not looked at, the options' command among it.
    ///
    /// # Errors
    /// When it can't be told whether it runs.
    pub fn adopt(spec: &MachineSpec, options: StandbyOptions) -> Result<Option<Self>, StandbyError> {
        let mut standby = Self::idle(spec, options)?;
        standby.take_leftover()?;
        Ok(standby.is_active().then_some(standby))
    }

    fn idle(spec: &MachineSpec, options: StandbyOptions) -> Result<Self, StandbyError> {
        let Hypervisor::Kvm(own) = &spec.hypervisor else {
            return Err(StandbyError::plain(
                "the primary's machine is no VMM's that can be attached to, so none can be its standby",
            ));
        };
        let names = |purpose: Purpose| {
            let prefix = options.tap_prefix.clone();
            (0..spec.nics.len()).map(move |number| purpose.tap(&prefix, number))
        };
        let taps: Vec<String> = names(Purpose::Wait).collect();
        if let Some(longest) = taps.iter().find(|tap| tap.len() > 15) {
            return Err(StandbyError::plain(format!(
                "the tap name {longest:?} is too long: shorten its prefix"
            )));
        }
        let changes = names(Purpose::Wait)
            .zip(&spec.nics)
            .map(|(tap, nic)| format!("network {} is the tap {tap}", nic.name))
            .chain(
                spec.disks
                    .iter()
                    .map(|disk| format!("disk {} is empty: it was declared disposable", disk.id)),
            );
        Ok(Self {
            spec: spec.clone(),
            own: own.clone(),
            taps,
            changes: changes.collect(),
            options,
            state: State::Idle,
        })
    }

    /// Forgets the machine without ending it: the agent ends and the next one finds it in the folder.
    pub fn abandon(mut self) {
        match &mut self.state {
            State::Waiting(machine) => machine.process.outlive(),
            State::Active(process) => process.outlive(),
            State::Idle => {}
        }
    }

    fn folder(&self, purpose: Purpose) -> PathBuf {
        self.options.run_dir.join(purpose.folder())
    }

    /// Ends a machine that waits in our folder, left by an earlier agent; adopts a guest that runs.
    fn take_leftover(&mut self) -> Result<(), StandbyError> {
        for purpose in [Purpose::Trial, Purpose::Wait] {
            let folder = self.folder(purpose);
            let adopt = |pid| Process::adopt(&self.own.vmm, pid, &folder);
            match machine::find(&folder)? {
                Found::Nothing => {}
                Found::Guest(pid) if purpose == Purpose::Wait => self.state = State::Active(adopt(pid)?),
                // At once, and waited for: it must not come to run while we look at its memory.
                Found::Guest(pid) | Found::NeverRan(pid) => adopt(pid)?.kill(),
            }
        }
        Ok(())
    }

    /// The machine as a VMM is told to build it.
    fn info(&self, purpose: Purpose) -> MachineInfo {
        let regions = self.spec.layout.blocks().iter().zip(&self.own.gpas);
        let nics = self.spec.nics.iter().enumerate();
        MachineInfo {
            vmm: self.own.vmm.clone(),
            vmm_version: self.spec.version.clone(),
            vcpus: u16::try_from(self.spec.vcpus).unwrap_or(u16::MAX),
            regions: regions
                .map(|(block, gpa)| Region {
                    name: block.name.clone(),
                    gpa: *gpa,
                    bytes: block.bytes,
                    fd_offset: 0,
                })
                .collect(),
            nics: nics
                .map(|(number, nic)| romulus_vmm_attach::proto::Nic {
                    name: nic.name.clone(),
                    mac: nic.mac,
                    tap: purpose.tap(&self.options.tap_prefix, number),
                })
                .collect(),
            disks: self
                .spec
                .disks
                .iter()
                .map(|disk| romulus_vmm_attach::proto::Disk {
                    id: disk.id.clone(),
                    bytes: disk.bytes,
                    path: String::new(),
                })
                .collect(),
            outputs: Vec::new(),
            tracking: self.own.tracking,
            config: self.own.config.clone(),
        }
    }

    /// Starts a VMM and has it build the machine on the image's files.
    fn start(&self, purpose: Purpose, ram: &[PathBuf]) -> Result<Machine, StandbyError> {
        if ram.len() != self.spec.layout.blocks().len() {
            return Err(StandbyError::plain(
                "the image has another number of RAM blocks than the machine",
            ));
        }
        let info = self.info(purpose);
        let mut machine = Machine::start(&info, &self.folder(purpose), &self.options)?;
        machine.build(&info, ram, purpose == Purpose::Trial)?;
        Ok(machine)
    }

    /// Compares all memory of a machine that is about to load the checkpoint with the digest of the commit, if that is asked for. How
    /// long it took, in microseconds.
    fn verify(&self, machine: &Machine, checkpoint: &Committed<'_>) -> Result<Option<u64>, StandbyError> {
        let Some(expected) = checkpoint.memory else {
            return Ok(None);
        };
        let begun = Instant::now();
        let maps = read_maps(machine.process.pid())
            .map_err(|error| StandbyError::new("the standby's mappings cannot be read", error))?;
        let mut image = ImageDigest::ZERO;
        for (position, (block, path)) in self.spec.layout.blocks().iter().zip(checkpoint.ram).enumerate() {
            if shared_mappings(&maps, path, block.bytes)?.next().is_none() {
                return Err(StandbyError::plain(format!(
                    "the standby's memory {} is not the file {}: the guest was not started",
                    block.name,
                    path.display()
                )));
            }
            let id = BlockId(u16::try_from(position).expect("BLOCKS_MAX fits in 16 bits"));
            let first = self.spec.layout.first_page(id);
            add_file(&mut image, path, block.bytes, first).map_err(|error| unreadable(path, error))?;
        }
        judge(&image, expected)?;
        fault::point("standby.verified");
        Ok(Some(micros(begun.elapsed())))
    }
}

impl Standby for KvmStandby {
    fn trial_load(&mut self, checkpoint: &Committed<'_>) -> Result<TrialReport, StandbyError> {
        let begun = Instant::now();
        let mut machine = self.start(Purpose::Trial, checkpoint.ram)?;
        let started = Instant::now();
        fault::point("standby.before_stream");
        fault::point("standby.in_stream");
        let loaded = machine.restore(checkpoint.device_state);
        fault::point("standby.loaded");
        machine.process.kill();
        // Its socket is of no use to anybody.
        let _ = fs::remove_dir_all(self.folder(Purpose::Trial));
        loaded?;
        Ok(TrialReport {
            start_us: micros(started - begun),
            load_us: micros(started.elapsed()),
            stream_bytes: checkpoint.device_state.len() as u64,
        })
    }

    fn start_waiting(&mut self, ram: &[PathBuf]) -> Result<(), StandbyError> {
        if matches!(self.state, State::Active(_)) {
            return Err(StandbyError::plain("the guest runs here already"));
        }
        if self.is_waiting() {
            return Ok(());
        }
        self.state = State::Idle;
        let machine = self.start(Purpose::Wait, ram)?;
        self.state = State::Waiting(Box::new(machine));
        Ok(())
    }

    fn activate(
        &mut self,
        checkpoint: &Committed<'_>,
        consume: &mut dyn FnMut() -> Result<(), StandbyError>,
    ) -> Result<ActivationReport, StandbyError> {
        let begun = Instant::now();
        let warm = self.is_waiting();
        self.start_waiting(checkpoint.ram)
            .map_err(StandbyError::untouched)?;
        let started = Instant::now();
        let State::Waiting(mut machine) = std::mem::replace(&mut self.state, State::Idle) else {
            unreachable!("start_waiting leaves a machine waiting")
        };
        // From here on an error ends the machine: it is dropped.
        fault::point("standby.before_stream");
        let verify_us = self.verify(&machine, checkpoint)?;
        consume().map_err(StandbyError::untouched)?;
        fault::point("standby.in_stream");
        let begun_loading = Instant::now();
        machine
            .restore(checkpoint.device_state)
            .map_err(StandbyError::untouched)?;
        let loaded = begun_loading.elapsed();
        fault::point("standby.loaded");
        machine.activate()?;
        fault::point("standby.running");
        let report = ActivationReport {
            warm,
            start_us: if warm { 0 } else { micros(started - begun) },
            stream_us: micros(loaded),
            verify_us,
            total_us: micros(begun.elapsed()),
            stream_bytes: checkpoint.device_state.len() as u64,
        };
        // The socket takes one client at a time: it is left to whoever protects the guest next.
        self.state = State::Active(machine.leave());
        Ok(report)
    }

    fn is_waiting(&mut self) -> bool {
        match &mut self.state {
            State::Waiting(machine) => machine.process.is_alive(),
            _ => false,
        }
    }

    fn is_active(&mut self) -> bool {
        match &mut self.state {
            State::Active(process) => process.is_alive(),
            _ => false,
        }
    }

    fn guest_end(&mut self) -> Option<String> {
        match &mut self.state {
            State::Active(process) => process.end(),
            _ => None,
        }
    }

    fn pid(&self) -> Option<u32> {
        match &self.state {
            State::Idle => None,
            State::Waiting(machine) => Some(machine.process.pid()),
            State::Active(process) => Some(process.pid()),
        }
    }

    fn taps(&self) -> &[String] {
        &self.taps
    }

    fn control_path(&self) -> Option<PathBuf> {
        (!matches!(self.state, State::Idle)).then(|| machine::socket(&self.folder(Purpose::Wait)))
    }

    fn differences(&self) -> &[String] {
        &self.changes
    }

    fn dismiss(&mut self) {
        if matches!(self.state, State::Waiting(_)) {
            // The drop of a process that is not told to outlive us ends it.
            self.state = State::Idle;
        }
    }

    fn kill(&mut self) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => {}
            State::Waiting(mut machine) => machine.process.kill(),
            State::Active(mut process) => process.kill(),
        }
    }
}

/// The command must be there before a session is begun that would need it.
fn check_command(vmm: &str, command: &[String]) -> Result<(), StandbyError> {
    let program = command.first().map(Path::new).filter(|path| path.is_absolute());
    let program = program.ok_or_else(|| {
        StandbyError::plain(format!(
            "the command for a standby of {vmm} names no program by its absolute path"
        ))
    })?;
    let found = fs::metadata(program).map_err(|error| {
        let what = format!(
            "the standby of {vmm} is {}, which is not there (setting vmm)",
            program.display()
        );
        StandbyError::new(what, error)
    })?;
    if found.is_file() {
        Ok(())
    } else {
        Err(StandbyError::plain(format!(
            "the standby of {vmm} is {}, which is no program (setting vmm)",
            program.display()
        )))
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
