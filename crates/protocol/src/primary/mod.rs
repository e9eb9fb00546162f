//! The primary's machine: runs beside the guest, decides when output may leave and when the record is to change.
//!
//! ```text
//!  Consulting ── Granted Alone(self) ──► Alone ── gate closed at k, B committed k ──► Pairing ── Granted ──► Paired
//!      │                                  ▲ ▲                                           │ (lost: wait         │
//!      │ Alone(other)                     │ └ backup lost before a request: open        │  for the answer)     │
//!      ▼                                  │                                             ▼                      │
//!  Finished ◄── Refused, or granted ── Leaving ◄───── lost, held too long, unprotect, power-off, hand over ────┘
//!               Ended or Alone(B)         └──── Granted Alone(self): open the gate, connect again ──► Alone
//! ```
//!
//! Inside `Alone`, a [`Link`] goes through connecting, copying and capturing. What must hold:
//!
//! - An epoch is released only while `Paired`, with no request unresolved, when the backup has committed it, and by an
//!   answer younger than `release_age_ns_max` on our own clock.
//! - The gate is opened only when the record is `Alone(self)` and no request that could change that is under way.
//! - A new life first makes a new term of its own, which voids the requests of its earlier life.
//! - A request to the witness is repeated unchanged until it is resolved; only then is the next one made.
//!
//! Files: `ask` talks to the witness, `session` to the backup, `pace` captures and releases, `orders` is for operators
//! and the guest, `timer` for deadlines.

mod ask;
#[cfg(test)]
mod normal;
mod orders;
mod pace;
mod session;
mod timer;

use std::collections::VecDeque;

use romulus_types::{Epoch, HostId, Session, Term, Time};

use crate::api::{NotProtected, Notice, PrimaryCommand, PrimaryConfig, PrimaryEvent, Protection, Remembered};
use crate::draw::Draw;
use crate::pending::Pending;
use crate::weakness::Weakness;

/// Where the primary stands with the record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Asking what the record says, then for a term of this life's own.
    Consulting,
    /// The record is `Alone(self)`, and nothing is asked.
    Alone,
    /// `Paired` from this epoch is asked for.
    Pairing { first_epoch: Epoch },
    /// The record is `Paired`, and nothing is asked.
    Paired,
    /// Another record is asked for.
    Leaving(Leave),
    /// Nothing further happens, because of this.
    Finished(NotProtected),
}

/// What a primary leaves `Paired` (or, for the end, `Alone`) for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Leave {
    /// The guest goes on here.
    Alone,
    /// The guest goes on at the backup from this checkpoint.
    HandedOver { last_epoch: Epoch },
    /// The guest was powered off.
    Ended,
}

/// What is wanted in the end; acted upon whenever no request is unresolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Intent {
    /// Keep the guest protected.
    Protect,
    /// Leave this session and start another: what was copied no longer holds.
    Rejoin,
    /// Move the guest, unless it takes longer than until then.
    HandOver { deadline: Time },
    /// Leave the guest alone, for good.
    Unprotect,
    /// The guest was powered off.
    PowerOff,
}

/// How far a session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Connecting,
    Copying,
    Capturing,
}

/// A capture that the driver was told to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Outstanding {
    epoch: Epoch,
    close_gate: bool,
    stay_stopped: bool,
}

/// The session with the backup.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Link {
    session: Session,
    stage: Stage,
    standby_loaded: bool,
    /// Newest epoch that was captured.
    captured: Epoch,
    outstanding: Option<Outstanding>,
    /// When the last capture was due.
    due_at: Time,
    /// Newest epoch that the backup said is committed.
    committed: Epoch,
    /// When the heartbeat that its newest answer belongs to was sent.
    answers: Time,
    heard_at: Time,
    heartbeat_at: Time,
    draining: bool,
    /// A stall of our own was already made up for since the backup was last heard.
    graced: bool,
    /// The last answer was too old; said once.
    stale: bool,
    /// The final checkpoint of a hand-over.
    last_epoch: Option<Epoch>,
}

/// The gate as the driver was told to have it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Gate {
    Open,
    Closed {
        /// Newest epoch whose frames have left.
        released: Epoch,
        /// Epochs after `released` and when they ended. At most `epochs_in_flight_max`, and one.
        ended: VecDeque<(Epoch, Time)>,
        /// When the first frame that is still held may have been sent.
        held_since: Time,
    },
}

/// What is known of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Guest {
    /// Not paused by others.
    running: bool,
    /// Stopped by us because it was mute for too long.
    suspended: bool,
    /// Stopped by the final capture of a hand-over.
    stopped: bool,
}

/// The primary's machine for one VM. See the module's head; how to drive it is said in [`crate::api`](crate).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Primary {
    config: PrimaryConfig,
    draw: Draw,
    weakness: Option<Weakness>,
    commands: VecDeque<PrimaryCommand>,
    remembered: Option<Remembered>,
    phase: Phase,
    pending: Option<Pending>,
    link: Option<Link>,
    gate: Gate,
    guest: Guest,
    intent: Intent,
    reconnect_at: Option<Time>,
    shown: Option<Protection>,
}

impl Primary {
    /// Starts by asking the witness. The guest runs, and the driver can reach its hypervisor; a guest that is gone
    /// needs no primary. `remembered` is what the last [`PrimaryCommand::Remember`] wrote; `seed` is random.
    #[must_use]
    pub fn new(config: PrimaryConfig, remembered: Option<Remembered>, seed: u128, now: Time) -> Self {
        let mut primary = Self {
            config,
            draw: Draw::new(seed),
            weakness: None,
            commands: VecDeque::new(),
            remembered,
            phase: Phase::Consulting,
            pending: None,
            link: None,
            gate: Gate::Open,
            guest: Guest {
                running: true,
                suspended: false,
                stopped: false,
            },
            intent: Intent::Protect,
            reconnect_at: None,
            shown: None,
        };
        primary.ask_read(now);
        primary.refresh();
        primary
    }

