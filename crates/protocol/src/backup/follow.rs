//! The backup's session with its primary: acknowledging, losing it.

use romulus_types::{Epoch, Session, Term, Time, WitnessInstance};

use super::{Backup, Phase, StandbyTrial};
use crate::api::{BackupCommand, ImageStatus, Notice};
use crate::message::{BackupMessage, PrimaryMessage};
use crate::weakness::Weakness;

/// The wait between two trials doubles that often, less one.
pub(super) const TRIAL_FAILURES_MAX: u32 = 8;

impl Backup {
    /// The primary was heard.
    pub(super) fn hear(&mut self, now: Time) {
        self.heard_at = now;
        self.graced = false;
        self.draining = false;
    }

    pub(super) fn on_peer(&mut self, now: Time, session: Session, message: PrimaryMessage) {
        if !self.is_session(session) {
            return;
        }
        if let Some(link) = &mut self.link {
            link.heard = true;
        }
        if self.phase == Phase::Reading && message != PrimaryMessage::GuestLost {
            // Only read, nothing asked for: the primary is there after all.
            self.pending = None;
            self.force_at = None;
            self.phase = Phase::Following;
        }
        self.hear(now);
        match message {
            PrimaryMessage::Heartbeat { sent } => {
                if let Some(link) = &mut self.link {
                    link.answers = link.answers.max(sent);
                }
                self.acknowledge();
            }
            PrimaryMessage::Paired {
                term,
                instance,
                first_epoch,
            } => {
                self.on_paired(session, term, instance, first_epoch);
            }
            PrimaryMessage::Left { term } => self.on_left(term),
            PrimaryMessage::HandOver { term, last_epoch } => self.on_handed_over(now, term, last_epoch),
            PrimaryMessage::GuestLost => {
                if self.phase == Phase::Following {
                    self.lose_primary(now);
                }
            }
        }
    }

    fn on_paired(&mut self, session: Session, term: Term, instance: WitnessInstance, first_epoch: Epoch) {
        let reached = self
            .committed()
            .is_some_and(|(held, epoch)| held == session && epoch >= first_epoch);
        let known = self.remembered.as_ref();
        let newer = known.is_some_and(|known| known.instance == instance && known.term <= term);
        if self.phase != Phase::Following || !reached || !newer {
            self.report(Notice::BadPeer(
                "it paired what is not committed here, or in an old term",
            ));
            return;
        }
        self.remember(instance, term);
        self.paired = Some(session);
        self.report(Notice::Paired(term, first_epoch));
    }

    fn on_left(&mut self, term: Term) {
        if self.phase != Phase::Following {
            return;
        }
        if let Some(known) = self.remembered.clone() {
            self.remember(known.instance, term.max(known.term));
        }
        self.give_up_image();
    }

    /// There is nothing left to take over.
    pub(super) fn give_up_image(&mut self) {
        self.drop_link();
        self.pending = None;
        self.force_at = None;
        self.mark_unusable();
        self.phase = Phase::Idle;
    }

    /// Says what is committed, unless the primary is no longer followed.
    fn acknowledge(&mut self) {
        let weak = self.weak(Weakness::AckWhileUnresolved) && self.phase == Phase::Asking
            || self.weak(Weakness::AckAfterTakeover)
                && matches!(self.phase, Phase::Asking | Phase::Active { .. });
        let Some(link) = &self.link else { return };
        if self.phase != Phase::Following && !weak {
            return;
        }
        let session = link.session;
        let answers = link.answers;
        let committed = match self.image {
            ImageStatus::Committed { session: held, epoch } if held == session => epoch,
            _ => Epoch::NONE,
        };
        self.command(BackupCommand::Send(
            session,
            BackupMessage::Alive { committed, answers },
        ));
    }

    pub(super) fn on_verified(&mut self, now: Time, session: Session, epoch: Epoch, captured: Time) {
        if self.writing != Some(session) {
            return;
        }
        if let Some((held, last)) = self.committed()
            && held == session
        {
            assert!(epoch > last, "the image commits epoch {epoch} after {last}");
        }
        let consumed = self.image == ImageStatus::Consumed;
        if !consumed {
            self.image = ImageStatus::Committed { session, epoch };
        }
        if self.phase == Phase::Idle {
            self.phase = Phase::Orphaned;
        }
        if consumed && self.weak(Weakness::AckAfterTakeover) {
            let message = BackupMessage::Alive {
                committed: epoch,
                answers: self.heard_at,
            };
            self.command(BackupCommand::Send(session, message));
            return;
        }
        if !self.is_session(session) {
            return;
        }
        if self.phase == Phase::Following {
            // Its primary lived when it was captured, and said so: as good as a heartbeat.
            self.hear(now);
            if let Some(link) = &mut self.link {
                link.answers = link.answers.max(captured);
            }
        }
        self.acknowledge();
        self.try_standby(now, session, epoch);
    }

    /// Proves once a session, by a standby of this very configuration, that a checkpoint can be loaded.
    fn try_standby(&mut self, now: Time, session: Session, epoch: Epoch) {
        let retry_ns = self.config.retry_ns;
        let Some(link) = self.link.as_mut().filter(|_| self.phase == Phase::Following) else {
            return;
        };
        let due = match link.standby {
            StandbyTrial::NotTried => true,
            // Each trial starts a hypervisor: one that cannot succeed must not cost the host ten a second.
            StandbyTrial::FailedAt(at) => now.since_ns(at) >= retry_ns << (link.trial_failures.max(1) - 1),
            StandbyTrial::Trying | StandbyTrial::Loaded => false,
        };
        if due {
            link.standby = StandbyTrial::Trying;
            self.command(BackupCommand::TryStandby(session, epoch));
        }
    }

    pub(super) fn on_standby_loaded(&mut self, session: Session, epoch: Epoch) {
        if let Some(link) = self.link.as_mut().filter(|link| link.session == session) {
            link.standby = StandbyTrial::Loaded;
            self.command(BackupCommand::Send(
                session,
                BackupMessage::StandbyLoaded { epoch },
            ));
        }
    }

    pub(super) fn on_standby_failed(&mut self, now: Time, session: Session) {
        if let Some(link) = self.link.as_mut().filter(|link| link.session == session) {
            link.standby = StandbyTrial::FailedAt(now);
            link.trial_failures = (link.trial_failures + 1).min(TRIAL_FAILURES_MAX);
        }
    }

    /// A checkpoint that is not what its record says: the session ends, the last commit stands.
    pub(super) fn on_invalid(&mut self, session: Session) {
        if self.is_session(session) && self.phase == Phase::Following {
            self.report(Notice::BadPeer(
                "a checkpoint was not what its commit record said",
            ));
            self.drop_link();
            self.orphan();
        }
    }

    pub(super) fn on_disconnected(&mut self, session: Session) {
        self.candidates
            .retain(|candidate| candidate.claim.session != session);
        if !self.is_session(session) {
            return;
        }
        self.link = None;
        if self.phase == Phase::Following {
            self.orphan();
        }
    }

    /// No primary is connected: the last commit, if there is one, waits for suspicion.
    pub(super) fn orphan(&mut self) {
        self.draining = false;
        self.phase = if self.committed().is_some() {
            Phase::Orphaned
        } else {
            Phase::Idle
        };
    }
}
