//! Attaching to a running QEMU, and leaving it.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use romulus_host_sys::{CallStage, SysError, create_in_process, probe_kernel, read_maps};
use serde_json::{Value, json};

use super::describe::describe;
use super::error::{AttachError, CaptureError};
use super::guardian::{Drainer, Guardian, GuardianArgs};
use super::halt::Halt;
use super::lair::Lair;
use super::notes::{Notes, StoppedBy};
use super::options::AttachOptions;
use super::pause::Pauser;
use super::placement::{Wanted, place};
use super::refusal::{Facts, check, monitors};
use super::tracker::Tracker;
use crate::fault;
use crate::qemu::bootstrap::{self, Bootstrap, MigrationSettings, bootstrap, rescue};
use crate::qemu::qmp::{Monitor, Qmp, QmpError, peer_of};
use crate::source::GuestEvent;
use crate::spec::MachineSpec;

/// How long QEMU may take to greet: a guardian may have to free it first.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// A bootstrap does much in its pauses; its kill timer has so many times the limit of a capture.
const BOOTSTRAP_LIMIT_FACTOR: u64 = 5;

/// A running QEMU that checkpoints are taken of.
pub struct QemuSource {
    pub(super) monitor: Qmp,
    pub(super) pid: u32,
    pub(super) options: AttachOptions,
    pub(super) pauser: Pauser,
    pub(super) tracker: Option<Tracker>,
    pub(super) guardian: Guardian,
    pub(super) guardian_args: GuardianArgs,
    pub(super) learnt: Bootstrap,
    pub(super) machine: MachineSpec,
    pub(super) events: VecDeque<GuestEvent>,
    /// The bootstrap of attach, or of the last session, still tells the truth.
    pub(super) learnt_is_fresh: bool,
    pub(super) armed: bool,
    /// Pages that the next checkpoint has room for before its pause.
    pub(super) room_pages: usize,
    /// Whether we stopped the guest.
    pub(super) halt: Halt,
    pub(super) ended: bool,
    pub(super) devices: Vec<Value>,
    /// `None`: look before anything else.
    pub(super) devices_looked_at: Option<Instant>,
    pub(super) notes: Notes,
    /// Last: it is given up when all else is gone.
    pub(super) lair: Lair,
}

impl QemuSource {
    /// Attaches to the QEMU behind `options.qmp`. It runs on; it pauses for about a millisecond while its machine is read.
    ///
    /// # Errors
    /// [`AttachError`] names everything that is to be changed. Nothing of the attempt stays behind.
    pub fn attach(options: AttachOptions) -> Result<Self, AttachError> {
        let missing = probe_kernel();
        if !missing.is_empty() {
            return Err(AttachError::Kernel(missing));
        }
        let pid = find_process(&options)?;
        may_look_into(pid)?;
        let lair = Lair::enter(&options.fifo_dir, pid)?;
        fault::point("attach.locked");
        let mut monitor = connect(&options.qmp, &lair)?;
        let mut notes = lair.notes();
        rescue(&mut monitor, notes.settings())?;
        let shared_ram = refuse(&mut monitor, pid, &options, notes.stopped())?;
        notes.set_stopped(None);
        let fifo = lair.make_fifo()?;
        let guardian_args = GuardianArgs {
            qmp: options.qmp.clone(),
            fifo: fifo.path().to_owned(),
            qemu_pid: pid,
            replicator_pid: std::process::id(),
            limit_ns: options.pause_limit_ns,
            settings: MigrationSettings::read(&mut monitor)?,
        };
        // For the case that the guardian dies, too.
        notes.set_settings(Some(guardian_args.settings.clone()));
        let pauser = Pauser::new(fifo, options.pause_limit_ns)?;
        let failed = |source| AttachError::Guardian {
            exe: options.guardian.exe.clone(),
            source,
        };
        let lock = lair.share_lock().map_err(failed)?;
        let guardian = Guardian::spawn(&options.guardian, &guardian_args, lock).map_err(failed)?;
        let attached = Guarded {
            guardian,
            notes,
            lair,
            monitor,
        };
        attached.finish(pid, options, guardian_args, pauser, shared_ram)
    }

    pub(super) fn process(&self) -> u32 {
        self.pid
    }

