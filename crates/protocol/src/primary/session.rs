//! The primary's sessions with its backup: connecting, hearing from it, losing it.

use romulus_types::{Epoch, Session, Time};

use super::{Gate, Intent, Leave, Link, Phase, Primary, Stage};
use crate::api::{Notice, PrimaryCommand, PrimaryOrder};
use crate::message::{BackupMessage, PrimaryMessage};
use crate::weakness::Weakness;

impl Primary {
    pub(super) fn connect(&mut self, now: Time) {
        assert!(
            self.phase == Phase::Alone && self.link.is_none(),
            "one session at a time, and only while alone"
        );
        let known = self.remembered.clone().expect("alone is a record that was read");
        let session = Session(self.draw.next());
        self.reconnect_at = None;
        self.link = Some(Link {
            session,
            stage: Stage::Connecting,
            standby_loaded: self.weak(Weakness::TakeOverFromOldSession),
            captured: Epoch::NONE,
            outstanding: None,
            due_at: now,
            committed: Epoch::NONE,
            answers: Time::default(),
            heard_at: now,
            heartbeat_at: now,
            draining: false,
            graced: false,
            stale: false,
            last_epoch: None,
        });
        self.command(PrimaryCommand::Connect {
            session,
            term: known.term,
            instance: known.instance,
        });
    }

    pub(super) fn on_connected(&mut self, now: Time, session: Session) {
        let Some(link) = &mut self.link else { return };
        if link.session != session || link.stage != Stage::Connecting {
            return;
        }
        link.stage = Stage::Copying;
        link.heard_at = now;
        self.heartbeat(now);
        self.command(PrimaryCommand::StartFirstCopy(session));
    }

    pub(super) fn heartbeat(&mut self, now: Time) {
        if let Some(link) = &mut self.link {
            link.heartbeat_at = now.after_ns(self.config.heartbeat_interval_ns.max(1));
            self.send(PrimaryMessage::Heartbeat { sent: now });
        }
    }

    pub(super) fn send(&mut self, message: PrimaryMessage) {
        if let Some(link) = &self.link
            && link.stage != Stage::Connecting
        {
            let session = link.session;
            self.command(PrimaryCommand::Send(session, message));
        }
    }

    pub(super) fn on_first_copy(&mut self, now: Time, session: Session) {
        if let Some(link) = &mut self.link
            && link.session == session
            && link.stage == Stage::Copying
        {
            link.stage = Stage::Capturing;
            link.due_at = now;
        }
    }

    pub(super) fn on_peer(&mut self, now: Time, session: Session, message: &BackupMessage) {
        let Some(link) = &mut self.link else { return };
        if link.session != session || link.stage == Stage::Connecting {
            return;
        }
        link.heard_at = now;
        link.graced = false;
        let nonsense = match message {
            BackupMessage::Alive { committed, answers } => {
                let sent = link
                    .outstanding
                    .map_or(link.captured, |outstanding| outstanding.epoch);
                if *committed > sent || *committed < link.committed || *answers > now {
                    true
                } else {
                    link.committed = *committed;
                    link.answers = link.answers.max(*answers);
                    // A checkpoint that was answered in time has said what a heartbeat would.
                    let next_ns = self.config.heartbeat_interval_ns.max(1);
                    link.heartbeat_at = link.heartbeat_at.max(link.answers.after_ns(next_ns));
                    self.release(now);
                    false
                }
            }
            BackupMessage::StandbyLoaded { epoch } => {
                link.standby_loaded = true;
                *epoch > link.captured
            }
            BackupMessage::PleaseHandOver => {
                self.on_order(now, PrimaryOrder::HandOver);
                false
            }
        };
        if nonsense {
            self.report(Notice::BadPeer(
                "it acknowledged or loaded a checkpoint that was not sent",
            ));
            self.lose_link(now, false);
        }
    }

