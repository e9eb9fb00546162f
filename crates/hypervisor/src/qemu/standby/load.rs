//! Sending a waiting QEMU the stream that makes it the guest.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::Waiting;
use super::process::error_with_stderr;
use crate::fault;
use crate::qemu::qmp::{Monitor, QmpError};
use crate::qemu::stream::{BlockContent, Section, list_sections, write_activation};
use crate::spec::MachineSpec;
use crate::standby::{Committed, StandbyError};

const FD_NAME: &str = "romulus-activation";
const POLL: Duration = Duration::from_micros(300);
/// Room in the socket, so that one write hands QEMU the whole stream of a usual machine.
const SOCKET_BYTES: usize = 32 << 20;

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

/// Loads the checkpoint and waits until the machine has reached its goal.
pub(super) fn load(
    spec: &MachineSpec,
    machine: &mut Waiting,
    checkpoint: &Committed<'_>,
    goal: Goal,
    timeout: Duration,
) -> Result<Loaded, StandbyError> {
    let begun = Instant::now();
    let small = read_small(spec, checkpoint)?;
    let (ours, theirs) = UnixStream::pair().map_err(socket_error)?;
    ours.set_write_timeout(Some(timeout)).map_err(socket_error)?;
    // Without the privilege QEMU takes the stream in more bites.
    let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(&ours, SOCKET_BYTES);
    fault::point("standby.before_stream");
    let refused = |error, machine: &Waiting| {
        error_with_stderr("the standby does not take a stream", error, &machine.process)
    };
    let sent = machine
        .qmp
        .execute_with_fds("getfd", json!({ "fdname": FD_NAME }), &[theirs.as_fd()]);
    sent.map_err(|error| refused(error, machine))?;
    drop(theirs);
    let sent = machine
        .qmp
        .execute("migrate-incoming", json!({ "uri": format!("fd:{FD_NAME}") }));
    sent.map_err(|error| refused(error, machine))?;
    fault::point("standby.in_stream");
    let written = write(spec, &small, checkpoint.device_state, &ours);
    let stream_bytes = written.map_err(|error| load_error(error, machine))?;
    fault::point("standby.after_stream");
    let stream = begun.elapsed();
    // The socket stays open until the end: closing it early would look like a broken migration.
    await_goal(machine, goal, Instant::now() + timeout)?;
    drop(ours);
    Ok(Loaded { stream, stream_bytes })
}

fn socket_error(error: io::Error) -> StandbyError {
    StandbyError::new("could not make a socket for the standby's stream", error)
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

fn write(
    spec: &MachineSpec,
    small: &[BlockContent],
    device_state: &[u8],
    socket: &UnixStream,
) -> io::Result<u64> {
    let mut out = Counted {
        inner: BufWriter::with_capacity(256 << 10, socket),
        bytes: 0,
    };
    write_activation(&spec.template, small, device_state, &mut out)?;
    out.flush()?;
    Ok(out.bytes)
}

struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A write that failed mostly means that QEMU refused what it read and ended; its words are better than ours.
fn load_error(error: io::Error, machine: &mut Waiting) -> StandbyError {
    if error.kind() == io::ErrorKind::InvalidData {
        return StandbyError::new("the checkpoint cannot be made into a stream", error);
    }
    std::thread::sleep(Duration::from_millis(50));
    let said = machine.process.stderr();
    StandbyError::new(
        format!("the standby broke off the checkpoint's stream (QEMU said: {said})"),
        error,
    )
}

fn await_goal(machine: &mut Waiting, goal: Goal, deadline: Instant) -> Result<(), StandbyError> {
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
                // QEMU ends when it cannot load; let its last words arrive.
                std::thread::sleep(Duration::from_millis(50));
                let said = machine.process.stderr();
                return Err(StandbyError::plain(format!(
                    "QEMU could not load the checkpoint: {said}"
                )));
            }
            Err(error) => {
                return Err(error_with_stderr(
                    "the standby does not answer",
                    error,
                    &machine.process,
                ));
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
        error_with_stderr(
            "the trial could not save its state again",
            error,
            &machine.process,
        )
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
