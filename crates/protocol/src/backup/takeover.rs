//! After the primary was lost: what the record says, asking for it, taking over.

use romulus_types::{Epoch, Nonce, Session, Term, Time};

use super::{Backup, Phase};
use crate::api::{BackupCommand, BackupOrder, ImageStatus, Notice};
use crate::message::BackupMessage;
use crate::pending::{Pending, believable};
use crate::record::{
    Answer, Ask, Mode, Record, WitnessReply, WitnessRequest, hand_over_nonce, takeover_nonce,
};
use crate::weakness::Weakness;

impl Backup {
    /// The primary is suspected. Without a commit there is nothing to take over.
    pub(super) fn lose_primary(&mut self, now: Time) {
        let Some((session, epoch)) = self.committed() else {
            self.drop_link();
            self.phase = Phase::Idle;
            return;
        };
        if self.weak(Weakness::TakeOverWithoutGrant) {
            let term = self.term().unwrap_or_default().next();
            self.activate(session, epoch, term, true);
            return;
        }
        self.phase = Phase::Reading;
        self.ask_read(now);
    }

    pub(super) fn ask_read(&mut self, now: Time) {
        let nonce = Nonce(self.draw.next());
        self.ask(now, nonce, Ask::Read);
    }

    /// Asks for the takeover, and ends the session: there is no way back to it.
    fn ask_takeover(&mut self, now: Time, record: &Record, session: Session) {
        self.remember(record.instance, record.term);
        if !matches!(self.phase, Phase::Active { .. }) {
            self.phase = Phase::Asking;
            if !self.weak(Weakness::AckWhileUnresolved) && !self.weak(Weakness::AckAfterTakeover) {
                self.drop_link();
            }
        }
        let mode = Mode::Alone {
            host: self.config.host.clone(),
        };
        let drawn = self.weak(Weakness::NewNonceForEachTry);
        let nonce = if drawn {
            Nonce(self.draw.next())
        } else {
            takeover_nonce(session)
        };
        self.ask(
            now,
            nonce,
            Ask::Change {
                instance: record.instance,
                term: record.term,
                mode,
            },
        );
    }

    fn ask(&mut self, now: Time, nonce: Nonce, ask: Ask) {
        let request = WitnessRequest {
            vm: self.config.vm.clone(),
            host: self.config.host.clone(),
            nonce,
            ask,
        };
        self.command(BackupCommand::AskWitness(request.clone()));
        let retry_at = now.after_ns(self.config.retry_ns.max(1));
        self.pending = Some(Pending {
            request,
            retry_at,
            tries: 1,
            doubted: false,
        });
    }

    /// Repeats the request unchanged.
    pub(super) fn ask_again(&mut self, now: Time) {
        let redraw = self
            .weak(Weakness::NewNonceForEachTry)
            .then(|| Nonce(self.draw.next()));
        let Some(pending) = &mut self.pending else { return };
        let told = pending.repeat(now, self.config.retry_ns);
        if let Some(nonce) = redraw {
            pending.request.nonce = nonce;
        }
        let request = pending.request.clone();
        self.command(BackupCommand::AskWitness(request));
        if let Some(tries) = told {
            self.report(Notice::WitnessSilent(tries));
        }
    }

    pub(super) fn on_witness(&mut self, now: Time, reply: WitnessReply) {
        if reply.vm != self.config.vm {
            return;
        }
        self.on_word(now, reply.nonce, &reply.answer);
        let Some(pending) = &self.pending else { return };
        if reply.nonce != pending.request.nonce {
            return;
        }
        let ask = pending.request.ask.clone();
        match (reply.answer, ask) {
            (Answer::Current(record), Ask::Read) if self.believes(&record) => {
                self.follow_record(now, &record)
            }
            (Answer::Granted(record), Ask::Change { mode, .. })
                if self.believes(&record) && record.mode == mode =>
            {
                self.on_granted(&record);
            }
            (Answer::Refused(record), Ask::Change { term, .. })
                if self.believes(&record) && record.term > term =>
            {
                self.report(Notice::Refusal(record.term, record.mode.clone()));
                self.follow_record(now, &record);
            }
            _ => {
                if let Some(pending) = &mut self.pending {
                    pending.doubt();
                }
            }
        }
    }

    pub(super) fn believes(&self, record: &Record) -> bool {
        self.weak(Weakness::TrustAnyWitness) || believable(self.remembered.as_ref(), record)
    }

    /// What a record means for the last commit here.
    fn follow_record(&mut self, now: Time, record: &Record) {
        if let Phase::Active { .. } = self.phase {
            return self.follow_record_after_force(now, record);
        }
        let any_session = self.weak(Weakness::TakeOverFromOldSession);
        let forgetful = self.weak(Weakness::ForgetGrant) || self.weak(Weakness::NewNonceForEachTry);
        let Some((session, epoch)) = self.committed() else {
            return self.give_up_image();
        };
        match &record.mode {
            Mode::Paired {
                backup,
                session: named,
                first_epoch,
                ..
            } if *backup == self.config.host
                && (any_session || (*named == session && *first_epoch <= epoch)) =>
            {
                self.ask_takeover(now, record, session);
            }
            Mode::Alone { host } if *host == self.config.host && is_for(record, session) && !forgetful => {
                self.on_granted(record);
            }
            _ => {
                self.remember(record.instance, record.term);
                self.give_up_image();
            }
        }
    }

