//! The thread that serves clients: waits for the listener, the client and the VMM's events at the same time, and never for
//! any of them alone for longer than its limit.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use romulus_host_sys::socket_peer_pid;
use rustix::event::{PollFd, PollFlags, poll};

use super::options::{ServeOptions, nanoseconds};
use super::phase::Phase;
use super::watch::Shared;
use crate::channel::{Channel, ChannelError, Incoming, timespec};
use crate::proto::{ErrorCode, Hello, MachineInfo, Refusal, Reply, Request, Role, VERSION, Welcome};

/// How long no client is let in after the kernel could not do it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("it has detached")]
    Detached,
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("it said no Hello in time")]
    NoHello,
    #[error("it was refused: {0}")]
    Refused(String),
    #[error("it did not read the events that waited for it")]
    EventsLost,
}

/// A request, as it came.
struct Asked {
    number: u32,
    request: Request,
    descriptors: Vec<OwnedFd>,
}

/// A connection.
struct Visitor<'a> {
    shared: &'a Shared,
    options: &'a ServeOptions,
    channel: Channel,
    /// Who, as it says, and the process.
    name: String,
    pid: u32,
    since: Instant,
    greeted: bool,
    /// Its `Welcome` brought a bitmap.
    has_bitmap: bool,
    /// How often the machine had changed when it was described.
    changes: u64,
}

impl Drop for Visitor<'_> {
    /// However a connection ends, a panic included: the guest runs.
    fn drop(&mut self) {
        self.shared.at_desk(|desk| desk.end_session());
    }
}

/// The thread.
pub(crate) fn run(listener: &UnixListener, shared: &Shared, options: &ServeOptions) {
    let mut visitor: Option<Visitor<'_>> = None;
    let mut listen_from = Instant::now();
    while !shared.is_closing() {
        let ready = wait(listener, visitor.as_ref(), options, listen_from);
        if ready.listener && !let_in(listener, shared, options, &mut visitor) {
            listen_from = Instant::now() + ACCEPT_PAUSE;
        }
        let Some(guest) = visitor.as_mut() else {
            if ready.events {
                // Nobody is there to be told.
                options.events.take();
            }
            continue;
        };
        let events = if ready.events { guest.tell_events() } else { Ok(()) };
        let served = events.and_then(|()| {
            if ready.visitor {
                guest.serve_one()
            } else {
                guest.check_hello()
            }
        });
        if let Err(end) = served {
            tracing::info!(client = guest.name, pid = guest.pid, "client gone: {end}");
            visitor = None;
        }
    }
    if let Some(guest) = &visitor {
        // What was posted before the end is told.
        let told = guest.tell_events();
        tracing::info!(client = guest.name, pid = guest.pid, ?told, "the server ends");
    }
}

/// What happened.
#[derive(Default)]
struct Ready {
    listener: bool,
    visitor: bool,
    events: bool,
}

fn wait(
    listener: &UnixListener,
    visitor: Option<&Visitor<'_>>,
    options: &ServeOptions,
    listen_from: Instant,
) -> Ready {
    let now = Instant::now();
    let listening = if now < listen_from {
        PollFlags::empty()
    } else {
        PollFlags::IN
    };
    let mut fds = vec![
        PollFd::from_borrowed_fd(options.events.wake_fd(), PollFlags::IN),
        PollFd::new(listener, listening),
    ];
    let mut until = (now < listen_from).then_some(listen_from);
    if let Some(visitor) = visitor {
        fds.push(PollFd::new(&visitor.channel, PollFlags::IN));
        if !visitor.greeted {
            let hello = visitor.since + options.hello_limit;
            until = Some(until.map_or(hello, |until| until.min(hello)));
        }
    }
    let timeout = until.map(|until| timespec(until.saturating_duration_since(now)));
    // An interruption is like nothing: the loop comes back.
    let _ = poll(&mut fds, timeout.as_ref());
    let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
    Ready {
        events: is_ready(0),
        listener: is_ready(1) && !listening.is_empty(),
        visitor: is_ready(2),
    }
}

