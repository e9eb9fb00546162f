//! The QMP client over a Unix socket.
//!
//! The socket is non-blocking; every wait is a poll(2) with a deadline, so a QEMU that hangs costs its caller no more than
//! that. Commands carry ids: the late reply to a command that was given up is told from the one we wait for.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use romulus_host_sys::socket_peer_pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
};
use serde_json::{Value, json};

use super::{
    COMMAND_TIMEOUT, EVENTS_MAX, LINE_BYTES_MAX, Monitor, PENDING_MAX, QemuVersion, QmpError, QmpEvent,
    QmpLine, parse_line,
};

/// Most fds in one command (QEMU takes 16).
const FDS_MAX: usize = 4;
const READ_BYTES: usize = 64 << 10;

type Reply = Result<Value, QmpError>;

struct Pending {
    id: u64,
    command: String,
    reply: Option<Reply>,
}

/// The process that listens at the other end.
pub(crate) fn peer_of(stream: &UnixStream) -> io::Result<u32> {
    let pid = socket_peer_pid(stream).map_err(io::Error::other)?;
    pid.ok_or_else(|| {
        io::Error::other("it is outside of our PID namespace: run the replicator in the one that QEMU is in")
    })
}

/// A QMP connection.
pub struct Qmp {
    stream: UnixStream,
    version: QemuVersion,
    command_timeout: Duration,
    id_next: u64,
    pending: VecDeque<Pending>,
    events: VecDeque<QmpEvent>,
    events_lost: u64,
    /// Bytes that were read; those before `scanned` hold no end of line.
    buffer: Vec<u8>,
    scanned: usize,
}

impl Qmp {
    /// Connects to QEMU's QMP socket and negotiates, all before `deadline`.
    ///
    /// # Errors
    /// [`QmpError::Connect`] without a listener, [`QmpError::NoGreeting`] when another client holds the monitor.
    pub fn connect(path: impl AsRef<Path>, deadline: Instant) -> Result<Self, QmpError> {
        let path = path.as_ref();
        let failed = |source: Errno| QmpError::Connect {
            path: path.display().to_string(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                // The backlog is full: other clients wait for this monitor already.
                Err(Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Self::negotiate(UnixStream::from(socket), deadline)
    }

    /// Negotiates on a stream that is connected already.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn negotiate(stream: UnixStream, deadline: Instant) -> Result<Self, QmpError> {
        stream.set_nonblocking(true).map_err(|source| QmpError::Io {
            doing: "setting it up",
            source,
        })?;
        let unknown = QemuVersion {
            major: 0,
            minor: 0,
            micro: 0,
            package: String::new(),
        };
        let mut qmp = Self {
            stream,
            version: unknown,
            command_timeout: COMMAND_TIMEOUT,
            id_next: 1,
            pending: VecDeque::new(),
            events: VecDeque::new(),
            events_lost: 0,
            buffer: Vec::new(),
            scanned: 0,
        };
        loop {
            match qmp.read_line(deadline)? {
                Some(QmpLine::Greeting(version)) => {
                    qmp.version = version;
                    break;
                }
                Some(_) => {}
                None => return Err(QmpError::NoGreeting),
            }
        }
        qmp.send("qmp_capabilities", Value::Null, &[])?;
        match qmp.next_reply(deadline) {
            Err(QmpError::Timeout { .. }) => Err(QmpError::NoGreeting),
            other => other.map(|_| qmp),
        }
    }

    /// Sets how long a command may take when no deadline is given.
    pub fn set_command_timeout(&mut self, timeout: Duration) {
        self.command_timeout = timeout;
    }

    /// The process at the other end of the socket, as the kernel saw it when it began to listen.
    ///
    /// # Errors
    /// [`QmpError::Io`] when the socket has no credentials.
    pub fn peer_pid(&self) -> Result<u32, QmpError> {
        peer_of(&self.stream).map_err(|source| QmpError::Io {
            doing: "asking for its process",
            source,
        })
    }

    /// Reads until one line is complete. `None` at the deadline.
    fn read_line(&mut self, deadline: Instant) -> Result<Option<QmpLine>, QmpError> {
        loop {
            while let Some(line) = self.take_line() {
                if !line.iter().all(u8::is_ascii_whitespace) {
                    return Ok(Some(parse_line(&line)?));
                }
            }
            if self.buffer.len() >= LINE_BYTES_MAX {
                return Err(QmpError::LineTooLong);
            }
            if !self.fill()? && !wait(self.stream.as_fd(), PollFlags::IN, deadline)? {
                return Ok(None);
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let Some(end) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') else {
            self.scanned = self.buffer.len();
            return None;
        };
        let line = self.buffer.drain(..=self.scanned + end).collect();
        self.scanned = 0;
        Some(line)
    }

    /// Reads what is there. `false` when there is nothing.
    fn fill(&mut self) -> Result<bool, QmpError> {
        let mut chunk = [0u8; READ_BYTES];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(count) => {
                    self.buffer.extend_from_slice(&chunk[..count]);
                    return Ok(true);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Err(QmpError::Closed);
                }
                Err(source) => {
                    return Err(QmpError::Io {
                        doing: "reading",
                        source,
                    });
                }
            }
        }
    }

    /// Takes in one line, waiting for it until the deadline. `false` at the deadline.
    fn pump(&mut self, deadline: Instant) -> Result<bool, QmpError> {
        match self.read_line(deadline)? {
            None => return Ok(false),
            Some(QmpLine::Greeting(_)) => {}
            Some(QmpLine::Event(event)) => self.keep(event),
            Some(QmpLine::Return { id, value }) => self.answer(id, |_| Ok(value)),
            Some(QmpLine::Error {
                id,
                class,
                description,
            }) => {
                self.answer(id, |command| {
                    Err(QmpError::Refused {
                        command,
                        class,
                        description,
                    })
                });
            }
        }
        Ok(true)
    }

    fn keep(&mut self, event: QmpEvent) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
            self.events_lost += 1;
        }
        self.events.push_back(event);
    }

    /// Files a reply with its command. One whose command was given up is dropped.
    fn answer(&mut self, id: Option<u64>, reply: impl FnOnce(String) -> Reply) {
        let waiting = self
            .pending
            .iter_mut()
            .find(|p| p.reply.is_none() && id.is_none_or(|id| p.id == id));
        if let Some(pending) = waiting {
            pending.reply = Some(reply(pending.command.clone()));
        }
    }
}

