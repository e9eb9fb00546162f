//! A small process that frees the guest when the replicator cannot.
//!
//! ```text
//!   replicator ── socket pair (stdin): "T" stopped for now, "S" as it should be, "D" dismissed; end = it died
//!       │                                      │
//!       │ pidfd ─────────────────────────── guardian ── holds a reading end of the FIFO, and the lock (stdout)
//!       ▼                                      │
//!   xen-save into the FIFO                     ▼  when the replicator dies, or holds the guest for too long (then it is killed):
//!                                    unlink the FIFO, read it empty, until QEMU answers on its monitor; end
//!                                    a bootstrap that was left; let the guest run if "T" was the last word
//! ```
//!
//! A reader that stays is what keeps QEMU from waiting in open(2) for ever when its command arrives after the
//! replicator's death. An answer on a new monitor connection proves that no earlier command is under way.
//! The guardian sits in a process group of its own, so that a terminal's or a group's signal does not end it with the
//! replicator; a service manager has to spare it (systemd: `KillMode=process`).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use romulus_host_sys::{
    KillTimer, PidFd, ReadOutcome, SysError, monotonic_ns, open_fifo_reader, pipe_bytes_waiting,
    read_nonblocking,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::options::GuardianProgram;
use crate::fault;
use crate::qemu::bootstrap::{BootstrapError, MigrationSettings, Rescued, rescue};
use crate::qemu::qmp::{Monitor, Qmp, QmpError};

const READY: u8 = b'R';
const STOPPED_FOR_NOW: u8 = b'T';
const SETTLED: u8 = b'S';
const DISMISSED: u8 = b'D';

const START_LIMIT: Duration = Duration::from_secs(10);
/// How often an idle guardian looks whether the guest is held.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often it looks while the guest is held.
const LOOK_CLOSELY_EVERY: Duration = Duration::from_millis(10);
/// A turn of the guardian may take this many times the limit of a pause: then the kernel kills it.
const TURN_LIMITS: u64 = 5;
/// One try to reach QEMU's monitor.
const MONITOR_TRY: Duration = Duration::from_secs(2);
/// How long QEMU's monitor is tried before the guardian gives up on it.
const MONITOR_PATIENCE: Duration = Duration::from_secs(120);

/// What a guardian has to know. Travels as one JSON argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardianArgs {
    /// QEMU's QMP socket.
    pub qmp: PathBuf,
    /// The attachment's FIFO.
    pub fifo: PathBuf,
    /// QEMU's process.
    pub qemu_pid: u32,
    /// The replicator's process.
    pub replicator_pid: u32,
    /// How long the guest may be held, in nanoseconds.
    pub limit_ns: u64,
    /// QEMU's migration settings as they were.
    pub settings: MigrationSettings,
}

