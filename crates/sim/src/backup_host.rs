//! The backup's host: the agent, its image, and the guest that was activated from it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use romulus_image::ImageError;
use romulus_protocol::{
    Ask, Backup, BackupCommand, BackupConfig, BackupEvent, BackupMessage, BackupOrder, Hello, ImageStatus,
    Notice, Remembered, ToBackup, ToPrimary, Weakness,
};
use romulus_types::{HostId, Session, Term, Time, VmId};
use romulus_wire::{FrameDecoder, FrameType, WireError, decode_control, decode_message, encode_control};

use crate::context::{BackupWork, Context, Event, PrimaryWork};
use crate::guest::Memory;
use crate::mistake::Mistake;
use crate::network::Stream;
use crate::plan::{Line, MS, Moment};
use crate::primary_host::{ANY_LIFE, ask, read_frames, reply};
use crate::receiver::{Receiver, Refused};
use crate::store::Store;

mod takeover;

use takeover::ACTIVATION_RETRIES_MAX;

struct Link {
    session: Session,
    control: FrameDecoder,
    data: FrameDecoder,
    receiver: Receiver,
}

/// The agent died of its disk.
struct Died;

impl From<ImageError> for Died {
    fn from(_: ImageError) -> Self {
        Self
    }
}

/// Everything on the backup's host.
pub(crate) struct BackupHost {
    life: u32,
    machine: Option<Backup>,
    disk: Option<Remembered>,
    timer: Option<Time>,
    pub(crate) store: Store,
    link: Option<Link>,
    /// The term of each hello that is not answered yet.
    hellos: BTreeMap<Session, Term>,
    /// Sessions that are lies.
    lies: BTreeSet<Session>,
    takeover_asked: bool,
    survivor: Option<Memory>,
    pub(crate) host_lost: bool,
}