    fn on_granted(&mut self, record: &Record) {
        self.remember(record.instance, record.term);
        self.report(Notice::Grant(record.term, record.mode.clone()));
        self.pending = None;
        if matches!(self.phase, Phase::Active { .. }) {
            self.phase = Phase::Active {
                term: record.term,
                granted: true,
            };
            return;
        }
        let (session, epoch) = self
            .committed()
            .expect("a takeover is asked for with a commit in hand");
        self.activate(session, epoch, record.term, true);
    }

    fn activate(&mut self, session: Session, epoch: Epoch, term: Term, granted: bool) {
        assert!(
            !matches!(self.phase, Phase::Active { .. }),
            "a guest is activated once"
        );
        assert!(
            self.committed() == Some((session, epoch)),
            "it is activated from the last commit"
        );
        if !self.weak(Weakness::AckAfterTakeover) {
            self.drop_link();
            self.writing = None;
        }
        self.force_at = None;
        self.phase = Phase::Active { term, granted };
        if !self.weak(Weakness::ActivateTwice) {
            self.image = ImageStatus::Consumed;
        }
        self.command(BackupCommand::Activate { session, epoch, term });
    }

    /// The primary says that it made the record `Alone(us)` after its final checkpoint.
    pub(super) fn on_handed_over(&mut self, now: Time, term: Term, last_epoch: Epoch) {
        let (Phase::Following, Some(link)) = (self.phase, &self.link) else {
            return;
        };
        match (self.committed(), self.remembered.clone()) {
            (Some((session, epoch)), Some(known))
                if session == link.session && epoch >= last_epoch && term > known.term =>
            {
                self.remember(known.instance, term);
                self.activate(session, epoch, term, true);
            }
            _ => {
                self.report(Notice::BadPeer("it handed over what is not committed here"));
                self.lose_primary(now);
            }
        }
    }

    pub(super) fn on_order(&mut self, now: Time, order: BackupOrder) {
        match (order, self.phase) {
            (BackupOrder::Failover, Phase::Following) if self.paired == self.session() => {
                if let Some(link) = &self.link {
                    let session = link.session;
                    self.command(BackupCommand::Send(session, BackupMessage::PleaseHandOver));
                }
            }
            // Suspicion follows soon. Before it the primary may still release by an answer of ours.
            (BackupOrder::Failover, Phase::Orphaned | Phase::Reading | Phase::Asking) => {}
            (BackupOrder::ForceFailover { fenced }, Phase::Orphaned | Phase::Reading | Phase::Asking)
                if self.may_force(fenced) =>
            {
                self.force_at = Some(if fenced {
                    now
                } else {
                    now.after_ns(self.config.mute_ns_max)
                });
                if self.phase == Phase::Orphaned {
                    self.lose_primary(now);
                }
            }
            _ => {
                let protection = self.protection();
                self.report(Notice::OrderRefused(protection));
            }
        }
    }

    /// Waiting makes a primary mute only if it was paired with the commit that is here; otherwise it must be fenced.
    fn may_force(&self, fenced: bool) -> bool {
        self.committed()
            .is_some_and(|(session, _)| fenced || self.paired == Some(session))
    }

    /// The forced takeover is due, and the witness has not answered. It is asked on: its word counts when it comes.
    pub(super) fn force(&mut self, now: Time) {
        self.force_at = None;
        let Some((session, epoch)) = self.committed() else {
            return;
        };
        let term = self.term().unwrap_or_default();
        self.activate(session, epoch, term, false);
        if self.pending.is_none() {
            self.ask_read(now);
        }
    }

    /// The witness answers after an operator forced the takeover, or after a restart with a guest that runs here.
    fn follow_record_after_force(&mut self, now: Time, record: &Record) {
        match &record.mode {
            // Paired as the primary: this host's own replicator protects the guest since.
            Mode::Alone { host } | Mode::Paired { primary: host, .. } if *host == self.config.host => {
                self.on_granted(record);
            }
            Mode::Paired { backup, session, .. } if *backup == self.config.host => {
                self.ask_takeover(now, record, *session);
            }
            _ => {
                self.remember(record.instance, record.term);
                self.pending = None;
                self.command(BackupCommand::StopGuest);
                self.mark_unusable();
                self.phase = Phase::Idle;
            }
        }
    }
}

/// Whether this record was made for the commits of `session`: by this host's own request or by its primary's.
fn is_for(record: &Record, session: Session) -> bool {
    record.nonce == takeover_nonce(session) || record.nonce == hand_over_nonce(session)
}