/// Why a guardian failed.
#[derive(Debug, thiserror::Error)]
pub enum GuardianError {
    /// Its argument is not what a replicator passes.
    #[error("the guardian is started by the replicator only; its argument is not understood: {0}")]
    Arguments(#[source] serde_json::Error),
    /// The socket to the replicator failed.
    #[error("the guardian's socket failed")]
    Socket(#[from] io::Error),
    /// The kernel refused a call.
    #[error(transparent)]
    System(#[from] SysError),
    /// QEMU's monitor could not be reached.
    #[error("the guest may be held: QEMU's monitor does not answer")]
    Monitor(#[from] QmpError),
    /// The guest could not be let go.
    #[error("the guest could not be let go")]
    Rescue(#[from] BootstrapError),
}

/// The replicator's end.
pub(super) struct Guardian {
    child: Child,
    socket: UnixStream,
}

impl Guardian {
    /// Starts a guardian and waits until it holds the FIFO.
    pub(super) fn spawn(program: &GuardianProgram, args: &GuardianArgs, lock: File) -> io::Result<Self> {
        let (mut socket, theirs) = UnixStream::pair()?;
        // The operator's paths may be no text.
        let json = serde_json::to_string(args)?;
        let mut command = Command::new(&program.exe);
        command.args(&program.args).arg(json);
        // A fault that is armed for the replicator is not meant for its guardian.
        command.env_remove(fault::VARIABLE);
        let child = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(lock))
            .process_group(0)
            .spawn()?;
        // With its end of the socket only in its own hands, its end is seen at once.
        drop(command);
        socket.set_read_timeout(Some(START_LIMIT))?;
        let mut guardian_is = [0];
        socket.read_exact(&mut guardian_is)?;
        if guardian_is[0] != READY {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it does not answer as a guardian",
            ));
        }
        Ok(Self { child, socket })
    }

    /// Whether it still runs.
    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// From now on a paused guest is to be let go if we die.
    pub(super) fn stopping_for_now(&mut self) -> io::Result<()> {
        self.socket.write_all(&[STOPPED_FOR_NOW])
    }

    /// The guest is as it should be, running or not.
    pub(super) fn settled(&mut self) -> io::Result<()> {
        self.socket.write_all(&[SETTLED])
    }

    /// Nothing is left to guard.
    pub(super) fn dismiss(mut self) {
        let _ = self.socket.write_all(&[DISMISSED]);
        let _ = self.child.wait();
    }
}

/// The guardian process: call it from `main` with what follows [`GuardianProgram::args`]. Standard input is its socket.
///
/// # Errors
/// [`GuardianError`]; after one of its last two kinds the guest may stand still.
pub fn run(args: &[String]) -> Result<(), GuardianError> {
    let text = args.first().map_or("", String::as_str);
    let args: GuardianArgs = serde_json::from_str(text).map_err(GuardianError::Arguments)?;
    let reader = open_fifo_reader(&args.fifo)?;
    let qemu = PidFd::open(args.qemu_pid)?;
    let replicator = PidFd::open(args.replicator_pid);
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.write_all(&[READY])?;
    let outcome = match &replicator {
        Ok(replicator) => watch(&args, &mut socket, &reader, &qemu, replicator)?,
        Err(_) => Outcome::Died {
            stopped_for_now: false,
        },
    };
    match outcome {
        Outcome::Dismissed => Ok(()),
        Outcome::Died { stopped_for_now } => {
            let _ = std::fs::remove_file(&args.fifo);
            let drainer = Drainer::start(vec![reader]);
            let freed = free(&args.qmp, &qemu, Some(&args.settings), stopped_for_now);
            drop(drainer);
            // QEMU makes a plain file there when its command came after the FIFO was gone.
            let _ = std::fs::remove_file(&args.fifo);
            freed.map(|_| ())
        }
    }
}

enum Outcome {
    Dismissed,
    Died { stopped_for_now: bool },
}

fn watch(
    args: &GuardianArgs,
    socket: &mut UnixStream,
    reader: &OwnedFd,
    qemu: &PidFd,
    replicator: &PidFd,
) -> Result<Outcome, GuardianError> {
    let mut stopped_for_now = false;
    let mut held_since = None;
    // Both of us may be stopped at once (a frozen control group): our end of the FIFO must not hold QEMU for ever.
    let mut timer = KillTimer::new()?;
    loop {
        timer.arm(args.limit_ns.saturating_mul(TURN_LIMITS));
        let every = if held_since.is_some() {
            LOOK_CLOSELY_EVERY
        } else {
            LOOK_EVERY
        };
        let timeout = Timespec::try_from(every).ok();
        let (said, died, qemu_ended) = {
            let mut fds = [
                PollFd::new(&*socket, PollFlags::IN),
                PollFd::new(replicator, PollFlags::IN),
                PollFd::new(qemu, PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(GuardianError::Socket(errno.into())),
            }
            let [said, died, ended] = fds.map(|fd| !fd.revents().is_empty());
            (said, died, ended)
        };
        if said {
            let mut word = [0];
            match socket.read(&mut word) {
                Ok(0) => return Ok(Outcome::Died { stopped_for_now }),
                Ok(_) if word[0] == DISMISSED => return Ok(Outcome::Dismissed),
                Ok(_) => stopped_for_now = word[0] == STOPPED_FOR_NOW,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Outcome::Died { stopped_for_now });
                }
                Err(error) => return Err(error.into()),
            }
        } else if died || qemu_ended {
            return Ok(Outcome::Died { stopped_for_now });
        }
        // The replicator's own timer comes first; this is for one that cannot be killed by it. Between two
        // pauses the pipe is empty, so a pipe that never is belongs to one pause.
        held_since = match pipe_bytes_waiting(reader)? {
            0 => None,
            _ => held_since.or_else(|| Some(monotonic_ns())),
        };
        if held_since.is_some_and(|since| monotonic_ns() - since > args.limit_ns.saturating_mul(2)) {
            replicator.kill()?;
            return Ok(Outcome::Died { stopped_for_now });
        }
    }
}

/// Reads FIFOs empty, so that no QEMU waits for a reader, until it is dropped.
pub(super) struct Drainer {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drainer {
    pub(super) fn start(readers: Vec<OwnedFd>) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        let thread = std::thread::spawn(move || {
            let mut scrap = vec![0; 1 << 16];
            while !seen.load(Ordering::Relaxed) {
                let busy = readers
                    .iter()
                    .filter(|reader| {
                        matches!(read_nonblocking(reader, &mut scrap), Ok(ReadOutcome::Bytes(_)))
                    })
                    .count();
                if busy == 0 {
                    std::thread::sleep(Duration::from_micros(500));
                }
            }
        });
        Self {
            done,
            thread: Some(thread),
        }
    }