    /// Plants a mistake, for the simulator and the model only.
    #[must_use]
    pub fn weakened(mut self, weakness: Weakness) -> Self {
        self.weakness = Some(weakness);
        self
    }

    /// Hands in an event. Afterwards: [`Primary::poll_command`] until `None`, then [`Primary::poll_timeout`].
    pub fn handle(&mut self, now: Time, event: PrimaryEvent) {
        if matches!(self.phase, Phase::Finished(_)) {
            return;
        }
        self.make_up_for_stall(now);
        match event {
            PrimaryEvent::Connected(session) => self.on_connected(now, session),
            PrimaryEvent::Disconnected(session) => {
                if self.is_session(session) {
                    self.lose_link(now, false);
                }
            }
            PrimaryEvent::Peer(session, message) => self.on_peer(now, session, &message),
            PrimaryEvent::Witness(reply) => self.on_witness(now, reply),
            PrimaryEvent::FirstCopyDone(session) => self.on_first_copy(now, session),
            PrimaryEvent::Captured(session, epoch, due_at) => self.on_captured(now, session, epoch, due_at),
            PrimaryEvent::CaptureFailed(session, _) => {
                if self.is_session(session) {
                    self.lose_link(now, false);
                }
            }
            PrimaryEvent::Drained => self.on_drained(now),
            PrimaryEvent::Guest(event) => self.on_guest(now, event),
            PrimaryEvent::Order(order) => self.on_order(now, order),
            PrimaryEvent::EpochLength(epoch_ns) => self.config.epoch_ns = epoch_ns,
        }
        self.advance(now);
    }

    /// Hands in that time has passed. To be called at [`Primary::poll_timeout`] at the latest; calling early is harmless.
    pub fn handle_timeout(&mut self, now: Time) {
        if matches!(self.phase, Phase::Finished(_)) {
            return;
        }
        self.make_up_for_stall(now);
        self.fire_timers(now);
        self.advance(now);
    }

    /// The next thing to do, in order; `None` when nothing is left.
    pub fn poll_command(&mut self) -> Option<PrimaryCommand> {
        self.commands.pop_front()
    }

    /// What an operator sees.
    #[must_use]
    pub fn protection(&self) -> Protection {
        Protection::NotProtected(match &self.phase {
            Phase::Finished(why) => *why,
            _ if self.pending.as_ref().is_some_and(|pending| pending.doubted) => NotProtected::WitnessRefuses,
            _ if self.pending.as_ref().is_some_and(Pending::unreachable) => NotProtected::WitnessUnreachable,
            Phase::Consulting => NotProtected::Starting,
            Phase::Leaving(_) => NotProtected::Resolving,
            _ if !self.guest.running => NotProtected::GuestNotRunning,
            Phase::Pairing { .. } => NotProtected::Pairing,
            Phase::Paired => return Protection::Protected,
            Phase::Alone => match &self.link {
                None => NotProtected::NoBackup,
                Some(link) if link.stage == Stage::Connecting => NotProtected::NoBackup,
                Some(link) if link.standby_loaded => NotProtected::Pairing,
                Some(link) if link.committed > Epoch::NONE => NotProtected::StandbyNotProven,
                Some(_) => NotProtected::Resynchronising,
            },
        })
    }

    /// The record's term as this host knows it.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        self.remembered.as_ref().map(|known| known.term)
    }

    /// The session with the backup, if there is one.
    #[must_use]
    pub fn session(&self) -> Option<Session> {
        self.link.as_ref().map(|link| link.session)
    }

    /// Newest epoch of the session that the backup has committed.
    #[must_use]
    pub fn committed(&self) -> Epoch {
        self.link.as_ref().map_or(Epoch::NONE, |link| link.committed)
    }

    /// Newest epoch of the session that was captured.
    #[must_use]
    pub fn captured(&self) -> Epoch {
        self.link.as_ref().map_or(Epoch::NONE, |link| link.captured)
    }

    /// Captured and not yet committed (while paired: not yet released).
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let Some(link) = &self.link else { return 0 };
        let done = match (&self.gate, &self.phase) {
            (Gate::Closed { released, .. }, Phase::Pairing { .. } | Phase::Paired) => {
                link.committed.min(*released)
            }
            _ => link.committed,
        };
        link.captured.0.saturating_sub(done.0)
    }

    /// Nothing further will happen.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Finished(_))
    }

    /// What follows from the new state whatever the event was.
    fn advance(&mut self, now: Time) {
        self.settle(now);
        self.pace(now);
        self.refresh();
        let releasing = matches!(self.phase, Phase::Paired);
        assert!(
            !releasing || self.pending.is_none(),
            "paired means that no request is unresolved"
        );
        assert!(
            self.phase != Phase::Alone || self.pending.is_none(),
            "alone means that no request is unresolved"
        );
    }

    fn refresh(&mut self) {
        let protection = self.protection();
        if self.shown != Some(protection) {
            self.shown = Some(protection);
            self.report(Notice::Protection(protection));
        }
    }

    fn report(&mut self, notice: Notice) {
        self.commands.push_back(PrimaryCommand::Report(notice));
    }

    fn command(&mut self, command: PrimaryCommand) {
        self.commands.push_back(command);
    }

    fn is_session(&self, session: Session) -> bool {
        self.link.as_ref().is_some_and(|link| link.session == session)
    }

    fn is_self(&self, host: &HostId) -> bool {
        *host == self.config.host
    }

    fn weak(&self, weakness: Weakness) -> bool {
        self.weakness == Some(weakness)
    }
}