/// Accepts a connection; one too many is told so. False when the kernel could not.
fn let_in<'a>(
    listener: &UnixListener,
    shared: &'a Shared,
    options: &'a ServeOptions,
    visitor: &mut Option<Visitor<'a>>,
) -> bool {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
        Err(error) => {
            tracing::warn!("a client could not be accepted: {error}");
            return false;
        }
    };
    // For the logs: 0 when it can't be seen from here.
    let pid = socket_peer_pid(&stream).ok().flatten().unwrap_or(0);
    let channel = Channel::new(stream);
    if let Some(present) = visitor {
        let text = format!(
            "another client is attached: {:?}, process {}. End it first",
            present.name, present.pid
        );
        let refusal = Reply::Error(Refusal::new(ErrorCode::Busy, text));
        if let Ok(message) = refusal.encode(0) {
            // Without waiting: a socket that is new has room for it.
            let _ = channel.send(&message, &[], Duration::ZERO);
        }
        return true;
    }
    *visitor = Some(Visitor {
        shared,
        options,
        channel,
        name: String::new(),
        pid,
        since: Instant::now(),
        greeted: false,
        has_bitmap: false,
        changes: 0,
    });
    true
}

impl Visitor<'_> {
    fn say(&self, number: u32, reply: &Reply, descriptors: &[BorrowedFd<'_>]) -> Result<(), End> {
        let message = reply.encode(number).map_err(ChannelError::Proto)?;
        Ok(self
            .channel
            .send(&message, descriptors, self.options.write_limit)?)
    }

    /// Refuses, and ends the connection.
    fn turn_away<T>(&self, number: u32, code: ErrorCode, text: String) -> Result<T, End> {
        // It may not be there any more to read it.
        let _ = self.say(number, &Reply::Error(Refusal::new(code, text.clone())), &[]);
        Err(End::Refused(text))
    }

    fn check_hello(&self) -> Result<(), End> {
        let late = !self.greeted && self.since.elapsed() >= self.options.hello_limit;
        if late { Err(End::NoHello) } else { Ok(()) }
    }

    fn tell_events(&self) -> Result<(), End> {
        let events = self.options.events.take().ok_or(End::EventsLost)?;
        if !self.greeted {
            return Ok(());
        }
        events
            .into_iter()
            .try_for_each(|event| self.say(0, &Reply::Event(event), &[]))
    }

    /// Reads a request, does it, and answers.
    fn serve_one(&mut self) -> Result<(), End> {
        let Some(asked) = self.read()? else {
            return Ok(());
        };
        match asked.request {
            Request::Hello(hello) if !self.greeted => self.greet(asked.number, hello),
            request if !self.greeted => {
                let text = format!("{} came before Hello", request.name());
                self.turn_away(asked.number, ErrorCode::WrongOrder, text)
            }
            _ => self.answer(asked),
        }
    }

    /// Reads the request that is there, if one is.
    fn read(&self) -> Result<Option<Asked>, End> {
        let incoming = match self.channel.receive(Duration::ZERO, self.options.message_limit) {
            Ok(Some(incoming)) => incoming,
            Ok(None) => return Ok(None),
            Err(ChannelError::Proto(error)) => {
                return self.turn_away(0, ErrorCode::Malformed, error.to_string());
            }
            Err(error @ ChannelError::StrayDescriptors) => {
                return self.turn_away(0, ErrorCode::WrongDescriptors, error.to_string());
            }
            Err(error) => return Err(error.into()),
        };
        let Incoming {
            header,
            payload,
            descriptors,
        } = incoming;
        let request = match Request::decode(&header, &payload) {
            Ok(request) => request,
            Err(error) => {
                return self.turn_away(header.number, ErrorCode::Malformed, chain(&error));
            }
        };
        let (came, wanted) = (descriptors.len(), request.descriptors());
        if came != wanted {
            let text = format!("{} brought {came} file descriptors, not {wanted}", request.name());
            return self.turn_away(header.number, ErrorCode::WrongDescriptors, text);
        }
        Ok(Some(Asked {
            number: header.number,
            request,
            descriptors,
        }))
    }

    fn greet(&mut self, number: u32, hello: Hello) -> Result<(), End> {
        self.name = hello.client;
        let versions = hello.versions;
        if !(versions.min..=versions.max).contains(&VERSION) {
            let text = format!(
                "this VMM speaks version {VERSION} of the attach protocol, the client {} to {}: update the older one",
                versions.min, versions.max
            );
            return self.turn_away(number, ErrorCode::NoCommonVersion, text);
        }
        // In this order: what happens after the machine was looked at is told.
        let _ = self.options.events.take();
        self.changes = self.options.events.changes();
        let welcomed = self.shared.at_desk(|desk| {
            let described = match desk.phase {
                Phase::Empty => None,
                _ => Some(desk.describe()?),
            };
            let failed = |error| {
                Refusal::new(
                    ErrorCode::MachineFailed,
                    format!("no descriptor is left: {error}"),
                )
            };
            Ok((desk.phase.role(), described, desk.state_file().map_err(failed)?))
        });
        let (role, described, state) = match welcomed {
            Ok(welcomed) => welcomed,
            Err(Refusal { code, text }) => return self.turn_away(number, code, text),
        };
        let (info, regions, bitmap) = match described {
            None => (None, Vec::new(), None),
            Some(machine) => (Some(machine.info), machine.regions, machine.bitmap),
        };
        let welcome = Reply::Welcome(self.welcome(role, info, bitmap.is_some()));
        let mut descriptors: Vec<BorrowedFd<'_>> = regions.iter().map(AsFd::as_fd).collect();
        descriptors.extend(bitmap.as_ref().map(AsFd::as_fd));
        descriptors.push(state.as_fd());
        self.say(number, &welcome, &descriptors)?;
        self.greeted = true;
        self.has_bitmap = bitmap.is_some();
        tracing::info!(client = self.name, pid = self.pid, ?role, "client attached");
        Ok(())
    }

    fn welcome(&self, role: Role, machine: Option<MachineInfo>, tracked: bool) -> Welcome {
        let bitmap_bytes = machine.as_ref().map_or(0, MachineInfo::bitmap_bytes);
        Welcome {
            version: VERSION,
            vmm: self.options.vmm.clone(),
            vmm_version: self.options.vmm_version.clone(),
            role,
            bitmap_bytes: if tracked { bitmap_bytes } else { 0 },
            machine,
            state_bytes_max: self.options.state_bytes_max,
            pause_limit_ns_max: nanoseconds(self.options.pause_limit_max),
            halt_limit_ns: nanoseconds(self.options.halt_limit),
        }
    }

    fn answer(&mut self, asked: Asked) -> Result<(), End> {
        let Asked {
            number,
            request,
            descriptors,
        } = asked;
        let tracks = matches!(request, Request::Arm | Request::Harvest | Request::Pause(_));
        if tracks && let Err(refusal) = self.check_tracking() {
            return self.say(number, &Reply::Error(refusal), &[]);
        }
        let (pauses, detaches) = (matches!(request, Request::Pause(_)), request == Request::Detach);
        let done = self.shared.at_desk(|desk| desk.carry_out(request, descriptors));
        match done {
            Ok(Some(reply)) => self.say(number, &reply, &[])?,
            Ok(None) => return Ok(()),
            Err(refusal) => return self.say(number, &Reply::Error(refusal), &[]),
        }
        if detaches {
            return Err(End::Detached);
        }
        if pauses { self.capture(number) } else { Ok(()) }
    }

    /// The second half of a pause. A `Resume` that has come meanwhile is done before anything is said: the guest waits for nothing
    /// else.
    fn capture(&mut self, number: u32) -> Result<(), End> {
        let captured = self.shared.at_desk(|desk| desk.capture());
        let next = if captured.is_ok() { self.read()? } else { None };
        let captured = captured.unwrap_or_else(Reply::Error);
        match next {
            Some(asked) if asked.request == Request::Resume => {
                let done = self
                    .shared
                    .at_desk(|desk| desk.carry_out(asked.request, Vec::new()));
                self.say(number, &captured, &[])?;
                let resumed = done.map(|reply| reply.expect("a Resume is answered"));
                self.say(asked.number, &resumed.unwrap_or_else(Reply::Error), &[])
            }
            next => {
                self.say(number, &captured, &[])?;
                next.map_or(Ok(()), |asked| self.answer(asked))
            }
        }
    }

    /// Whether the client's bitmap is that of the machine.
    fn check_tracking(&self) -> Result<(), Refusal> {
        if self.options.events.changes() != self.changes {
            let text = "the machine's memory or devices changed since Hello: connect anew";
            return Err(Refusal::new(ErrorCode::MachineChanged, text));
        }
        if !self.has_bitmap {
            let text = "this connection began before the machine ran, without a bitmap: connect anew";
            return Err(Refusal::new(ErrorCode::WrongOrder, text));
        }
        Ok(())
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
