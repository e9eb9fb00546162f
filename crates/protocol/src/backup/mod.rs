//! The backup's machine: follows a primary, acknowledges what is committed, and takes over when the record says so.
//!
//! ```text
//!      Hello, and the record names it:
//!            mark unusable, accept                        silent: drain, then read
//!   Idle ────────────────────────────────► Following ────────────────────────────────► Reading
//!    ▲ ▲                                    │     ▲ ◄──────── heard again ───────────────┤ │
//!    │ └── left, or lost with no commit ────┘     └── Hello ── Orphaned ─── silent ──────┘ │ Paired(.., us, session,
//!    │                             disconnected, with a commit ──► (also after a restart)  │ first epoch ≤ commit)
//!    │                                                                                     ▼
//!    └───────────────── any other record: mark unusable ◄──── Refused ─────────────── Asking
//!                                                                                          │ Granted
//!                            Active: the guest runs here  ◄── Alone(us), by our nonce ─────┘
//! ```
//!
//! What must hold:
//!
//! - It takes over only when the record is `Alone(self)` by a request made for the very session of its last commit, from
//!   `Paired` with a first epoch that the commit reaches. A forced takeover is the operator's word instead.
//! - The image is marked unusable before a session that will overwrite it is accepted.
//! - Nothing is acknowledged while a takeover is asked for, nor afterwards; asking ends the session's connection.
//! - A takeover is asked for with a nonce derived from the session, so a restarted backup repeats the same request and
//!   recognises an unconsumed grant by the record alone. This is safe: as long as the image still is a commit of that
//!   session, nothing was activated from it (activating marks it as consumed first) and nothing overwrote it (that
//!   marks it unusable first), and a record with that nonce was changed by nobody since.
//! - A session's image is activated at most once.
//! - What a hello says of the record is not believed: the witness's word is.
//!
//! Files: `admit` lets a primary in, `follow` is the session with the primary, `takeover` everything after its loss, `timer` the deadlines.

mod admit;
mod follow;
#[cfg(test)]
mod normal;
mod takeover;
mod timer;

use std::collections::VecDeque;

use romulus_types::{Epoch, Session, Term, Time, WitnessInstance};

use crate::api::{
    BackupCommand, BackupConfig, BackupEvent, ImageStatus, NotProtected, Notice, Protection, Remembered,
};
use crate::draw::Draw;
use crate::pending::Pending;
use crate::weakness::Weakness;
use admit::{Candidate, Claim};

/// Where the backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Nothing here could be taken over, and no primary is connected.
    Idle,
    /// A primary is connected.
    Following,
    /// There is a commit, and its primary is not connected; suspicion follows unless it comes back.
    Orphaned,
    /// The primary is suspected, the record is being read. Nothing is asked for yet.
    Reading,
    /// The takeover is asked for. There is no way back but the answer.
    Asking,
    /// The guest was activated here.
    Active {
        /// The term in which this host speaks.
        term: Term,
        /// The witness has said so in this life of the agent. Until then, after a forced takeover or a restart, no primary is
        /// let in, and the record decides whether the guest goes on.
        granted: bool,
    },
}

/// How far the trial standby is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum StandbyTrial {
    NotTried,
    Trying,
    Loaded,
    FailedAt(Time),
}

/// The session with the primary.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Link {
    session: Session,
    /// It said something. Before that its silence means nothing: the image is being read, however long that takes, and
    /// there is no commit to take over from. The connection's own timeout ends a dead one.
    heard: bool,
    /// `sent` of the newest heartbeat.
    answers: Time,
    standby: StandbyTrial,
    /// Trials that failed in this session, counted up to a limit.
    trial_failures: u32,
}

