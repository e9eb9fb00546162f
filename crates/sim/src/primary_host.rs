//! The primary's host: the guest, its gate, and the replicator, which may die and come back while the guest runs on.

use std::collections::BTreeSet;

use bytes::Bytes;
use romulus_protocol::{
    Ask, GuestEvent, Hello, Mode, Notice, Primary, PrimaryCommand, PrimaryConfig, PrimaryEvent,
    PrimaryMessage, Remembered, ToBackup, ToPrimary, WitnessReply, WitnessRequest,
};
use romulus_types::{Epoch, HostId, PageIndex, Session, Time};
use romulus_wire::{
    FrameDecoder, FrameType, WireError, decode_control, decode_message, encode_control, encode_message,
};

use crate::context::{BackupWork, Context, Event, PrimaryWork};
use crate::gate::Gate;
use crate::guest::{Memory, Output, PAGES};
use crate::mistake::Mistake;
use crate::network::Stream;
use crate::plan::{Line, MS, Moment};
use crate::random::Random;
use crate::sender::{Harvest, Sender};
use crate::store::vm;

/// For whichever life of a process is there.
pub(crate) const ANY_LIFE: u32 = u32::MAX;
const COPY_PAGES: u64 = 10;

struct Link {
    session: Session,
    decoder: FrameDecoder,
    sender: Sender,
}

/// The guest, as its hypervisor has it.
pub(crate) struct Guest {
    pub(crate) memory: Memory,
    random: Random,
    /// Its process is there.
    pub(crate) there: bool,
    /// Paused by an operator.
    pub(crate) paused: bool,
    captured: bool,
    held: bool,
    suspended: bool,
    pub(crate) stopped: bool,
}

impl Guest {
    fn runs(&self) -> bool {
        self.there && !(self.paused || self.captured || self.held || self.suspended || self.stopped)
    }
}

struct Outstanding {
    session: Session,
    epoch: Epoch,
    close_gate: bool,
    stay_stopped: bool,
}

/// Everything on the primary's host.
pub(crate) struct PrimaryHost {
    life: u32,
    machine: Option<Primary>,
    disk: Option<Remembered>,
    timer: Option<Time>,
    link: Option<Link>,
    outstanding: Option<Outstanding>,
    harvest: Option<Harvest>,
    dirty: BTreeSet<PageIndex>,
    gate: Gate,
    pub(crate) guest: Guest,
    finished: bool,
}

impl PrimaryHost {
    pub(crate) fn new(context: &mut Context) -> Self {
        let mut random = context.random.fork();
        let memory = Memory::new(&mut random);
        let guest = Guest {
            memory,
            random,
            there: true,
            paused: false,
            captured: false,
            held: false,
            suspended: false,
            stopped: false,
        };
        Self {
            life: 0,
            machine: None,
            disk: None,
            timer: None,
            link: None,
            outstanding: None,
            harvest: None,
            dirty: BTreeSet::new(),
            gate: Gate::Open,
            guest,
            finished: false,
        }
    }

    pub(crate) fn session(&self) -> Option<Session> {
        self.link.as_ref().map(|link| link.session)
    }

    /// The replicator starts, if there is still something to protect.
    pub(crate) fn start(&mut self, context: &mut Context) {
        if self.machine.is_some() || self.finished || !self.guest.there || self.guest.stopped {
            return;
        }
        self.life += 1;
        context.tell("primary", || format!("starts, life {}", self.life));
        let config = PrimaryConfig {
            vm: vm(),
            host: HostId::new("p").expect("a name"),
            backup: HostId::new("b").expect("a name"),
            register: true,
            epoch_ns: 10 * MS,
            heartbeat_interval_ns: 4 * MS,
            suspicion_ns: 40 * MS,
            release_age_ns_max: 60 * MS,
            retry_ns: 20 * MS,
            epochs_in_flight_max: context.plan.epochs_in_flight_max,
            hold_ns_max: 200 * MS,
            mute_ns_max: 300 * MS,
        };
        let seed = u128::from(context.random.next());
        let mut machine = Primary::new(config, self.disk.clone(), seed, context.now);
        if let Some(weakness) = context.mistake.and_then(Mistake::weakness) {
            machine = machine.weakened(weakness);
        }
        self.machine = Some(machine);
        self.carry_out(context);
    }