    /// Frees what an earlier attachment left in these FIFOs, and removes them.
    pub(super) fn free_leftovers(fifos: &[PathBuf]) -> Self {
        let readers = fifos
            .iter()
            .filter_map(|fifo| open_fifo_reader(fifo).ok())
            .collect();
        for fifo in fifos {
            let _ = std::fs::remove_file(fifo);
        }
        Self::start(readers)
    }
}

impl Drop for Drainer {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits until QEMU has no command of ours under way, and lets its guest run if we stopped it.
fn free(
    qmp: &Path,
    qemu: &PidFd,
    settings: Option<&MigrationSettings>,
    stopped_for_now: bool,
) -> Result<Rescued, GuardianError> {
    let deadline = Instant::now() + MONITOR_PATIENCE;
    loop {
        let freed = Qmp::connect(qmp, Instant::now() + MONITOR_TRY)
            .map_err(GuardianError::from)
            .and_then(|mut monitor| let_go(&mut monitor, settings, stopped_for_now));
        match freed {
            Ok(rescued) => return Ok(rescued),
            Err(_) if qemu.wait_ended(Duration::from_millis(20))? => return Ok(Rescued::Nothing),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
    }
}

fn let_go(
    monitor: &mut dyn Monitor,
    settings: Option<&MigrationSettings>,
    stopped_for_now: bool,
) -> Result<Rescued, GuardianError> {
    let status = monitor.execute("query-status", Value::Null)?;
    let rescued = rescue(monitor, settings)?;
    if stopped_for_now && status.get("status").and_then(Value::as_str) == Some("paused") {
        monitor.execute("cont", Value::Null)?;
    }
    Ok(rescued)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guardian_that_ends_before_it_is_ready_is_noticed_by_its_end() {
        let program = GuardianProgram {
            exe: PathBuf::from("true"),
            args: Vec::new(),
        };
        let settings = serde_json::json!({
            "capabilities": [], "max_bandwidth": 0, "downtime_limit_ms": 0, "tls_creds": "",
        });
        let args = GuardianArgs {
            qmp: PathBuf::new(),
            fifo: PathBuf::new(),
            qemu_pid: 0,
            replicator_pid: 0,
            limit_ns: 1,
            settings: serde_json::from_value(settings).unwrap(),
        };
        let lock = tempfile::tempfile().unwrap();
        let error = Guardian::spawn(&program, &args, lock)
            .err()
            .expect("it is no guardian");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
    }
}