/// The backup's machine for one VM. See the module's head.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backup {
    config: BackupConfig,
    draw: Draw,
    weakness: Option<Weakness>,
    commands: VecDeque<BackupCommand>,
    remembered: Option<Remembered>,
    image: ImageStatus,
    /// The session whose verified checkpoints the image holds or will hold; none once it is marked.
    writing: Option<Session>,
    /// The session that the primary said is paired.
    paired: Option<Session>,
    phase: Phase,
    pending: Option<Pending>,
    link: Option<Link>,
    /// Hosts that said hello, while the witness is asked about them.
    candidates: Vec<Candidate>,
    heard_at: Time,
    draining: bool,
    graced: bool,
    /// When an operator's forced takeover is due.
    force_at: Option<Time>,
    shown: Option<Protection>,
}

impl Backup {
    /// Starts with what the image store holds. `remembered` is what the last [`BackupCommand::Remember`] wrote; `seed`
    /// is random. With a commit in store, the primary has the suspicion timeout from `now` to come back. With a guest that
    /// an earlier life started, the record is read: a guest that it does not name is stopped.
    #[must_use]
    pub fn new(
        config: BackupConfig,
        remembered: Option<Remembered>,
        image: ImageStatus,
        seed: u128,
        now: Time,
    ) -> Self {
        let committed = match image {
            ImageStatus::Committed { session, .. } => Some(session),
            ImageStatus::Unusable | ImageStatus::Consumed => None,
        };
        let mut backup = Self {
            config,
            draw: Draw::new(seed),
            weakness: None,
            commands: VecDeque::new(),
            remembered,
            image,
            writing: committed,
            paired: None,
            phase: if committed.is_some() {
                Phase::Orphaned
            } else {
                Phase::Idle
            },
            pending: None,
            link: None,
            candidates: Vec::new(),
            heard_at: now,
            draining: false,
            graced: false,
            force_at: None,
            shown: None,
        };
        if image == ImageStatus::Consumed {
            // An earlier life started a guest, perhaps by an operator's force: the record says whether it may run.
            let term = backup.term().unwrap_or_default();
            backup.phase = Phase::Active { term, granted: false };
            backup.ask_read(now);
        }
        backup.refresh();
        backup
    }

    /// Plants a mistake, for the simulator and the model only.
    #[must_use]
    pub fn weakened(mut self, weakness: Weakness) -> Self {
        self.weakness = Some(weakness);
        self
    }

    /// Hands in an event. Afterwards: [`Backup::poll_command`] until `None`, then [`Backup::poll_timeout`].
    pub fn handle(&mut self, now: Time, event: BackupEvent) {
        self.make_up_for_stall(now);
        match event {
            BackupEvent::Hello {
                session,
                primary,
                term,
                instance,
            } => {
                let claim = Claim {
                    session,
                    primary,
                    term,
                    instance,
                };
                self.on_hello(now, claim);
            }
            BackupEvent::Disconnected(session) => self.on_disconnected(session),
            BackupEvent::Peer(session, message) => self.on_peer(now, session, message),
            BackupEvent::Verified(session, epoch, captured) => {
                self.on_verified(now, session, epoch, captured)
            }
            BackupEvent::Invalid(session, _) => self.on_invalid(session),
            BackupEvent::StandbyLoaded(session, epoch) => self.on_standby_loaded(session, epoch),
            BackupEvent::StandbyFailed(session) => self.on_standby_failed(now, session),
            BackupEvent::Witness(reply) => self.on_witness(now, reply),
            BackupEvent::Drained => self.on_drained(now),
            BackupEvent::Activated => {}
            BackupEvent::ActivationFailed => self.report(Notice::ActivationFailed),
            BackupEvent::Order(order) => self.on_order(now, order),
        }
        self.refresh();
    }

    /// Hands in that time has passed. To be called at [`Backup::poll_timeout`] at the latest; calling early is harmless.
    pub fn handle_timeout(&mut self, now: Time) {
        self.make_up_for_stall(now);
        self.fire_timers(now);
        self.refresh();
    }

    /// The next thing to do, in order; `None` when nothing is left.
    pub fn poll_command(&mut self) -> Option<BackupCommand> {
        self.commands.pop_front()
    }