    /// The replicator dies; a small guardian frees the guest.
    pub(crate) fn crash(&mut self, context: &mut Context) {
        if self.machine.take().is_none() {
            return;
        }
        context.tell("primary", || "CRASHES".to_owned());
        self.drop_link(context, true);
        self.gate.break_off();
        self.guest.held = false;
        self.guest.suspended = false;
        self.timer = None;
    }

    pub(crate) fn crash_host(&mut self, context: &mut Context) {
        self.crash(context);
        context.tell("primary", || "HOST CRASHES".to_owned());
        self.guest.there = false;
    }

    fn drop_link(&mut self, context: &mut Context, silently: bool) {
        self.outstanding = None;
        if let Some(harvest) = self.harvest.take() {
            self.dirty.extend(harvest.pages);
        }
        self.guest.captured = false;
        if let Some(link) = self.link.take() {
            context.network.break_off(context.now, link.session);
            let at = context.network.end_noticed(context.now, Line::ToBackup, silently);
            context.at(at, Event::Backup(ANY_LIFE, BackupWork::End(link.session)));
        }
    }

    /// The guest runs a little.
    pub(crate) fn guest_runs(&mut self, context: &mut Context) {
        if self.guest.runs() {
            let dirty = &mut self.dirty;
            let output = self.guest.memory.run(&mut self.guest.random, |page| {
                dirty.insert(page);
            });
            if let Some(output) = self.gate.take(output) {
                leave(context, output);
            }
        }
        if self.guest.there {
            let pause_ns = context.random.within(MS, 3 * MS);
            context.after(pause_ns, Event::GuestRuns);
        }
    }

    /// The hypervisor reports something.
    pub(crate) fn guest_event(&mut self, context: &mut Context, event: GuestEvent) {
        if !self.guest.there {
            return;
        }
        match event {
            GuestEvent::Lost | GuestEvent::PoweredOff => self.guest.there = false,
            GuestEvent::Paused => self.guest.paused = true,
            GuestEvent::Resumed => self.guest.paused = false,
            GuestEvent::Changed => {}
        }
        let notice_ns = context.random.within(1, 3 * MS);
        context.after(notice_ns, Event::Primary(self.life, PrimaryWork::Guest(event)));
    }

    pub(crate) fn work(&mut self, context: &mut Context, life: u32, work: PrimaryWork) {
        if self.machine.is_none() || (life != ANY_LIFE && life != self.life) {
            return;
        }
        let event = match work {
            PrimaryWork::Timer(at) => {
                if self.timer == Some(at) {
                    self.timer = None;
                    if let Some(machine) = &mut self.machine {
                        machine.handle_timeout(context.now);
                    }
                    self.carry_out(context);
                }
                return;
            }
            PrimaryWork::Control(session, _) if context.network.lost(context.now, session) => return,
            PrimaryWork::Control(session, bytes) => return self.control(context, session, &bytes),
            PrimaryWork::End(session) => {
                if self.session() == Some(session) {
                    self.drop_link(context, false);
                }
                PrimaryEvent::Disconnected(session)
            }
            PrimaryWork::Reply(bytes) => match reply(&bytes) {
                Ok(reply) => PrimaryEvent::Witness(reply),
                Err(_) => return,
            },
            PrimaryWork::Copy(session, part) => match self.copy(context, session, part) {
                Some(event) => event,
                None => return,
            },
            PrimaryWork::CaptureBegins(session, epoch) => {
                return self.capture_begins(context, session, epoch);
            }
            PrimaryWork::CaptureEnds(session, epoch) => match self.capture_ends(context, session, epoch) {
                Some(event) => event,
                None => return,
            },
            PrimaryWork::Drained => PrimaryEvent::Drained,
            PrimaryWork::Guest(event) => PrimaryEvent::Guest(event),
            PrimaryWork::Order(order) => PrimaryEvent::Order(order),
        };
        self.hand_in(context, event);
    }