    /// Ends the session's connection, whatever the phase.
    pub(super) fn drop_link(&mut self) {
        if let Some(link) = self.link.take() {
            self.command(PrimaryCommand::Disconnect(link.session));
            let Some(outstanding) = link.outstanding else {
                return;
            };
            // How far that capture is, or will come, is unknown: the gate counts as closed until it is opened, and the
            // guest as stopped until it is resumed.
            self.guest.stopped |= outstanding.stay_stopped;
            if outstanding.close_gate {
                self.close_gate(link.captured, link.due_at);
            }
        }
    }

    /// The backup is gone, or the session can't go on. `soon`: the backup itself may be well, so try again at once.
    pub(super) fn lose_link(&mut self, now: Time, soon: bool) {
        self.drop_link();
        match self.phase {
            Phase::Alone => {
                if self.gate != Gate::Open {
                    self.open_gate();
                }
                self.reconnect_at = Some(if soon {
                    now
                } else {
                    now.after_ns(self.config.retry_ns)
                });
            }
            Phase::Pairing { .. } if self.weak(Weakness::AbandonPairing) => {
                self.pending = None;
                self.become_alone_unasked(now);
            }
            // The answer decides: `settle` asks for `Alone` once it is here.
            Phase::Consulting | Phase::Pairing { .. } | Phase::Paired | Phase::Leaving(_) => {}
            Phase::Finished(_) => {}
        }
    }

    /// The planted mistake [`Weakness::AbandonPairing`].
    fn become_alone_unasked(&mut self, now: Time) {
        self.phase = Phase::Alone;
        self.open_gate();
        self.reconnect_at = Some(now.after_ns(self.config.retry_ns));
    }

    /// Whenever no request is unresolved: the next step towards what is wanted.
    pub(super) fn settle(&mut self, now: Time) {
        if self.pending.is_some() {
            return;
        }
        match (&self.phase, self.intent) {
            (Phase::Paired, Intent::Unprotect | Intent::Rejoin) => self.leave(now, Leave::Alone),
            (Phase::Paired | Phase::Alone, Intent::PowerOff) => self.leave(now, Leave::Ended),
            (Phase::Paired, Intent::Protect | Intent::HandOver { .. }) if self.link.is_none() => {
                self.leave(now, Leave::Alone);
            }
            // Stopped for a move that came to nothing: only a record of its own lets it go on.
            (Phase::Paired, Intent::Protect) if self.guest.stopped => self.leave(now, Leave::Alone),
            (Phase::Paired, Intent::HandOver { .. }) => {
                let link = self.link.as_ref().expect("checked above");
                if let Some(last_epoch) = link.last_epoch
                    && link.committed >= last_epoch
                {
                    self.leave(now, Leave::HandedOver { last_epoch });
                }
            }
            (Phase::Alone, Intent::Unprotect) => self.end_unprotected(),
            (Phase::Alone, Intent::Rejoin) => {
                self.intent = Intent::Protect;
                if self.link.is_some() {
                    self.lose_link(now, true);
                }
            }
            (Phase::Alone, Intent::HandOver { .. }) => {
                self.intent = Intent::Protect;
                self.report(Notice::HandOverFailed);
            }
            (Phase::Alone, Intent::Protect) => self.pair_when_ready(now),
            (Phase::Paired, Intent::Protect) => self.resume_guest(),
            (Phase::Consulting | Phase::Pairing { .. } | Phase::Leaving(_) | Phase::Finished(_), _) => {}
        }
    }

    /// Asks for `Paired` once the backup has committed the checkpoint at whose barrier the gate was closed.
    fn pair_when_ready(&mut self, now: Time) {
        let Some(link) = &self.link else { return };
        let early = self.weak(Weakness::PairBeforeGateCommit) || self.weak(Weakness::TakeOverFromOldSession);
        if let Gate::Closed { released, .. } = &self.gate
            && (link.committed >= *released || early)
        {
            self.ask_paired(now);
        }
    }
}