    /// What an operator sees.
    #[must_use]
    pub fn protection(&self) -> Protection {
        let following = self.link.as_ref().filter(|_| self.phase == Phase::Following);
        Protection::NotProtected(match (&self.phase, following) {
            (Phase::Active { .. }, _) => NotProtected::TookOver,
            _ if self.pending.as_ref().is_some_and(|pending| pending.doubted) => NotProtected::WitnessRefuses,
            _ if self.pending.as_ref().is_some_and(Pending::unreachable) => NotProtected::WitnessUnreachable,
            (_, Some(link)) if self.paired == Some(link.session) => return Protection::Protected,
            (_, Some(link)) if link.standby == StandbyTrial::Loaded => NotProtected::Pairing,
            (_, Some(_)) if self.committed().is_some() => NotProtected::StandbyNotProven,
            (_, Some(_)) => NotProtected::Resynchronising,
            (Phase::Orphaned | Phase::Reading | Phase::Asking, _) => NotProtected::Resolving,
            (Phase::Idle | Phase::Following, None) if self.nobody_vouches() => {
                NotProtected::WitnessUnreachable
            }
            (Phase::Idle | Phase::Following, None) => NotProtected::NoBackup,
        })
    }

    /// The record's term as this host knows it.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        self.remembered.as_ref().map(|known| known.term)
    }

    /// The session of the connected primary.
    #[must_use]
    pub fn session(&self) -> Option<Session> {
        self.link.as_ref().map(|link| link.session)
    }

    /// What the image is, as far as this machine was told.
    #[must_use]
    pub fn image(&self) -> ImageStatus {
        self.image
    }

    /// The last commit.
    #[must_use]
    pub fn committed(&self) -> Option<(Session, Epoch)> {
        match self.image {
            ImageStatus::Committed { session, epoch } => Some((session, epoch)),
            ImageStatus::Unusable | ImageStatus::Consumed => None,
        }
    }

    /// The guest runs here, and the witness has not confirmed it yet: after a forced takeover, or a restart.
    #[must_use]
    pub fn is_unconfirmed(&self) -> bool {
        matches!(self.phase, Phase::Active { granted: false, .. })
    }

    /// The guest was activated here, in this term.
    #[must_use]
    pub fn active(&self) -> Option<Term> {
        match self.phase {
            Phase::Active { term, .. } => Some(term),
            _ => None,
        }
    }

    /// A host waits for the word of a witness that does not answer.
    fn nobody_vouches(&self) -> bool {
        self.candidates
            .iter()
            .any(|candidate| candidate.read.unreachable())
    }

    fn refresh(&mut self) {
        let following = matches!(self.phase, Phase::Following);
        assert!(
            !following || self.link.is_some(),
            "following means that a primary is connected"
        );
        let asking = matches!(self.phase, Phase::Reading | Phase::Asking);
        assert!(!asking || self.pending.is_some(), "a question was put");
        let protection = self.protection();
        if self.shown != Some(protection) {
            self.shown = Some(protection);
            self.report(Notice::Protection(protection));
        }
    }

    fn report(&mut self, notice: Notice) {
        self.commands.push_back(BackupCommand::Report(notice));
    }

    fn command(&mut self, command: BackupCommand) {
        self.commands.push_back(command);
    }

    fn is_session(&self, session: Session) -> bool {
        self.link.as_ref().is_some_and(|link| link.session == session)
    }

    fn weak(&self, weakness: Weakness) -> bool {
        self.weakness == Some(weakness)
    }

    /// Remembers what was learnt of the record, durably before anything that follows from it.
    fn remember(&mut self, instance: WitnessInstance, term: Term) {
        let remembered = Remembered { instance, term };
        if self.remembered.as_ref() != Some(&remembered) {
            self.remembered = Some(remembered.clone());
            self.command(BackupCommand::Remember(remembered));
        }
    }

    /// Marks the image, durably before anything that follows.
    fn mark_unusable(&mut self) {
        self.writing = None;
        self.paired = None;
        self.image = ImageStatus::Unusable;
        self.command(BackupCommand::MarkUnusable);
    }

    fn drop_link(&mut self) {
        if let Some(link) = self.link.take() {
            self.command(BackupCommand::Disconnect(link.session));
        }
    }
}