    fn hand_in(&mut self, context: &mut Context, event: PrimaryEvent) {
        if let Some(machine) = &mut self.machine {
            machine.handle(context.now, event);
        }
        self.carry_out(context);
    }

    fn control(&mut self, context: &mut Context, session: Session, bytes: &Bytes) {
        let Some(link) = self.link.as_mut().filter(|link| link.session == session) else {
            return;
        };
        let mut messages = Vec::new();
        let read = read_control::<ToPrimary>(&mut link.decoder, bytes, &mut messages);
        for message in messages {
            let event = match message {
                ToPrimary::Welcome { .. } => PrimaryEvent::Connected(session),
                ToPrimary::Refused { .. } => PrimaryEvent::Disconnected(session),
                ToPrimary::Peer(message) => PrimaryEvent::Peer(session, message),
            };
            self.hand_in(context, event);
        }
        if read.is_err() && self.session() == Some(session) {
            self.drop_link(context, false);
            self.hand_in(context, PrimaryEvent::Disconnected(session));
        }
    }

    /// Sends the next part of the first copy while the guest runs.
    fn copy(&mut self, context: &mut Context, session: Session, part: u64) -> Option<PrimaryEvent> {
        let link = self.link.as_mut().filter(|link| link.session == session)?;
        let first = part * COPY_PAGES;
        if first >= PAGES {
            return Some(PrimaryEvent::FirstCopyDone(session));
        }
        let frames = link
            .sender
            .first_copy(&self.guest.memory, first..(first + COPY_PAGES).min(PAGES));
        send_data(context, session, frames);
        let pause_ns = context.random.within(1, 2 * MS);
        context.after(
            pause_ns,
            Event::Primary(self.life, PrimaryWork::Copy(session, part + 1)),
        );
        None
    }

    fn capture_begins(&mut self, context: &mut Context, session: Session, epoch: Epoch) {
        let expected = |of: &&Outstanding| of.session == session && of.epoch == epoch;
        let Some(outstanding) = self.outstanding.as_ref().filter(expected) else {
            return;
        };
        let again = |host: &Self, context: &mut Context| {
            context.after(
                2 * MS,
                Event::Primary(host.life, PrimaryWork::CaptureBegins(session, epoch)),
            );
        };
        if !self.guest.runs() {
            return again(self, context);
        }
        let (close_gate, aborted) = (
            outstanding.close_gate,
            context.random.chance(context.plan.abort_capture_permille),
        );
        if aborted {
            context.tell("primary", || {
                format!("capture {epoch} is given up and made again")
            });
            if context.is_planted(Mistake::DirtyForgotten) {
                self.dirty.clear();
            }
            return again(self, context);
        }
        self.guest.captured = true;
        let mut pages = std::mem::take(&mut self.dirty);
        if context.is_planted(Mistake::PageLeftOut) && context.random.chance(30) {
            pages.pop_last();
        }
        self.harvest = Some(Harvest {
            epoch,
            pages,
            memory: self.guest.memory.clone(),
        });
        self.gate.barrier(epoch, close_gate);
        context.checks.captured(session, epoch, self.guest.memory.clone());
        context.moment(Moment::CaptureBegins);
        if close_gate {
            context.moment(Moment::GateCloses);
        }
        let pause_ns = context.random.within(MS / 5, 2 * MS);
        context.after(
            pause_ns,
            Event::Primary(self.life, PrimaryWork::CaptureEnds(session, epoch)),
        );
    }

