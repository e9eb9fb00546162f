//! A stock QEMU as a standby: proven by a trial, waiting with its memory in the image's file, woken by a stream.
//!
//! ```text
//!   trial:    -S -incoming defer, mem-path=IMAGE,share=off, throwaway taps ── stream ──► "paused" ──► killed
//!   waiting:     -incoming defer, mem-path=IMAGE,share=on  ................... stream ──► RESUME: active
//! ```
//!
//! The stream carries device state and the small blocks; the main memory is in place. QEMU makes the taps itself, by the
//! names of [`Standby::taps`], so they vanish with it.
//!
//! Each machine is a process in a session of its own, without a parent-death signal: it outlives the agent. In its folder it has its
//! monitor's socket, by which the next agent, or a replicator that protects the guest again, finds it.

mod check;
mod leftover;
mod load;
mod monitor;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::fault;
use crate::host::processor;
use crate::launcher::Launcher;
use crate::process::Process;
use crate::qemu::cmdline::{CmdlineError, Derived, Plan, derive, taps_needed};
use crate::qemu::cpu::vcpus;
use crate::qemu::qmp::{Monitor, Qmp};
use crate::spec::{MachineSpec, QemuMachine};
use crate::standby::{ActivationReport, Committed, Standby, StandbyError, TrialReport};

use leftover::Found;

/// Where and how a standby runs.
#[derive(Clone, Debug)]
pub struct StandbyOptions {
    /// A folder of its own for sockets, logs and private files; made if it is missing.
    pub run_dir: PathBuf,
    /// The beginning of its taps' names, at most 11 bytes; "w0" or "t0" follows.
    pub tap_prefix: String,
    /// The name of the VM in the process list.
    pub name: String,
    /// Log the guest's first serial line to `serial` in the machine's folder. The log grows without limit.
    pub log_serial: bool,
    /// What starts it.
    pub launcher: Launcher,
    /// How long QEMU may take to start.
    pub start_timeout: Duration,
    /// How long it may take to load a checkpoint.
    pub load_timeout: Duration,
}

impl StandbyOptions {
    /// The defaults.
    pub fn new(run_dir: impl AsRef<Path>, tap_prefix: impl Into<String>) -> Self {
        Self {
            run_dir: run_dir.as_ref().to_owned(),
            tap_prefix: tap_prefix.into(),
            name: "standby".into(),
            log_serial: false,
            launcher: Launcher::Session,
            start_timeout: Duration::from_secs(15),
            load_timeout: Duration::from_secs(15),
        }
    }
}

/// A machine that waits: its process and its monitor.
struct Waiting {
    process: Process,
    qmp: Qmp,
}

enum State {
    Idle,
    Waiting(Box<Waiting>),
    Active(Process),
}

/// A standby of one machine.
pub struct QemuStandby {
    spec: MachineSpec,
    options: StandbyOptions,
    host_cpu: String,
    /// A guest was started from the image, and may be running in the folder.
    consumed: bool,
    taps: Vec<String>,
    changes: Vec<String>,
    /// A trial has shown that this QEMU's reading can be followed by the position of the stream's file.
    reads_in_order: bool,
    state: State,
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

fn against_the_rules(error: CmdlineError) -> StandbyError {
    StandbyError::new("no standby can be derived from the primary's command line", error)
}

impl QemuStandby {
    /// Checks that this host can be a standby for the machine: the rules, the files, the QEMU that is installed.
    ///
    /// What an earlier agent left in the folder: a machine that waits is ended, a guest that runs is adopted, so that the standby
    /// is active.
    ///
    /// # Errors
    /// What is missing or different here.
    pub fn prepare(spec: &MachineSpec, options: StandbyOptions) -> Result<Self, StandbyError> {
        let mut standby = Self::idle(spec, options)?;
        // First: whatever this host lacks by now, a guest that runs is here.
        standby.take_leftover()?;
        if standby.is_active() {
            return Ok(standby);
        }
        // The RAM's place is known later; everything else can be refused now.
        let plan = standby.plan(Purpose::Wait, Path::new("(the image)"));
        let derived = derive(spec, &plan).map_err(against_the_rules)?;
        check::files(standby.own(), &derived.files)?;
        standby.changes = derived.changes;
        Ok(standby)
    }

    /// The guest that an earlier agent let run from the image, if it still does. A machine that has never run is ended. What this host
    /// would need to start one is not looked at.
    ///
    /// # Errors
    /// When it can't be told whether it runs.
    pub fn adopt(spec: &MachineSpec, options: StandbyOptions) -> Result<Option<Self>, StandbyError> {
        let mut standby = Self::idle(spec, options)?;
        standby.consumed = true;
        standby.take_leftover()?;
        Ok(standby.is_active().then_some(standby))
    }

