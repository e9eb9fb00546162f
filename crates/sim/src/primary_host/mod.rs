//! The primary's host: the guest, its gate, and the replicator, which may die and come back while the guest runs on.

mod guest_side;
mod lines;

pub(crate) use lines::{ask, read_frames, reply};

use std::collections::BTreeSet;

use bytes::Bytes;
use romulus_page_codec::HeldPages;
use romulus_protocol::{
    Hello, Notice, Primary, PrimaryCommand, PrimaryConfig, PrimaryEvent, Remembered, ToBackup, ToPrimary,
};
use romulus_types::{Epoch, HostId, PageIndex, Session, Term, Time, WitnessInstance};
use romulus_wire::{
    Frame, FrameDecoder, FrameType, HeldPagesFrame, WireError, decode_control, encode_control, encode_message,
};

use crate::context::{BackupWork, Context, Event, PrimaryWork};
use crate::gate::Gate;
use crate::guest::{Memory, PAGES};
use crate::mistake::Mistake;
use crate::plan::{Line, MS, Moment};
use crate::sender::{Harvest, Sender};
use guest_side::Guest;
use lines::{leave, send_control, tell};

/// For whichever life of a process is there.
pub(crate) const ANY_LIFE: u32 = u32::MAX;

struct Link {
    session: Session,
    decoder: FrameDecoder,
    /// What the backup said so far that it holds.
    held: HeldPages,
    /// There is one once that list is complete.
    sender: Option<Sender>,
}

struct Outstanding {
    session: Session,
    epoch: Epoch,
    close_gate: bool,
    stay_stopped: bool,
    due_at: Time,
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
        let guest = Guest::new(memory, random);
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

    /// A replicator is there, and was not told to leave.
    pub(crate) fn is_protecting(&self) -> bool {
        self.machine.is_some() && !self.finished
    }

    /// The replicator starts, if there is still something to protect.
    pub(crate) fn start(&mut self, context: &mut Context) {
        if self.machine.is_some() || self.finished || !self.guest.there || self.guest.stopped {
            return;
        }
        self.life += 1;
        context.tell("primary", || format!("starts, life {}", self.life));
        let config = PrimaryConfig {
            vm: context.vm.clone(),
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
        let outstanding = self.outstanding.take();
        if let Some(harvest) = self.harvest.take() {
            self.dirty.extend(harvest.pages);
            // A capture that has begun goes on to its end, wherever its checkpoint may go.
            self.guest.held |= outstanding.is_some_and(|capture| capture.stay_stopped);
        }
        self.guest.captured = false;
        if let Some(link) = self.link.take() {
            context.network.break_off(context.now, link.session);
            let at = context.network.end_noticed(context.now, Line::ToBackup, silently);
            context.at(at, Event::Backup(ANY_LIFE, BackupWork::End(link.session)));
        }
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
        let mut frames = Vec::new();
        let mut read = read_frames(&mut link.decoder, bytes, &mut frames);
        for frame in frames {
            let event = match self.control_frame(context, session, &frame) {
                Ok(Some(event)) => event,
                Ok(None) => continue,
                Err(error) => {
                    read = Err(error);
                    break;
                }
            };
            self.hand_in(context, event);
        }
        if read.is_err() && self.session() == Some(session) {
            self.drop_link(context, false);
            self.hand_in(context, PrimaryEvent::Disconnected(session));
        }
    }

    fn control_frame(
        &mut self,
        context: &mut Context,
        session: Session,
        frame: &Frame,
    ) -> Result<Option<PrimaryEvent>, WireError> {
        if frame.frame_type == FrameType::HeldPages {
            let part = HeldPagesFrame::parse(frame)?;
            let link = self.link.as_mut().filter(|link| link.session == session);
            let Some(link) = link else { return Ok(None) };
            for (page, hash) in part.entries() {
                link.held
                    .note(page, hash)
                    .expect("the backup has the guest's layout");
                context.checks.reached.held_pages += 1;
            }
            if !part.is_end() {
                return Ok(None);
            }
            let held = std::mem::replace(&mut link.held, HeldPages::new(session, 0));
            link.sender = Some(Sender::new(session, held));
            return Ok(Some(PrimaryEvent::Connected(session)));
        }
        Ok(match decode_control(frame)? {
            ToPrimary::Welcome { .. } => None,
            ToPrimary::Refused { .. } => Some(PrimaryEvent::Disconnected(session)),
            ToPrimary::Peer(message) => Some(PrimaryEvent::Peer(session, message)),
        })
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
            other => self.guest_command(context, other),
        }
    }

    /// What concerns the guest and its gate.
    fn guest_command(&mut self, context: &mut Context, command: PrimaryCommand) {
        match command {
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
                // A guest that is idle is left alone for longer.
                let idle = !stay_stopped && context.random.chance(100);
                let idle_ns = if idle {
                    context.random.within(1, 50 * MS)
                } else {
                    0
                };
                let due_at = at.after_ns(idle_ns);
                self.outstanding = Some(Outstanding {
                    session,
                    epoch,
                    close_gate,
                    stay_stopped,
                    due_at,
                });
                context.at(
                    due_at,
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
            other => unreachable!("{other:?} is not the guest's"),
        }
    }

    fn connect(&mut self, context: &mut Context, session: Session, term: Term, instance: WitnessInstance) {
        context.moment(Moment::Connect);
        self.link = Some(Link {
            session,
            decoder: FrameDecoder::for_session(session),
            held: HeldPages::new(session, PAGES),
            sender: None,
        });
        let hello = Hello {
            vm: context.vm.clone(),
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