    fn capture_ends(
        &mut self,
        context: &mut Context,
        session: Session,
        epoch: Epoch,
    ) -> Option<PrimaryEvent> {
        let link = self.link.as_mut().filter(|link| link.session == session)?;
        let harvest = self.harvest.take()?;
        let outstanding = self.outstanding.take()?;
        assert!(
            harvest.epoch == epoch && outstanding.epoch == epoch,
            "one capture at a time"
        );
        self.guest.captured = false;
        self.guest.held = outstanding.stay_stopped;
        let frames = link.sender.checkpoint(&harvest, context.now.ns);
        send_data(context, session, frames);
        context.moment(Moment::CaptureEnds);
        Some(PrimaryEvent::Captured(session, epoch))
    }

    fn carry_out(&mut self, context: &mut Context) {
        while let Some(command) = self.machine.as_mut().and_then(Primary::poll_command) {
            tell(context, &command);
            self.command(context, command);
        }
        let due = self.machine.as_ref().and_then(Primary::poll_timeout);
        if due != self.timer {
            self.timer = due;
            if let Some(at) = due {
                context.at(at, Event::Primary(self.life, PrimaryWork::Timer(at)));
            }
        }
    }

    fn command(&mut self, context: &mut Context, command: PrimaryCommand) {
        match command {
            PrimaryCommand::Remember(remembered) => self.disk = Some(remembered),
            PrimaryCommand::AskWitness(request) => ask(context, Line::PrimaryWitness, &request),
            PrimaryCommand::Connect {
                session,
                term,
                instance,
            } => self.connect(context, session, term, instance),
            PrimaryCommand::Disconnect(session) => {
                if self.session() == Some(session) {
                    self.drop_link(context, false);
                }
            }
            PrimaryCommand::Send(session, message) => {
                let bytes = encode_control(session, &ToBackup::Peer(message)).expect("a small message");
                send_control(context, session, bytes);
            }
            PrimaryCommand::StartFirstCopy(session) => {
                self.dirty.clear();
                context.moment(Moment::FirstCopy);
                context.after(0, Event::Primary(self.life, PrimaryWork::Copy(session, 0)));
            }
            PrimaryCommand::Capture {
                session,
                epoch,
                at,
                close_gate,
                stay_stopped,
            } => {
                self.outstanding = Some(Outstanding {
                    session,
                    epoch,
                    close_gate,
                    stay_stopped,
                });
                context.at(
                    at,
                    Event::Primary(self.life, PrimaryWork::CaptureBegins(session, epoch)),
                );
            }
            PrimaryCommand::Release(epoch) => {
                context.moment(Moment::Release);
                let session = self.session().expect("released in a session");
                context.checks.released(session, epoch);
                self.gate
                    .release(epoch)
                    .into_iter()
                    .for_each(|output| leave(context, output));
            }
            PrimaryCommand::OpenGate => {
                context.moment(Moment::OpenGate);
                self.gate
                    .open()
                    .into_iter()
                    .for_each(|output| leave(context, output));
            }
            PrimaryCommand::StopGuest => {
                self.guest.stopped = true;
                self.gate = Gate::Broken;
            }
            PrimaryCommand::SuspendGuest => self.guest.suspended = true,
            PrimaryCommand::ResumeGuest => {
                self.guest.suspended = false;
                self.guest.held = false;
            }
            PrimaryCommand::DrainSockets => {
                context.after(0, Event::Primary(self.life, PrimaryWork::Drained));
            }
            PrimaryCommand::Report(Notice::Paired(..)) => {
                context.checks.reached.paired = true;
                context.moment(Moment::Paired);
            }
            PrimaryCommand::Report(_) => {}
            PrimaryCommand::Finish => {
                self.finished = true;
                self.machine = None;
                // What is queued is still sent.
                if let Some(link) = self.link.take() {
                    let at =
                        context
                            .network
                            .end_noticed(context.now.after_ns(10 * MS), Line::ToBackup, false);
                    context.at(at, Event::Backup(ANY_LIFE, BackupWork::End(link.session)));
                }
                self.guest.captured = false;
            }
        }
    }

