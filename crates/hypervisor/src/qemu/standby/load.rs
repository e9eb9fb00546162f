//! Sending a waiting QEMU the stream that makes it the guest.

use std::fs::File;
use std::io::{self, BufWriter, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::Waiting;
use crate::fault;
use crate::qemu::qmp::{Monitor, QmpError};
use crate::qemu::stream::{BlockContent, Section, Template, list_sections, write_activation};
use crate::spec::MachineSpec;
use crate::standby::{Committed, StandbyError};

const FD_NAME: &str = "romulus-activation";
const POLL: Duration = Duration::from_micros(300);

/// Ends of the names of large blocks that hold nothing but zeros in a QEMU that waits: video memory. The zeros of ROMs
/// and tables are sent, as a standby has contents of its own in them.
const FRESHLY_ZERO: &[&str] = &["/vga.vram"];

/// What the machine does once it has loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// Nothing: a trial.
    Paused,
    /// It runs.
    Running,
}

pub(super) struct Loaded {
    pub(super) stream: Duration,
    pub(super) stream_bytes: u64,
}

pub(super) fn run_state(monitor: &mut dyn Monitor) -> Result<String, QmpError> {
    let reply = monitor.execute("query-status", Value::Null)?;
    Ok(reply
        .get("status")
        .and_then(Value::as_str)
        .unwrap_or("unknown")
        .to_owned())
}

/// The stream that a machine is to read, in a memory file.
pub(super) struct Stream {
    file: File,
    bytes: u64,
    begun: Instant,
}

impl Stream {
    /// The whole stream. QEMU reads it by itself: if we die, either it has not begun and still waits, or it needs us no more.
    pub(super) fn of(
        spec: &MachineSpec,
        template: &Template,
        checkpoint: &Committed<'_>,
    ) -> Result<Self, StandbyError> {
        let begun = Instant::now();
        let (file, bytes) = stream_file(spec, template, checkpoint)?;
        Ok(Self { file, bytes, begun })
    }

    /// Whether the machine has read it to its end. QEMU reads with the position of the file, which it shares with us;
    /// whether it does is seen in each trial.
    pub(super) fn is_read(&self) -> bool {
        seek(&self.file, SeekFrom::Current(0)).is_ok_and(|at| at >= self.bytes)
    }
}

/// Loads the checkpoint and waits until the machine has reached its goal. `consume` is called right before the machine may
/// begin to read.
pub(super) fn load(
    machine: &mut Waiting,
    stream: &Stream,
    goal: Goal,
    timeout: Duration,
    consume: &mut dyn FnMut() -> Result<(), StandbyError>,
) -> Result<Loaded, StandbyError> {
    fault::point("standby.before_stream");
    let refused =
        |error, machine: &Waiting| machine.process.error("the standby does not take a stream", error);
    let sent = machine
        .qmp
        .execute_with_fds("getfd", json!({ "fdname": FD_NAME }), &[stream.file.as_fd()]);
    sent.map_err(|error| refused(error, machine))?;
    fault::point("standby.in_stream");
    consume()?;
    let sent = machine
        .qmp
        .execute("migrate-incoming", json!({ "uri": format!("fd:{FD_NAME}") }));
    sent.map_err(|error| refused(error, machine))?;
    fault::point("standby.after_stream");
    let elapsed = stream.begun.elapsed();
    await_goal(machine, goal, Instant::now() + timeout)?;
    fault::point("standby.loaded");
    Ok(Loaded {
        stream: elapsed,
        stream_bytes: stream.bytes,
    })
}