    /// Reads the machine anew, unless it has become one that is refused.
    pub(super) fn learn_again(&mut self) -> Result<(), AttachError> {
        let shared = refuse(&mut self.monitor, self.pid, &self.options, None)?;
        let shared = self.tracker.as_ref().map_or(shared, Tracker::main_is_shared);
        self.tell_settings()?;
        let learnt = learn(&mut self.monitor, &mut self.pauser, shared)?;
        let placed_as_before = learnt.layout == self.learnt.layout;
        self.events
            .extend(learnt.events.iter().filter_map(super::events::meaning));
        self.machine = describe(
            &mut self.monitor,
            self.pid,
            &learnt,
            &self.options.allow.disposable,
        )?;
        self.learnt = learnt;
        self.devices = list_devices(&mut self.monitor)?;
        if !placed_as_before || self.tracker.is_none() {
            self.armed = false;
            // Ranges have one tracker, so the old one goes first.
            drop(self.tracker.take());
            self.tracker = Some(track(
                &mut self.monitor,
                &mut self.pauser,
                self.pid,
                &self.learnt,
                is_on_kvm(&self.machine),
            )?);
        }
        Ok(())
    }
}

/// Refuses a machine that cannot be protected as it is; otherwise says whether its main memory is shared.
fn refuse(
    monitor: &mut Qmp,
    pid: u32,
    options: &AttachOptions,
    stopped: Option<StoppedBy>,
) -> Result<bool, AttachError> {
    let facts = Facts {
        stopped,
        ..ask(monitor, pid)?
    };
    let refusals = check(&facts, &options.taps, &options.allow);
    if refusals.is_empty() {
        Ok(facts.shared_ram)
    } else {
        Err(AttachError::Refused(refusals))
    }
}

/// What has to be dismissed and given up in order when the rest of an attach fails.
struct Guarded {
    guardian: Guardian,
    notes: Notes,
    lair: Lair,
    monitor: Qmp,
}

impl Guarded {
    fn finish(
        mut self,
        pid: u32,
        options: AttachOptions,
        guardian_args: GuardianArgs,
        mut pauser: Pauser,
        shared_ram: bool,
    ) -> Result<QemuSource, AttachError> {
        fault::point("attach.guarded");
        match learn_and_track(&mut self.monitor, &mut pauser, pid, shared_ram, &options) {
            Ok((learnt, machine, tracker, devices)) => {
                fault::point("attach.registered");
                Ok(QemuSource {
                    events: learnt.events.iter().filter_map(super::events::meaning).collect(),
                    monitor: self.monitor,
                    pid,
                    options,
                    pauser,
                    tracker: Some(tracker),
                    guardian: self.guardian,
                    guardian_args,
                    learnt,
                    machine,
                    learnt_is_fresh: true,
                    armed: false,
                    room_pages: super::capture::ROOM_PAGES_MIN,
                    halt: Halt::None,
                    ended: false,
                    devices,
                    devices_looked_at: Some(Instant::now()),
                    notes: self.notes,
                    lair: self.lair,
                })
            }
            Err(error) => {
                self.guardian.dismiss();
                self.notes.set_settings(None);
                self.lair.leave();
                Err(error)
            }
        }
    }
}

type Known = (Bootstrap, MachineSpec, Tracker, Vec<Value>);

fn learn_and_track(
    monitor: &mut Qmp,
    pauser: &mut Pauser,
    pid: u32,
    shared_ram: bool,
    options: &AttachOptions,
) -> Result<Known, AttachError> {
    let learnt = learn(monitor, pauser, shared_ram)?;
    let machine = describe(monitor, pid, &learnt, &options.allow.disposable)?;
    let tracker = track(monitor, pauser, pid, &learnt, is_on_kvm(&machine))?;
    let devices = list_devices(monitor)?;
    Ok((learnt, machine, tracker, devices))
}

fn is_on_kvm(machine: &MachineSpec) -> bool {
    machine.qemu().is_some_and(|qemu| qemu.accelerator == "kvm")
}

fn learn(monitor: &mut Qmp, pauser: &mut Pauser, shared_ram: bool) -> Result<Bootstrap, AttachError> {
    let options = bootstrap::Options::new(shared_ram);
    Ok(pauser.guarded(BOOTSTRAP_LIMIT_FACTOR, |wind_up| {
        bootstrap(monitor, &options, wind_up)
    })?)
}

fn track(
    monitor: &mut Qmp,
    pauser: &mut Pauser,
    pid: u32,
    learnt: &Bootstrap,
    kvm: bool,
) -> Result<Tracker, AttachError> {
    let wanted: Vec<Wanted<'_>> = learnt
        .layout
        .blocks()
        .iter()
        .zip(&learnt.contents)
        .map(|(block, content)| Wanted {
            name: &block.name,
            bytes: block.bytes,
            content: content.as_deref(),
        })
        .collect();
    let places = place(monitor, pid, &wanted)?;
    // QEMU's main thread is stopped for the call.
    let fault = pauser.guarded(1, |_| create_in_process(pid, &mut pass_call_stage))?;
    Tracker::register(pid, fault, usize::from(learnt.main.0), kvm, places)
}