    fn connect(
        &mut self,
        context: &mut Context,
        session: Session,
        term: romulus_types::Term,
        instance: romulus_types::WitnessInstance,
    ) {
        context.moment(Moment::Connect);
        let (decoder, sender) = (FrameDecoder::for_session(session), Sender::new(session));
        self.link = Some(Link {
            session,
            decoder,
            sender,
        });
        let hello = Hello {
            vm: vm(),
            primary: HostId::new("p").expect("a name"),
            session,
            term,
            instance,
            epoch_ns: 10 * MS,
            machine: b"{}".to_vec(),
        };
        let bytes = encode_message(FrameType::Hello, session, &hello).expect("a small message");
        match context.network.connect(context.now, session) {
            Some(at) => context.at(at, Event::Backup(ANY_LIFE, BackupWork::Hello(session, bytes))),
            None => context.after(30 * MS, Event::Primary(self.life, PrimaryWork::End(session))),
        }
    }
}

/// A frame leaves the host.
fn leave(context: &mut Context, output: Output) {
    let record = context.record.clone();
    context.checks.left_primary(context.now, record.as_ref(), output);
}

fn send_control(context: &mut Context, session: Session, bytes: Bytes) {
    if let Some(at) = context
        .network
        .send(context.now, session, Stream::ControlToBackup, bytes.len())
    {
        context.at(at, Event::Backup(ANY_LIFE, BackupWork::Control(session, bytes)));
    }
}

fn send_data(context: &mut Context, session: Session, frames: Vec<Bytes>) {
    for frame in frames {
        let bytes = context.carry(frame);
        if let Some(at) = context
            .network
            .send(context.now, session, Stream::DataToBackup, bytes.len())
        {
            context.at(at, Event::Backup(ANY_LIFE, BackupWork::Data(session, bytes)));
        }
    }
}

/// Sends a request to the witness.
pub(crate) fn ask(context: &mut Context, line: Line, request: &WitnessRequest) {
    let moment = match &request.ask {
        Ask::Change {
            mode: Mode::Paired { .. },
            ..
        } => Some(Moment::AskPaired),
        Ask::Change { .. } if line == Line::BackupWitness => Some(Moment::AskTakeover),
        Ask::Change { .. } => Some(Moment::AskAlone),
        Ask::Read | Ask::Register => None,
    };
    if let Some(moment) = moment {
        context.moment(moment);
    }
    let bytes = encode_message(FrameType::WitnessRequest, Session(0), request).expect("a small message");
    for at in context.network.datagram(context.now, line) {
        context.at(at, Event::Witness(bytes.clone()));
    }
}

/// Reads a witness's reply.
pub(crate) fn reply(bytes: &Bytes) -> Result<WitnessReply, WireError> {
    let mut decoder = FrameDecoder::first_frame(FrameType::WitnessReply);
    let taken = decoder.push(bytes);
    assert_eq!(taken, bytes.len(), "a small message");
    let frame = decoder.next_frame()?.ok_or(WireError::Truncated("reply"))?;
    decode_message(FrameType::WitnessReply, &frame)
}

/// Reads what is whole of a control stream.
pub(crate) fn read_control<T: serde::de::DeserializeOwned>(
    decoder: &mut FrameDecoder,
    bytes: &Bytes,
    messages: &mut Vec<T>,
) -> Result<(), WireError> {
    let taken = decoder.push(bytes);
    assert_eq!(taken, bytes.len(), "control messages are small");
    while let Some(frame) = decoder.next_frame()? {
        messages.push(decode_control(&frame)?);
    }
    Ok(())
}

fn tell(context: &mut Context, command: &PrimaryCommand) {
    if !matches!(command, PrimaryCommand::Send(_, PrimaryMessage::Heartbeat { .. })) {
        context.tell("primary", || format!("{command:?}"));
    }
}