    fn idle(spec: &MachineSpec, options: StandbyOptions) -> Result<Self, StandbyError> {
        if spec.qemu().is_none() {
            return Err(StandbyError::plain(
                "the primary's machine is not QEMU's, so no QEMU can be its standby",
            ));
        }
        let count = taps_needed(spec).map_err(against_the_rules)?;
        let longest = Purpose::Wait.tap(&options.tap_prefix, count);
        if longest.len() > 15 {
            return Err(StandbyError::plain(format!(
                "the tap name {longest:?} is too long: shorten its prefix"
            )));
        }
        let taps = (0..count)
            .map(|n| Purpose::Wait.tap(&options.tap_prefix, n))
            .collect();
        Ok(Self {
            spec: spec.clone(),
            host_cpu: processor(),
            options,
            consumed: false,
            taps,
            changes: Vec::new(),
            reads_in_order: false,
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

    /// The folder of one machine.
    fn folder(&self, purpose: Purpose) -> PathBuf {
        self.options.run_dir.join(purpose.folder())
    }

    fn plan(&self, purpose: Purpose, main_ram: &Path) -> Plan {
        let folder = self.folder(purpose);
        let taps = (0..self.taps.len())
            .map(|n| purpose.tap(&self.options.tap_prefix, n))
            .collect();
        Plan {
            name: self.options.name.clone(),
            main_ram: main_ram.to_owned(),
            share: purpose == Purpose::Wait,
            taps,
            qmp: folder.join("qmp"),
            serial_log: self.options.log_serial.then(|| folder.join("serial")),
            private_dir: folder,
            host_cpu: self.host_cpu.clone(),
        }
    }

    /// Ends a machine that waits in our folder, left by an earlier agent; adopts a guest that runs.
    fn take_leftover(&mut self) -> Result<(), StandbyError> {
        for purpose in [Purpose::Trial, Purpose::Wait] {
            let folder = self.folder(purpose);
            let unknown =
                |error| StandbyError::new("a machine in the standby's folder cannot be asked", error);
            let (pid, runs) = match leftover::find(&folder.join("qmp"))? {
                Found::Nothing => continue,
                Found::Monitor(mut qmp) => {
                    let state = load::run_state(&mut qmp).map_err(unknown)?;
                    let never_ran =
                        state == "inmigrate" || (state != "running" && verify::is_pending(&folder));
                    (qmp.peer_pid().map_err(unknown)?, !never_ran)
                }
                // Only a guest that runs is of use to another client: a replicator that protects it from here.
                Found::Taken(pid) => (pid, self.consumed),
            };
            let mut process = Process::adopt("QEMU", pid, &folder)?;
            if purpose == Purpose::Wait && runs {
                verify::settle(&folder);
                self.state = State::Active(process);
            } else {
                // At once, and waited for: one that was about to load must not come to run while we look at its memory.
                process.kill();
            }
        }
        Ok(())
    }

    /// Starts a machine and waits for its monitor.
    fn start(&self, purpose: Purpose, main_ram: &Path) -> Result<Waiting, StandbyError> {
        let folder = self.folder(purpose);
        let failed =
            |source| StandbyError::new(format!("could not use the folder {}", folder.display()), source);
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(failed)?;
        }
        fs::create_dir_all(&folder).map_err(failed)?;
        let derived = derive(&self.spec, &self.plan(purpose, main_ram));
        let derived = derived.map_err(|error| StandbyError::new("no standby can be derived", error))?;
        for file in &derived.private_files {
            let made = fs::File::create(&file.path).and_then(|made| made.set_len(file.bytes));
            made.map_err(failed)?;
        }
        let Derived { mut argv, .. } = derived;
        if purpose == Purpose::Trial {
            argv.push("-S".into());
        }
        let mut process = Process::spawn("QEMU", &self.options.launcher, &argv, &folder)?;
        let mut qmp = monitor::connect(&mut process, &folder.join("qmp"), self.options.start_timeout)?;
        fault::point("standby.started");
        check::version(&self.spec, qmp.version())?;
        let silent = |error| process.error("it does not answer", error);
        let vcpus = vcpus(&mut qmp).map_err(&silent)?;
        check::cpu_features(&self.spec, &self.host_cpu, &vcpus.features)?;
        let state = load::run_state(&mut qmp).map_err(&silent)?;
        if state != "inmigrate" {
            return Err(StandbyError::plain(format!(
                "the standby is {state:?} instead of waiting for a checkpoint"
            )));
        }
        Ok(Waiting { process, qmp })
    }

    /// Has the waiting machine load the checkpoint, to run it or, when it is to be verified, to hold it. A machine that fails
    /// to do so is ended.
    fn load_guest(
        &self,
        machine: &mut Waiting,
        checkpoint: &Committed<'_>,
        consume: &mut dyn FnMut() -> Result<(), StandbyError>,
    ) -> Result<load::Loaded, StandbyError> {
        let mut goal = load::Goal::Running;
        let mut may_read = false;
        let stream = self.stream(checkpoint).map_err(StandbyError::untouched)?;
        if checkpoint.memory.is_some() {
            verify::hold(machine, &self.folder(Purpose::Wait)).map_err(StandbyError::untouched)?;
            goal = load::Goal::Paused;
        }
        let mut consume = || {
            consume()?;
            may_read = true;
            Ok(())
        };
        load::load(machine, &stream, goal, self.options.load_timeout, &mut consume).map_err(|error| {
            // No guest runs, and now none will: only then does the position of the stream say the last word.
            machine.process.kill();
            if !may_read || (self.reads_in_order && !stream.is_read()) {
                error.untouched()
            } else {
                error
            }
        })
    }

    fn own(&self) -> &QemuMachine {
        self.spec.qemu().expect("prepare refuses every other machine")
    }

    fn stream(&self, checkpoint: &Committed<'_>) -> Result<load::Stream, StandbyError> {
        load::Stream::of(&self.spec, &self.own().template, checkpoint)
    }

    fn main_ram<'a>(&self, ram: &'a [PathBuf]) -> Result<&'a Path, StandbyError> {
        if ram.len() != self.spec.layout.blocks().len() {
            return Err(StandbyError::plain(
                "the image has another number of RAM blocks than the machine",
            ));
        }
        Ok(&ram[usize::from(self.spec.main.0)])
    }
}

impl Standby for QemuStandby {
    fn trial_load(&mut self, checkpoint: &Committed<'_>) -> Result<TrialReport, StandbyError> {
        let begun = Instant::now();
        let mut machine = self.start(Purpose::Trial, self.main_ram(checkpoint.ram)?)?;
        let started = Instant::now();
        let goal = load::Goal::Paused;
        let stream = self.stream(checkpoint)?;
        let timeout = self.options.load_timeout;
        let loaded = load::load(&mut machine, &stream, goal, timeout, &mut || Ok(()));
        self.reads_in_order = loaded.is_ok() && stream.is_read();
        let load_us = micros(started.elapsed());
        let compared = loaded.and_then(|loaded| {
            let scratch = self.folder(Purpose::Trial).join("state");
            load::compare_devices(&mut machine, checkpoint.device_state, &scratch).map(|()| loaded)
        });
        machine.process.kill();
        // Its flash copies and sockets are of no use to anybody.
        let _ = fs::remove_dir_all(self.folder(Purpose::Trial));
        let loaded = compared?;
        Ok(TrialReport {
            start_us: micros(started - begun),
            load_us,
            stream_bytes: loaded.stream_bytes,
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
        let machine = self.start(Purpose::Wait, self.main_ram(ram)?)?;
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
        let folder = self.folder(Purpose::Wait);
        let loaded = self.load_guest(&mut machine, checkpoint, consume)?;
        let mut verify_us = None;
        if let Some(expected) = checkpoint.memory {
            let begun = Instant::now();
            verify::compare(&self.spec, &mut machine, checkpoint, expected)?;
            verify_us = Some(micros(begun.elapsed()));
            fault::point("standby.verified");
            verify::run(&mut machine, &folder, Instant::now() + self.options.load_timeout)?;
        }
        fault::point("standby.running");
        let report = ActivationReport {
            warm,
            start_us: if warm { 0 } else { micros(started - begun) },
            stream_us: micros(loaded.stream),
            verify_us,
            total_us: micros(begun.elapsed()),
            stream_bytes: loaded.stream_bytes,
        };
        let Waiting { mut process, qmp } = *machine;
        // The monitor takes one client at a time: leave it to whoever protects the guest next.
        drop(qmp);
        process.outlive();
        self.state = State::Active(process);
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
        (!matches!(self.state, State::Idle)).then(|| self.folder(Purpose::Wait).join("qmp"))
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

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::spec;

    #[test]
    fn a_trial_shares_neither_memory_nor_taps_nor_files_with_the_machine_that_waits() {
        let dir = tempfile::tempdir().unwrap();
        let argv = ["qemu-system-x86_64", "-nodefaults", "-netdev", "tap,id=n0"];
        let spec = spec(&argv, &[("pc.ram", 1 << 20)]);
        let standby = QemuStandby::prepare(&spec, StandbyOptions::new(dir.path(), "rom")).unwrap();
        let [trial, wait] = [Purpose::Trial, Purpose::Wait].map(|p| standby.plan(p, Path::new("/ram")));
        assert!(!trial.share && wait.share);
        assert_ne!(trial.taps, wait.taps);
        assert_ne!(trial.qmp, wait.qmp);
        assert_ne!(trial.private_dir, wait.private_dir);
    }

    #[test]
    fn a_tap_name_that_the_kernel_would_refuse_is_refused_before() {
        let spec = spec(
            &["qemu-system-x86_64", "-nodefaults", "-netdev", "tap,id=n0"],
            &[("pc.ram", 1 << 20)],
        );
        let error =
            QemuStandby::prepare(&spec, StandbyOptions::new("/nowhere", "a-prefix-of-16-b")).map(drop);
        assert!(error.unwrap_err().to_string().contains("too long"));
    }
}