impl Monitor for Qmp {
    fn version(&self) -> &QemuVersion {
        &self.version
    }

    fn command_timeout(&self) -> Duration {
        self.command_timeout
    }

    fn send(&mut self, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Result<(), QmpError> {
        assert!(fds.len() <= FDS_MAX, "a command takes at most {FDS_MAX} fds");
        if self.pending.len() == PENDING_MAX {
            return Err(QmpError::TooManyPending);
        }
        let id = self.id_next;
        self.id_next += 1;
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(b'\n');
        write_all(
            &self.stream,
            &bytes,
            fds,
            command,
            Instant::now() + self.command_timeout,
        )?;
        self.pending.push_back(Pending {
            id,
            command: command.to_owned(),
            reply: None,
        });
        Ok(())
    }

    fn next_reply(&mut self, deadline: Instant) -> Result<Value, QmpError> {
        loop {
            let oldest = self
                .pending
                .front_mut()
                .expect("a command was sent and not answered");
            if let Some(reply) = oldest.reply.take() {
                self.pending.pop_front();
                return reply;
            }
            if !self.pump(deadline)? {
                let command = self
                    .pending
                    .front()
                    .map(|p| p.command.clone())
                    .unwrap_or_default();
                return Err(QmpError::Timeout { command });
            }
        }
    }

    fn abandon_newest(&mut self) {
        self.pending.pop_back();
    }

    fn next_event(&mut self, deadline: Instant) -> Result<Option<QmpEvent>, QmpError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if !self.pump(deadline)? {
                return Ok(None);
            }
        }
    }

    fn take_events_lost(&mut self) -> u64 {
        std::mem::take(&mut self.events_lost)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.stream.as_fd())
    }
}

/// Waits until `fd` is ready; `false` at the deadline.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) -> Result<bool, QmpError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&fd, flags)], timeout.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => {
                return Err(QmpError::Io {
                    doing: "waiting",
                    source: error.into(),
                });
            }
        }
    }
}

/// Writes a command; the fds go with its first byte.
fn write_all(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut fds: &[BorrowedFd<'_>],
    command: &str,
    deadline: Instant,
) -> Result<(), QmpError> {
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(
                ancillary.push(SendAncillaryMessage::ScmRights(fds)),
                "the buffer has room for FDS_MAX fds"
            );
        }
        match sendmsg(
            stream,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Ok(count) => {
                bytes = &bytes[count..];
                fds = &[];
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if !wait(stream.as_fd(), PollFlags::OUT, deadline)? {
                    return Err(QmpError::Timeout {
                        command: command.to_owned(),
                    });
                }
            }
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(QmpError::Closed),
            Err(error) => {
                return Err(QmpError::Io {
                    doing: "writing",
                    source: error.into(),
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