fn stream_file(
    spec: &MachineSpec,
    template: &Template,
    checkpoint: &Committed<'_>,
) -> Result<(File, u64), StandbyError> {
    let small = read_small(spec, checkpoint)?;
    let failed = |error| StandbyError::new("the checkpoint cannot be made into a stream", error);
    let file =
        memfd_create("romulus-activation", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let mut out = BufWriter::with_capacity(256 << 10, File::from(file));
    write_activation(template, &small, checkpoint.device_state, &mut out).map_err(failed)?;
    let mut file = out.into_inner().map_err(|error| failed(error.into_error()))?;
    let bytes = file.stream_position().map_err(failed)?;
    file.rewind().map_err(failed)?;
    Ok((file, bytes))
}

/// The blocks that go through the stream: all but the main one.
fn read_small(spec: &MachineSpec, checkpoint: &Committed<'_>) -> Result<Vec<BlockContent>, StandbyError> {
    let read = |(position, path): (usize, &PathBuf)| {
        if position == usize::from(spec.main.0) {
            return Ok(BlockContent::InPlace);
        }
        let block = &spec.layout.blocks()[position];
        let zeros_in_place = FRESHLY_ZERO.iter().any(|end| block.name.ends_with(end));
        let pieces = read_pieces(path, block.bytes).map_err(|error| {
            StandbyError::new(
                format!(
                    "could not read the RAM block {} from {}",
                    block.name,
                    path.display()
                ),
                error,
            )
        })?;
        Ok(BlockContent::Pieces {
            pieces,
            zeros_in_place,
        })
    };
    checkpoint.ram.iter().enumerate().map(read).collect()
}

/// Reads what is no hole.
fn read_pieces(path: &Path, block_bytes: u64) -> io::Result<Vec<(u64, Vec<u8>)>> {
    let file = File::open(path)?;
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < block_bytes {
        let from = match seek(&file, SeekFrom::Data(at)) {
            Ok(from) if from < block_bytes => from,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let to = seek(&file, SeekFrom::Hole(from))?.min(block_bytes);
        let length = usize::try_from(to - from).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut piece = vec![0u8; length];
        file.read_exact_at(&mut piece, from)?;
        pieces.push((from, piece));
        at = to;
    }
    Ok(pieces)
}

pub(super) fn await_goal(machine: &mut Waiting, goal: Goal, deadline: Instant) -> Result<(), StandbyError> {
    loop {
        match run_state(&mut machine.qmp) {
            Ok(state) => match (state.as_str(), goal) {
                ("running", Goal::Running) | ("paused" | "prelaunch", Goal::Paused) => return Ok(()),
                ("inmigrate" | "paused" | "prelaunch", _) => {}
                (other, _) => {
                    let said = machine.process.stderr();
                    return Err(StandbyError::plain(format!(
                        "the standby is {other:?} after it loaded the checkpoint (QEMU said: {said})"
                    )));
                }
            },
            Err(QmpError::Closed) => {
                // QEMU ends when it cannot load.
                let said = machine.process.stderr();
                return Err(StandbyError::plain(format!(
                    "QEMU could not load the checkpoint: {said}"
                )));
            }
            Err(error) => {
                return Err(machine.process.error("the standby does not answer", error));
            }
        }
        if Instant::now() >= deadline {
            return Err(StandbyError::plain(
                "the standby did not load the checkpoint in time",
            ));
        }
        std::thread::sleep(POLL);
    }
}

/// Has the machine save its state, right after it loaded one, and compares the devices: a device that the checkpoint
/// did not mention would have loaded without a word, and the guest would find it changed.
pub(super) fn compare_devices(
    machine: &mut Waiting,
    loaded: &[u8],
    scratch: &Path,
) -> Result<(), StandbyError> {
    let arguments = json!({ "filename": scratch.display().to_string(), "live": false });
    let saved = machine.qmp.execute("xen-save-devices-state", arguments);
    saved.map_err(|error| {
        machine
            .process
            .error("the trial could not save its state again", error)
    })?;
    let saved = std::fs::read(scratch)
        .map_err(|error| StandbyError::new(format!("could not read {}", scratch.display()), error))?;
    let list = |state: &[u8]| {
        let listed = list_sections(state);
        listed.map_err(|error| StandbyError::new("a device state cannot be compared", error))
    };
    let (mut theirs, mut ours) = (list(loaded)?, list(&saved)?);
    theirs.sort();
    ours.sort();
    if theirs == ours {
        return Ok(());
    }
    let only = |these: &[Section], those: &[Section]| {
        let missing: Vec<String> = these
            .iter()
            .filter(|s| !those.contains(s))
            .map(ToString::to_string)
            .collect();
        if missing.is_empty() {
            "none".to_owned()
        } else {
            missing.join(", ")
        }
    };
    Err(StandbyError::plain(format!(
        "the standby is another machine than the primary's: devices that only the standby has: {}; that only the primary has: {}",
        only(&ours, &theirs),
        only(&theirs, &ours),
    )))
}