impl BackupHost {
    pub(crate) fn new(vm: VmId) -> Self {
        Self {
            life: 0,
            machine: None,
            disk: None,
            timer: None,
            store: Store::new(vm),
            link: None,
            hellos: BTreeMap::new(),
            lies: BTreeSet::new(),
            takeover_asked: false,
            survivor: None,
            host_lost: false,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.machine.is_some()
    }

    pub(crate) fn life(&self) -> u32 {
        self.life
    }

    pub(crate) fn survivor_runs(&self) -> bool {
        self.survivor.is_some()
    }

    /// The agent starts, and opens what an earlier life left.
    pub(crate) fn start(&mut self, context: &mut Context) {
        if self.machine.is_some() {
            return;
        }
        self.life += 1;
        let status = self.store.open().unwrap_or(ImageStatus::Unusable);
        context.tell("backup", || {
            format!("starts, life {}, image {status:?}", self.life)
        });
        context.checks.reopened(status, self.store.memory().as_ref());
        let config = BackupConfig {
            vm: context.vm.clone(),
            host: HostId::new("b").expect("a name"),
            suspicion_ns: 60 * MS,
            retry_ns: 20 * MS,
            mute_ns_max: 300 * MS,
            hello_wait_ns: 100 * MS,
        };
        let seed = u128::from(context.random.next());
        let mut machine = Backup::new(config, self.disk.clone(), status, seed, context.now);
        if let Some(weakness) = context.mistake.and_then(Mistake::weakness) {
            machine = machine.weakened(weakness);
        }
        self.machine = Some(machine);
        self.hellos.clear();
        self.takeover_asked = false;
        self.carry_out(context);
    }

    /// The agent dies; a guest that it started is a process of its own.
    pub(crate) fn crash(&mut self, context: &mut Context) {
        if self.machine.take().is_none() {
            return;
        }
        context.tell("backup", || "CRASHES".to_owned());
        for session in std::mem::take(&mut self.hellos).into_keys() {
            self.unreachable(context, session);
        }
        self.drop_link(context, true);
        self.store.drop_image();
        self.timer = None;
        let down_ns = context.random.within(5 * MS, 80 * MS);
        context.after(down_ns, Event::Restart(crate::plan::Node::Backup));
    }

    /// The host dies, with all that lay in its memory. What is remembered of the record lies on a disk.
    pub(crate) fn lose_host(&mut self, context: &mut Context) {
        self.crash(context);
        context.tell("backup", || "HOST CRASHES".to_owned());
        context.checks.given_up();
        self.store.lose();
        self.survivor = None;
        self.host_lost = true;
    }

    fn drop_link(&mut self, context: &mut Context, silently: bool) {
        if let Some(link) = self.link.take() {
            context.network.break_off(context.now, link.session);
            let at = context
                .network
                .end_noticed(context.now, Line::ToPrimary, silently);
            context.at(at, Event::Primary(ANY_LIFE, PrimaryWork::End(link.session)));
        }
        if let Some(image) = self.store.image() {
            image.discard_staging();
        }
    }

    pub(crate) fn work(&mut self, context: &mut Context, life: u32, work: BackupWork) {
        if self.machine.is_none() {
            if let BackupWork::Hello(session, _) = work {
                self.unreachable(context, session);
            }
            return;
        }
        if life != ANY_LIFE && life != self.life {
            return;
        }
        if self.try_work(context, work).is_err() {
            self.crash(context);
        } else {
            self.carry_out(context);
        }
    }

    /// A host that has a certificate and nothing to do with the VM says that it runs it.
    pub(crate) fn get_lie(&mut self, context: &mut Context, ahead: bool) {
        let Some(record) = context.record.clone().filter(|_| self.machine.is_some()) else {
            return;
        };
        let session = Session(u128::from(context.random.next()));
        self.lies.insert(session);
        let event = BackupEvent::Hello {
            session,
            primary: HostId::new("liar").expect("a name"),
            term: if ahead { record.term.next() } else { record.term },
            instance: record.instance,
        };
        self.hand_in(context, event);
        self.carry_out(context);
    }

    fn unreachable(&mut self, context: &mut Context, session: Session) {
        let at = context.network.end_noticed(context.now, Line::ToPrimary, false);
        context.at(at, Event::Primary(ANY_LIFE, PrimaryWork::End(session)));
    }

    fn try_work(&mut self, context: &mut Context, work: BackupWork) -> Result<(), Died> {
        let event = match work {
            BackupWork::Timer(at) => {
                if self.timer == Some(at) {
                    self.timer = None;
                    if let Some(machine) = &mut self.machine {
                        machine.handle_timeout(context.now);
                    }
                }
                return Ok(());
            }
            BackupWork::Hello(session, bytes) => match hello(&bytes) {
                Ok(hello) => {
                    self.hellos.insert(session, hello.term);
                    let Hello {
                        primary,
                        term,
                        instance,
                        ..
                    } = hello;
                    BackupEvent::Hello {
                        session,
                        primary,
                        term,
                        instance,
                    }
                }
                Err(_) => {
                    self.unreachable(context, session);
                    return Ok(());
                }
            },
            BackupWork::Control(session, _) | BackupWork::Data(session, _)
                if context.network.lost(context.now, session) =>
            {
                return Ok(());
            }
            BackupWork::Control(session, bytes) => {
                self.control(context, session, &bytes);
                return Ok(());
            }
            BackupWork::Data(session, bytes) => return self.data(context, session, &bytes),
            BackupWork::End(session) => {
                if self.link.as_ref().is_some_and(|link| link.session == session) {
                    self.drop_link(context, false);
                }
                BackupEvent::Disconnected(session)
            }
            BackupWork::Reply(bytes) => match reply(&bytes) {
                Ok(reply) => BackupEvent::Witness(reply),
                Err(_) => return Ok(()),
            },
            BackupWork::StandbyTried(session, epoch) => {
                if context.random.chance(context.plan.standby_fails_permille) {
                    BackupEvent::StandbyFailed(session)
                } else {
                    BackupEvent::StandbyLoaded(session, epoch)
                }
            }
            BackupWork::Surveyed(session, frames) => {
                if self.link.as_ref().is_some_and(|link| link.session == session) {
                    for frame in frames {
                        self.send_bytes(context, session, frame);
                    }
                }
                return Ok(());
            }
            BackupWork::Drained => BackupEvent::Drained,
            BackupWork::Activate(session, tries_left) => {
                self.activate(context, session, tries_left);
                return Ok(());
            }
            BackupWork::Failover => BackupEvent::Order(BackupOrder::Failover),
        };
        self.hand_in(context, event);
        Ok(())
    }

    fn hand_in(&mut self, context: &mut Context, event: BackupEvent) {
        if let Some(machine) = &mut self.machine {
            machine.handle(context.now, event);
        }
    }

    fn control(&mut self, context: &mut Context, session: Session, bytes: &Bytes) {
        let Some(link) = self.link.as_mut().filter(|link| link.session == session) else {
            return;
        };
        let mut frames = Vec::new();
        let mut read = read_frames(&mut link.control, bytes, &mut frames);
        for frame in &frames {
            match decode_control(frame) {
                Ok(ToBackup::Peer(message)) => self.hand_in(context, BackupEvent::Peer(session, message)),
                Err(error) => read = Err(error),
            }
        }
        if read.is_err() {
            self.drop_link(context, false);
            self.hand_in(context, BackupEvent::Disconnected(session));
        }
    }

    fn data(&mut self, context: &mut Context, session: Session, bytes: &Bytes) -> Result<(), Died> {
        let Some(link) = self.link.as_mut().filter(|link| link.session == session) else {
            return Ok(());
        };
        let taken = link.data.push(bytes);
        assert_eq!(taken, bytes.len(), "frames come one by one");
        loop {
            let Some(link) = self.link.as_mut().filter(|link| link.session == session) else {
                return Ok(());
            };
            let Some(image) = self.store.image() else {
                return Ok(());
            };
            let committed = match link.data.next_frame().map_err(Refused::from) {
                Ok(None) => return Ok(()),
                Ok(Some(frame)) => link.receiver.take(&frame, image),
                Err(error) => Err(error),
            };
            match committed {
                Ok(None) => {}
                Ok(Some((epoch, captured))) => {
                    self.committed(context, session, epoch, captured)?;
                    // The machine's commands come before the next frame.
                    self.carry_out(context);
                }
                Err(_) if self.store.is_blown() => return Err(Died),
                Err(error) => {
                    let epoch = link.receiver.epoch();
                    context.tell("backup", || format!("refuses epoch {epoch}: {error}"));
                    context.checks.invalid(epoch, error.to_string());
                    self.hand_in(context, BackupEvent::Invalid(session, epoch));
                    return Ok(());
                }
            }
        }
    }

    /// A checkpoint is durable: from here on it counts, whatever happens to the agent.
    fn committed(
        &mut self,
        context: &mut Context,
        session: Session,
        epoch: romulus_types::Epoch,
        captured: Time,
    ) -> Result<(), Died> {
        let memory = (epoch.0 % 4 == 1).then(|| self.store.memory()).flatten();
        context.checks.committed(session, epoch, memory.as_ref());
        context.moment(Moment::Commit);
        self.hand_in(context, BackupEvent::Verified(session, epoch, captured));
        let twice = context.is_planted(Mistake::CommitAppliedTwice) && context.random.chance(100);
        if let Some(image) = self.store.image() {
            image.apply()?;
        }
        if let Some(link) = self.link.as_mut() {
            let last = link.receiver.take_last_pages();
            if twice {
                last.iter()
                    .for_each(|(index, page)| self.store.overwrite(*index, page));
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, context: &mut Context) {
        while let Some(command) = self.machine.as_mut().and_then(Backup::poll_command) {
            if !matches!(command, BackupCommand::Send(_, BackupMessage::Alive { .. })) {
                context.tell("backup", || format!("{command:?}"));
            }
            if self.command(context, command).is_err() {
                return self.crash(context);
            }
        }
        let due = self.machine.as_ref().and_then(Backup::poll_timeout);
        if due != self.timer {
            self.timer = due;
            if let Some(at) = due {
                context.at(at, Event::Backup(self.life, BackupWork::Timer(at)));
            }
        }
    }

    fn command(&mut self, context: &mut Context, command: BackupCommand) -> Result<(), Died> {
        match command {
            BackupCommand::Remember(remembered) => {
                context.checks.remembered(context.record.as_ref(), &remembered);
                self.disk = Some(remembered);
            }
            BackupCommand::AskWitness(request) => {
                self.takeover_asked |= matches!(request.ask, Ask::Change { .. });
                ask(context, Line::BackupWitness, &request);
            }
            BackupCommand::MarkUnusable => {
                self.takeover_asked = false;
                context.checks.given_up();
                self.store.mark_unusable()?;
            }
            BackupCommand::Accept(session) => {
                if self.accept(context, session).is_err() {
                    // The connection ends with the agent.
                    self.unreachable(context, session);
                    return Err(Died);
                }
            }
            BackupCommand::Refuse(session, _) if self.lies.contains(&session) => {}
            BackupCommand::Refuse(session, reason) => {
                self.hellos.remove(&session);
                let refused = ToPrimary::Refused {
                    reason: format!("{reason:?}"),
                    passing: true,
                };
                self.send(context, session, &refused);
            }
            BackupCommand::Disconnect(session) => {
                if self.link.as_ref().is_some_and(|link| link.session == session) {
                    self.drop_link(context, false);
                }
            }
            BackupCommand::Send(session, message) => {
                if let BackupMessage::Alive { committed, .. } = &message {
                    context.checks.said(session, *committed, self.takeover_asked);
                }
                self.send(context, session, &ToPrimary::Peer(message));
            }
            BackupCommand::TryStandby(session, epoch) => {
                context.moment(Moment::StandbyTrial);
                let load_ns = context.random.within(MS, 20 * MS);
                context.after(
                    load_ns,
                    Event::Backup(self.life, BackupWork::StandbyTried(session, epoch)),
                );
            }
            BackupCommand::Activate { session, .. } => {
                self.activate(context, session, ACTIVATION_RETRIES_MAX)
            }
            BackupCommand::DrainSockets => {
                context.after(0, Event::Backup(self.life, BackupWork::Drained));
            }
            BackupCommand::StopGuest => self.survivor = None,
            BackupCommand::Report(Notice::Suspicion { .. }) => context.moment(Moment::Suspicion),
            BackupCommand::Report(_) => {}
        }
        Ok(())
    }

    fn accept(&mut self, context: &mut Context, session: Session) -> Result<(), Died> {
        if self.lies.contains(&session) {
            context.checks.liar_let_in();
            return Ok(());
        }
        let term = self.hellos.remove(&session).expect("it said hello");
        context.checks.given_up();
        let mistaken = context.mistake.and_then(Mistake::weakness) == Some(Weakness::TakeOverFromOldSession);
        let old_list = context.is_planted(Mistake::OldListOfHeldPages);
        let held = self.store.begin(session, !mistaken, old_list)?;
        let (control, data) = (
            FrameDecoder::for_session(session),
            FrameDecoder::for_session(session),
        );
        let receiver = Receiver::new(session, term);
        self.link = Some(Link {
            session,
            control,
            data,
            receiver,
        });
        context.moment(Moment::Accept);
        let backup = HostId::new("b").expect("a name");
        self.send(context, session, &ToPrimary::Welcome { backup });
        let (from_ns, to_ns) = context.plan.survey_ns;
        let survey_ns = context.random.within(from_ns, to_ns);
        context.after(
            survey_ns,
            Event::Backup(self.life, BackupWork::Surveyed(session, held)),
        );
        Ok(())
    }

    fn send(&mut self, context: &mut Context, session: Session, message: &ToPrimary) {
        let bytes = encode_control(session, message).expect("a small message");
        self.send_bytes(context, session, bytes);
    }

    fn send_bytes(&mut self, context: &mut Context, session: Session, bytes: Bytes) {
        if let Some(at) = context
            .network
            .send(context.now, session, Stream::ControlToPrimary, bytes.len())
        {
            context.at(at, Event::Primary(ANY_LIFE, PrimaryWork::Control(session, bytes)));
        }
    }
}

fn hello(bytes: &Bytes) -> Result<Hello, WireError> {
    let mut decoder = FrameDecoder::first_frame(FrameType::Hello);
    let taken = decoder.push(bytes);
    assert_eq!(taken, bytes.len(), "a small message");
    let frame = decoder.next_frame()?.ok_or(WireError::Truncated("hello"))?;
    decode_message(FrameType::Hello, &frame)
}
