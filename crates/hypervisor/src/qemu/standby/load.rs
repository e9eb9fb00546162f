//! Sending a waiting QEMU the stream that makes it the guest.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Waiting;
use super::process::error_with_stderr;
use crate::fault;
use crate::qemu::qmp::{Monitor, QmpError};
use crate::qemu::stream::write_activation;
use crate::spec::MachineSpec;
use crate::standby::{Committed, StandbyError};

const FD_NAME: &str = "romulus-activation";
const POLL: Duration = Duration::from_micros(300);
/// Room in the socket, so that one write hands QEMU the whole stream of a usual machine.
const SOCKET_BYTES: usize = 32 << 20;

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

/// The blocks that go through the stream; `None` for the main one.
fn read_small(spec: &MachineSpec, checkpoint: &Committed<'_>) -> Result<Vec<Option<Vec<u8>>>, StandbyError> {
    let read = |(position, path): (usize, &std::path::PathBuf)| {
        if position == usize::from(spec.main.0) {
            return Ok(None);
        }
        let block = &spec.layout.blocks()[position];
        fs::read(path).map(Some).map_err(|error| {
            StandbyError::new(
                format!(
                    "could not read the RAM block {} from {}",
                    block.name,
                    path.display()
                ),
                error,
            )
        })
    };
    checkpoint.ram.iter().enumerate().map(read).collect()
}

fn write(
    spec: &MachineSpec,
    small: &[Option<Vec<u8>>],
    device_state: &[u8],
    socket: &UnixStream,
) -> io::Result<u64> {
    let contents: Vec<Option<&[u8]>> = small.iter().map(Option::as_deref).collect();
    let mut out = Counted {
        inner: BufWriter::with_capacity(256 << 10, socket),
        bytes: 0,
    };
    write_activation(&spec.template, &contents, device_state, &mut out)?;
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
