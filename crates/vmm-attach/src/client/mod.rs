//! The sidecar's end: one method a request. A failure of the connection breaks the client for good; a refusal does not.

mod error;
mod greet;
mod open;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use romulus_host_sys::socket_peer_pid;

use crate::channel::Channel;
use crate::memfd;
use crate::proto::{
    Activated, Captured, Event, Halt, Harvested, Hello, MachineInfo, Pause, Paused, Prepare, ProtoError,
    Reply, Request, Restore, Restored, Resumed, VERSION, Versions, Welcome,
};

pub use error::ClientError;
use open::open;

/// How long a VMM may take to answer, beyond a pause's limit, when nothing else was set.
pub const REPLY_LIMIT: Duration = Duration::from_secs(5);
/// How long a message may take to arrive, once it has begun.
const MESSAGE_LIMIT: Duration = Duration::from_secs(1);
/// Most events that wait to be polled.
const EVENTS_MAX: usize = 256;

/// What the VMM handed over with its welcome.
#[derive(Debug)]
pub struct Attachment {
    /// What it says of itself. Its machine was checked.
    pub welcome: Welcome,
    /// The regions' files, in the order of `welcome.machine`'s regions: each is at least as long as its region.
    pub regions: Vec<OwnedFd>,
    /// The dirty bitmap, sealed against shrinking: `welcome.bitmap_bytes` of 64-bit words, bit 0 the lowest page of the first region. Take
    /// words by an atomic swap with 0.
    pub bitmap: Option<OwnedFd>,
}

/// A connection to a VMM.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    state: Option<File>,
    number: u32,
    /// The pause whose `Captured` is to come.
    capture_number: Option<u32>,
    /// The `Resume` that was sent ahead, whose answer is to come.
    resume_number: Option<u32>,
    events: VecDeque<Event>,
    vmm_pid: u32,
    reply_limit: Duration,
    broken: bool,
}

impl AsFd for Client {
    /// Readable when there may be an event.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Client {
    /// Connects to the VMM that listens at `path` and says hello as `name`; `limit` is for the answer.
    ///
    /// # Errors
    /// [`ClientError::Connect`], [`ClientError::Busy`], [`ClientError::Refused`] with `NoCommonVersion`, or what is wrong with the welcome.
    pub fn connect(path: &Path, name: &str, limit: Duration) -> Result<(Self, Attachment), ClientError> {
        let stream = open(path).map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::over(stream, name, limit)
    }

    /// As `connect`, over a socket that is connected.
    ///
    /// # Errors
    /// As `connect`.
    pub fn over(stream: UnixStream, name: &str, limit: Duration) -> Result<(Self, Attachment), ClientError> {
        let vmm_pid = socket_peer_pid(&stream).ok().flatten().unwrap_or(0);
        let mut client = Self {
            channel: Channel::new(stream),
            state: None,
            number: 0,
            capture_number: None,
            resume_number: None,
            events: VecDeque::new(),
            vmm_pid,
            reply_limit: limit,
            broken: false,
        };
        let hello = Request::Hello(Hello {
            versions: Versions {
                min: VERSION,
                max: VERSION,
            },
            client: name.to_owned(),
        });
        let attachment = client.greet(&hello)?;
        client.reply_limit = REPLY_LIMIT;
        Ok((client, attachment))
    }

    /// The VMM's process, as the kernel says; 0 when it can't be seen from here.
    pub fn vmm_pid(&self) -> u32 {
        self.vmm_pid
    }

    /// How long the VMM may take to answer, beyond a pause's limit.
    pub fn set_reply_limit(&mut self, limit: Duration) {
        self.reply_limit = limit;
    }