fn pass_call_stage(stage: CallStage) {
    fault::point(match stage {
        CallStage::Stopped => "attach.call_stopped",
        CallStage::RegistersSet => "attach.call_registers_set",
        CallStage::Entered => "attach.call_entered",
        CallStage::Returned => "attach.call_returned",
        CallStage::Restored => "attach.call_restored",
    });
}

/// QEMU's process: the one that made the socket, unless the operator knows better.
fn find_process(options: &AttachOptions) -> Result<u32, AttachError> {
    let pid = match options.pid {
        Some(pid) => pid,
        None => listener(&options.qmp)?,
    };
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.trim().to_owned();
    if name.contains("qemu") || name.contains("kvm") {
        Ok(pid)
    } else {
        Err(AttachError::NotQemu { pid, name })
    }
}

/// What is read of the process on the way would fail for the same reason, and say something else.
fn may_look_into(pid: u32) -> Result<(), AttachError> {
    match std::fs::read_link(format!("/proc/{pid}/root")) {
        Err(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(SysError::TraceRefused { pid, source }.into())
        }
        _ => Ok(()),
    }
}

/// The process that made the socket. The kernel answers even when QEMU cannot.
fn listener(qmp: &Path) -> Result<u32, AttachError> {
    let failed = |source: std::io::Error| QmpError::Connect {
        path: qmp.display().to_string(),
        source,
    };
    let stream = UnixStream::connect(qmp).map_err(failed)?;
    Ok(peer_of(&stream).map_err(failed)?)
}

/// Connects, after having freed a QEMU that an earlier attachment left waiting.
fn connect(qmp: &Path, lair: &Lair) -> Result<Qmp, AttachError> {
    let leftovers = lair.leftovers();
    let drainer = (!leftovers.is_empty()).then(|| Drainer::free_leftovers(&leftovers));
    let mut monitor = Qmp::connect(qmp, Instant::now() + GREETING_LIMIT)?;
    // An answer: nothing that came before is under way, so the leftovers are free.
    monitor.execute("query-status", Value::Null)?;
    drop(drainer);
    for path in leftovers {
        // A command that came after its FIFO was gone made a plain file.
        let _ = std::fs::remove_file(path);
    }
    Ok(monitor)
}

fn ask(monitor: &mut Qmp, pid: u32) -> Result<Facts, AttachError> {
    Ok(Facts {
        status: monitor.execute("query-status", Value::Null)?,
        migration: monitor.execute("query-migrate", Value::Null)?,
        block_jobs: monitor.execute("query-block-jobs", Value::Null)?,
        blocks: monitor.execute("query-block", Value::Null)?,
        chardevs: monitor.execute("query-chardev", Value::Null)?,
        network: monitor.hmp("info network")?,
        device_tree: monitor.hmp("info qtree")?,
        monitors: monitors(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()),
        tun_fds: tun_fds(pid),
        shared_ram: main_ram_is_shared(monitor, pid)?,
        stopped: None,
    })
}

/// Interfaces of the tun descriptors of a process: `iff:` in their fdinfo.
fn tun_fds(pid: u32) -> Vec<(u32, String)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let info = std::fs::read_to_string(entry.path()).ok()?;
            let interface = info.lines().find_map(|line| line.strip_prefix("iff:"))?;
            Some((number, interface.trim().to_owned()))
        })
        .collect()
}

/// Whether the memory at the guest's address 0 is a shared mapping of QEMU.
fn main_ram_is_shared(monitor: &mut Qmp, pid: u32) -> Result<bool, AttachError> {
    let reply = monitor.hmp("gpa2hva 0")?;
    let address = reply
        .trim()
        .rsplit_once(" is 0x")
        .and_then(|(_, hex)| u64::from_str_radix(hex, 16).ok());
    let Some(address) = address else { return Ok(false) };
    Ok(read_maps(pid)?
        .iter()
        .any(|mapping| mapping.shared && mapping.contains(address, 1)))
}

/// The devices that can be plugged and unplugged. QEMU has no event for a plugged one.
pub(super) fn list_devices(monitor: &mut Qmp) -> Result<Vec<Value>, QmpError> {
    ["/machine/peripheral", "/machine/peripheral-anon"]
        .map(|path| monitor.execute("qom-list", json!({ "path": path })))
        .into_iter()
        .collect()
}

impl From<AttachError> for CaptureError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Monitor(error) => error.into(),
            AttachError::System(error) => Self::System(error),
            other => Self::Learning(Box::new(other)),
        }
    }
}
