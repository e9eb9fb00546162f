//! QEMU's monitor protocol (QMP): JSON lines over a Unix socket, replies in order, events at any time.
//!
//! - [`Monitor`] is what the rest of this crate asks for: a socket here, libvirt's pass-through elsewhere.
//! - [`Qmp`] is the socket. It blocks, but never longer than the deadline it was given.
//! - [`parse_line`] turns one line into a [`QmpLine`]; it is pure and takes any bytes.
//!
//! Source: QEMU's `docs/interop/qmp-spec.txt`.

mod line;
mod socket;

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use line::{LineError, QemuVersion, QmpEvent, QmpLine, parse_line};
pub use socket::Qmp;
pub(crate) use socket::peer_of;

/// Longest line that is read, in bytes. QEMU's largest replies (`query-qmp-schema`) have some 200 KiB.
pub const LINE_BYTES_MAX: usize = 16 << 20;
/// Most events kept until somebody takes them; the oldest goes first.
pub const EVENTS_MAX: usize = 4096;
/// Most commands that were sent and not answered.
pub const PENDING_MAX: usize = 8;
/// How long a command may take when the caller does not say.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// What can go wrong between us and the monitor.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be reached.
    #[error(
        "cannot connect to the QMP socket {path}: is QEMU running with -qmp unix:{path},server=on,wait=off?"
    )]
    Connect {
        /// The socket's path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Connected, but QEMU does not speak: another client holds this monitor, or QEMU's main loop is stuck.
    #[error("QEMU did not greet on its QMP socket in time: another client holds this monitor, or QEMU hangs")]
    NoGreeting,
    /// Reading or writing failed.
    #[error("the QMP connection failed while {doing}")]
    Io {
        /// What we were doing.
        doing: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU closed the connection: it exited, or the monitor was taken away.
    #[error("QEMU closed the QMP connection (did it exit?)")]
    Closed,
    /// No reply before the deadline.
    #[error("QEMU did not answer `{command}` in time")]
    Timeout {
        /// The command.
        command: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refused `{command}`: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// A line that is no QMP.
    #[error("QEMU sent a line that is not QMP")]
    Line(#[from] LineError),
    /// The line limit was passed.
    #[error("QEMU sent a line longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    /// A reply that lacks what we need.
    #[error("QEMU's reply to `{command}` lacks {what}")]
    Reply {
        /// The command.
        command: String,
        /// What was expected.
        what: &'static str,
    },
    /// Too many commands under way.
    #[error("more than {PENDING_MAX} QMP commands are waiting for a reply")]
    TooManyPending,
}

impl QmpError {
    /// Whether QEMU itself said no, in contrast to a connection that failed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// A way to talk to QEMU's monitor.
///
/// Commands are answered in the order in which they were sent. Every wait has a deadline.
pub trait Monitor: Send {
    /// The version in QEMU's greeting.
    fn version(&self) -> &QemuVersion;

    /// How long [`execute`](Self::execute) waits.
    fn command_timeout(&self) -> Duration;

    /// Sends a command, with file descriptors for `getfd` and `add-fd`, and does not wait. A later
    /// [`next_reply`](Self::next_reply) fetches the reply. `arguments` is an object or `Value::Null`.
    ///
    /// # Errors
    /// [`QmpError`] when the command cannot be written before the command timeout.
    fn send(&mut self, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Result<(), QmpError>;

    /// Waits for the reply to the oldest command that was [sent](Self::send) and not answered.
    ///
    /// # Errors
    /// [`QmpError::Timeout`] at the deadline; the reply can still be waited for. [`QmpError::Refused`] carries QEMU's error.
    fn next_reply(&mut self, deadline: Instant) -> Result<Value, QmpError>;

    /// Forgets the newest command that was sent: its reply will be dropped when it arrives.
    fn abandon_newest(&mut self);

    /// Takes the oldest event, waiting for one until `deadline` (one in the past: do not wait). `None` at the deadline.
    ///
    /// # Errors
    /// [`QmpError`] when the connection failed.
    fn next_event(&mut self, deadline: Instant) -> Result<Option<QmpEvent>, QmpError>;

    /// Events that were dropped because nobody took them, since the last call. A caller that sees one must ask QEMU for its
    /// state anew.
    fn take_events_lost(&mut self) -> u64;

    /// Readable when something may have arrived, for poll(2). `None` when this monitor has no such fd.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// As [`send`](Self::send) and [`next_reply`](Self::next_reply).
    ///
    /// # Panics
    /// When an earlier command's reply has not been fetched.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with_fds(command, arguments, &[])
    }

    /// As [`execute`](Self::execute), with file descriptors.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    fn execute_with_fds(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + self.command_timeout();
        self.send(command, arguments, fds)?;
        self.next_reply(deadline).inspect_err(|error| {
            if matches!(error, QmpError::Timeout { .. }) {
                self.abandon_newest();
            }
        })
    }

    /// Runs a human-monitor command and returns its text.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    fn hmp(&mut self, command_line: &str) -> Result<String, QmpError> {
        let reply = self.execute("human-monitor-command", json!({ "command-line": command_line }))?;
        match reply {
            Value::String(text) => Ok(text),
            _ => Err(QmpError::Reply {
                command: command_line.to_owned(),
                what: "text",
            }),
        }
    }
}