    /// Starts dirty tracking afresh: from the reply on, every write of the guest and of the VMM comes into the bitmap, which is empty.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn arm(&mut self) -> Result<(), ClientError> {
        match self.ask(&Request::Arm, &[], Duration::ZERO)? {
            Reply::Armed => Ok(()),
            other => Err(self.unexpected("Arm", &other)),
        }
    }

    /// Brings what was written into the bitmap, while the guest runs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn harvest(&mut self) -> Result<Harvested, ClientError> {
        match self.ask(&Request::Harvest, &[], Duration::ZERO)? {
            Reply::Harvested(harvested) => Ok(harvested),
            other => Err(self.unexpected("Harvest", &other)),
        }
    }

    /// Stops the guest for at most `limit`. On return it stands still and the bitmap is complete; its state is being saved:
    /// [`Self::captured`] comes next.
    ///
    /// # Errors
    /// [`ClientError`]; the guest runs.
    pub fn pause(&mut self, limit: Duration) -> Result<Paused, ClientError> {
        let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        match self.ask(&Request::Pause(Pause { limit_ns }), &[], limit)? {
            Reply::Paused(paused) => {
                self.capture_number = Some(self.number);
                Ok(paused)
            }
            other => Err(self.unexpected("Pause", &other)),
        }
    }

    /// Waits until the state of the guest that [`Self::pause`] stopped was saved.
    ///
    /// # Errors
    /// [`ClientError`]; the guest runs, and there is nothing to resume.
    ///
    /// # Panics
    /// Without a `pause` before it.
    pub fn captured(&mut self) -> Result<Captured, ClientError> {
        let number = self.capture_number.take().expect("captured comes after pause");
        match self.answer("Pause", number, self.reply_limit) {
            Ok((Reply::Captured(captured), _)) => Ok(captured),
            Ok((other, _)) => Err(self.unexpected("Pause", &other)),
            Err(error) => {
                // The guest runs: what was sent ahead is refused, which says nothing new.
                if let Some(resume) = self.resume_number.take().filter(|_| !self.broken) {
                    let _ = self.answer("Resume", resume, self.reply_limit);
                }
                Err(error)
            }
        }
    }

    /// Asks for the end of the pause before [`Self::captured`]: the guest runs as soon as its state was saved, without a word from us
    /// in between. `captured` and [`Self::resume`] come next.
    ///
    /// # Errors
    /// [`ClientError`].
    ///
    /// # Panics
    /// Without a `pause` before it.
    pub fn resume_ahead(&mut self) -> Result<(), ClientError> {
        assert!(self.capture_number.is_some(), "resume_ahead comes after pause");
        self.send(&Request::Resume, &[])?;
        self.resume_number = Some(self.number);
        Ok(())
    }

    /// Copies the state that was saved.
    ///
    /// # Errors
    /// [`ClientError::State`] when it is not all there.
    pub fn read_state(&self, captured: &Captured, into: &mut Vec<u8>) -> Result<(), ClientError> {
        let file = self.state.as_ref().expect("a client that was welcomed has one");
        let bytes = file.metadata().map_err(ClientError::State)?.len();
        let announced = captured.state_bytes;
        let Some(length) = usize::try_from(announced).ok().filter(|_| announced <= bytes) else {
            let text = format!("a state of {announced} bytes was announced in a file of {bytes}");
            return Err(ClientError::State(io::Error::new(
                io::ErrorKind::InvalidData,
                text,
            )));
        };
        into.resize(length, 0);
        file.read_exact_at(into, 0).map_err(ClientError::State)
    }

    /// Ends a pause; after a pause within a halt the guest stays halted. Called before [`Self::captured`], it waits for that first.
    ///
    /// # Errors
    /// [`ClientError::PauseExpired`]: the guest had been let go, and nothing that was copied since `pause` counts. [`ClientError`].
    pub fn resume(&mut self) -> Result<Resumed, ClientError> {
        if self.capture_number.is_some() {
            self.captured()?;
        }
        let answer = match self.resume_number.take() {
            Some(number) => self.answer("Resume", number, self.reply_limit)?.0,
            None => self.ask(&Request::Resume, &[], Duration::ZERO)?,
        };
        match answer {
            Reply::Resumed(resumed) => Ok(resumed),
            other => Err(self.unexpected("Resume", &other)),
        }
    }

    /// Stops the guest, also from within a pause, without letting it run in between. `for_good`: whatever becomes of us. Else it
    /// lasts as long as something is said at least every `Welcome::halt_limit_ns`.
    ///
    /// # Errors
    /// [`ClientError::PauseExpired`] from a pause that is over; the guest runs. [`ClientError`].
    pub fn halt(&mut self, for_good: bool) -> Result<(), ClientError> {
        let mut owed = Ok(());
        if self.capture_number.is_some() {
            owed = self.captured().map(drop);
        }
        if self.resume_number.is_some() {
            owed = owed.and(self.resume().map(drop));
        }
        if !for_good {
            owed?;
        }
        match self.ask(&Request::Halt(Halt { for_good }), &[], Duration::ZERO)? {
            Reply::Halted => Ok(()),
            other => Err(self.unexpected("Halt", &other)),
        }
    }

    /// Ends a halt.
    ///
    /// # Errors
    /// [`ClientError::PauseExpired`]: it had run before. [`ClientError`].
    pub fn go(&mut self) -> Result<(), ClientError> {
        match self.ask(&Request::Go, &[], Duration::ZERO)? {
            Reply::Going => Ok(()),
            other => Err(self.unexpected("Go", &other)),
        }
    }

    /// Keeps a halt. Does not wait for an answer: there is none.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn alive(&mut self) -> Result<(), ClientError> {
        self.send(&Request::Alive, &[])
    }

    /// Has the VMM build `machine` on the memory in `regions`, one file a region in their order; `private` is for a trial, which
    /// leaves the files as they are.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn prepare(
        &mut self,
        machine: &MachineInfo,
        regions: &[BorrowedFd<'_>],
        private: bool,
    ) -> Result<(), ClientError> {
        let prepare = Request::Prepare(Prepare {
            machine: machine.clone(),
            private,
        });
        if regions.len() != prepare.descriptors() || machine.check().is_err() {
            machine.check().map_err(ProtoError::Machine)?;
            return Err(ClientError::Descriptors {
                reply: "Prepare",
                came: regions.len(),
                wanted: prepare.descriptors(),
            });
        }
        match self.ask(&prepare, regions, Duration::ZERO)? {
            Reply::Prepared => Ok(()),
            other => Err(self.unexpected("Prepare", &other)),
        }
    }

    /// Loads a state into the machine that was prepared. The guest does not run yet.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn restore(&mut self, state: &[u8]) -> Result<Restored, ClientError> {
        let file = memfd::sealed_with("romulus-restore", state).map_err(ClientError::State)?;
        let restore = Request::Restore(Restore {
            state_bytes: state.len() as u64,
        });
        match self.ask(&restore, &[file.as_fd()], Duration::ZERO)? {
            Reply::Restored(restored) => Ok(restored),
            other => Err(self.unexpected("Restore", &other)),
        }
    }

    /// Lets the restored guest run.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn activate(&mut self) -> Result<Activated, ClientError> {
        match self.ask(&Request::Activate, &[], Duration::ZERO)? {
            Reply::Activated(activated) => Ok(activated),
            other => Err(self.unexpected("Activate", &other)),
        }
    }

    /// Ends the tracking and the connection.
    ///
    /// # Errors
    /// [`ClientError`]; the connection's end does the same.
    pub fn detach(mut self) -> Result<(), ClientError> {
        match self.ask(&Request::Detach, &[], Duration::ZERO)? {
            Reply::Detached => Ok(()),
            other => Err(self.unexpected("Detach", &other)),
        }
    }

    /// What the VMM said unasked, oldest first. Does not wait.
    ///
    /// # Errors
    /// [`ClientError`]; the connection's end is `Channel(Closed)`.
    pub fn poll_event(&mut self) -> Result<Option<Event>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        if self.capture_number.is_some() || self.resume_number.is_some() {
            // What is there may be the answer that `captured` or `resume` waits for.
            return Ok(None);
        }
        match self.receive("nothing", Duration::ZERO)? {
            None => Ok(None),
            Some((_, Reply::Event(event), _)) => Ok(Some(event)),
            Some((_, other, _)) => Err(self.unexpected("nothing", &other)),
        }
    }

    /// Asks, and waits for the one answer.
    fn ask(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        more: Duration,
    ) -> Result<Reply, ClientError> {
        self.send(request, descriptors)?;
        Ok(self
            .answer(request.name(), self.number, self.reply_limit + more)?
            .0)
    }

    fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        if self.broken {
            return Err(ClientError::Broken);
        }
        let posted = self.post(request, descriptors);
        if let Err(ClientError::Channel(_)) = &posted {
            self.hear_out();
            self.broken = true;
        }
        posted
    }

    /// Sends, and leaves what has come meanwhile where it is.
    fn post(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let number = self.number.wrapping_add(1).max(1);
        let message = request.encode(number)?;
        self.channel.send(&message, descriptors, self.reply_limit)?;
        self.number = number;
        Ok(())
    }

    /// Keeps the events of a VMM that is gone already: they may say why.
    fn hear_out(&mut self) {
        while self.events.len() < EVENTS_MAX
            && let Ok(Some((_, Reply::Event(event), _))) = self.receive_one(Duration::ZERO)
        {
            self.events.push_back(event);
        }
    }

    /// Waits for the answer with this number. Events that come before it are kept.
    fn answer(
        &mut self,
        request: &'static str,
        number: u32,
        limit: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let until = std::time::Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            let Some((came, reply, files)) = self.receive(request, left)? else {
                self.broken = true;
                return Err(ClientError::NoAnswer { request, limit });
            };
            match reply {
                Reply::Event(event) => {
                    if self.events.len() == EVENTS_MAX {
                        self.broken = true;
                        return Err(ClientError::TooManyEvents);
                    }
                    self.events.push_back(event);
                }
                // A refusal of the connection itself has no number.
                Reply::Error(refusal) if came == number || came == 0 => {
                    return Err(error::refused(request, refusal));
                }
                reply if came == number => return Ok((reply, files)),
                reply => return Err(self.unexpected(request, &reply)),
            }
        }
    }

    fn receive(
        &mut self,
        request: &'static str,
        wait: Duration,
    ) -> Result<Option<(u32, Reply, Vec<OwnedFd>)>, ClientError> {
        if self.broken {
            return Err(ClientError::Broken);
        }
        let received = self.receive_one(wait);
        if let Err(error) = &received {
            tracing::debug!(request, %error, "the connection to the VMM is given up");
            self.broken = true;
        }
        received
    }

    fn receive_one(&self, wait: Duration) -> Result<Option<(u32, Reply, Vec<OwnedFd>)>, ClientError> {
        let Some(incoming) = self.channel.receive(wait, MESSAGE_LIMIT)? else {
            return Ok(None);
        };
        let reply = Reply::decode(&incoming.header, &incoming.payload)?;
        let (came, wanted) = (incoming.descriptors.len(), reply.descriptors());
        if came != wanted {
            return Err(ClientError::Descriptors {
                reply: reply.name(),
                came,
                wanted,
            });
        }
        Ok(Some((incoming.header.number, reply, incoming.descriptors)))
    }

    /// The two sides have lost step.
    fn unexpected(&mut self, request: &'static str, reply: &Reply) -> ClientError {
        self.broken = true;
        ClientError::Unexpected {
            request,
            reply: reply.name(),
        }
    }
}
