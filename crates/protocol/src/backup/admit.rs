//! A host says hello. Any host with a certificate can say anything, so what it says of the record changes nothing
//! here: the witness is asked, and only the host that the record names as alone, in the very term that it claims, is
//! accepted.
//!
//! ```text
//!   Hello ─► what is known here lets it ─► Candidate ── read ──► the record names it ─► mark unusable, accept
//!              └─ no: Refuse                   │                     └─ no: Refuse
//!                                              └── no answer for `hello_wait_ns`: Refuse, it may try again
//! ```

use romulus_types::{HostId, Nonce, Session, Term, Time, WitnessInstance};

use super::{Backup, Link, Phase, StandbyTrial};
use crate::api::{BackupCommand, ImageStatus, Notice, RefuseReason};
use crate::pending::Pending;
use crate::record::{Answer, Ask, Mode, WitnessRequest};
use crate::weakness::Weakness;

/// Most hosts whose hellos wait for the witness's word at a time. One of them can be right.
const CANDIDATES_MAX: usize = 4;

/// What a host says in its hello. The name is its certificate's; the rest is its own word.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Claim {
    pub(super) session: Session,
    pub(super) primary: HostId,
    pub(super) term: Term,
    pub(super) instance: WitnessInstance,
}

/// A claim, and the question to the witness whether it is true.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Candidate {
    pub(super) claim: Claim,
    pub(super) read: Pending,
    pub(super) give_up_at: Time,
}

impl Backup {
    pub(super) fn on_hello(&mut self, now: Time, claim: Claim) {
        if let Err(reason) = self.judge_claim(&claim) {
            self.command(BackupCommand::Refuse(claim.session, reason));
        } else if self.weak(Weakness::BelieveHello) {
            self.accept(now, claim);
        } else {
            self.make_room(&claim);
            if self.candidates.len() < CANDIDATES_MAX {
                self.ask_whether_true(now, claim);
            } else {
                self.command(BackupCommand::Refuse(claim.session, RefuseReason::Busy));
            }
        }
    }

    /// One place for each host: a hello replaces an earlier one of the same host.
    fn make_room(&mut self, claim: &Claim) {
        let earlier = self
            .candidates
            .iter()
            .position(|candidate| candidate.claim.primary == claim.primary);
        if let Some(position) = earlier {
            let replaced = self.candidates.remove(position).claim.session;
            self.command(BackupCommand::Refuse(replaced, RefuseReason::Busy));
        }
    }

    fn ask_whether_true(&mut self, now: Time, claim: Claim) {
        let request = WitnessRequest {
            vm: self.config.vm.clone(),
            host: self.config.host.clone(),
            nonce: Nonce(self.draw.next()),
            ask: Ask::Read,
        };
        self.command(BackupCommand::AskWitness(request.clone()));
        let retry_at = now.after_ns(self.config.retry_ns.max(1));
        self.candidates.push(Candidate {
            claim,
            read: Pending {
                request,
                retry_at,
                tries: 1,
                doubted: false,
            },
            give_up_at: now.after_ns(self.config.hello_wait_ns.max(1)),
        });
    }

    /// The witness's word on a candidate. What is known here may have changed meanwhile, too.
    pub(super) fn on_word(&mut self, now: Time, nonce: Nonce, answer: &Answer) {
        let asked = |candidate: &Candidate| candidate.read.request.nonce == nonce;
        let Some(position) = self.candidates.iter().position(asked) else {
            return;
        };
        let claim = self.candidates.remove(position).claim;
        match self
            .judge_claim(&claim)
            .and_then(|()| self.compare_with_record(&claim, answer))
        {
            Ok(()) => self.accept(now, claim),
            Err(reason) => self.command(BackupCommand::Refuse(claim.session, reason)),
        }
    }

    /// What is known here of the record and of other sessions.
    fn judge_claim(&self, claim: &Claim) -> Result<(), RefuseReason> {
        let known = self.remembered.as_ref();
        match self.phase {
            Phase::Active {
                term: active,
                granted,
            } if !granted || claim.term <= active => {
                return Err(RefuseReason::ActiveHere);
            }
            Phase::Asking => return Err(RefuseReason::Unresolved),
            _ => {}
        }
        if known.is_some_and(|known| known.instance != claim.instance)
            && !self.weak(Weakness::TrustAnyWitness)
        {
            return Err(RefuseReason::OtherWitness);
        }
        if known.is_some_and(|known| claim.term < known.term) {
            return Err(RefuseReason::OldTerm);
        }
        let newer = known.is_none_or(|known| claim.term > known.term);
        if self.image == ImageStatus::Consumed && !newer {
            return Err(RefuseReason::ActiveHere);
        }
        // A session in which nothing was said yet may be one that its primary has given up.
        let heard = self.link.as_ref().is_some_and(|link| link.heard);
        let busy = self.phase == Phase::Following && heard && !newer;
        if busy || self.is_session(claim.session) || claim.primary == self.config.host {
            return Err(RefuseReason::Busy);
        }
        Ok(())
    }

    /// A true primary connects only while the record is `Alone(primary)` in the term that it says, and has nothing under
    /// way that could change it.
    fn compare_with_record(&self, claim: &Claim, answer: &Answer) -> Result<(), RefuseReason> {
        let Answer::Current(record) = answer else {
            return Err(match answer {
                Answer::UnknownVm => RefuseReason::NotNamed,
                _ => RefuseReason::OtherWitness,
            });
        };
        let same_witness = record.instance == claim.instance || self.weak(Weakness::TrustAnyWitness);
        if !self.believes(record) || !same_witness {
            return Err(RefuseReason::OtherWitness);
        }
        if record.names_alone(&claim.primary, record.instance, claim.term) {
            return Ok(());
        }
        match &record.mode {
            Mode::Alone { host } | Mode::Paired { primary: host, .. }
                if *host == claim.primary && record.term > claim.term =>
            {
                Err(RefuseReason::OldTerm)
            }
            _ => Err(RefuseReason::NotNamed),
        }
    }

    /// So no older commit may be taken over from any more.
    fn accept(&mut self, now: Time, claim: Claim) {
        let Claim {
            session,
            term,
            instance,
            ..
        } = claim;
        self.drop_link();
        self.pending = None;
        self.force_at = None;
        self.remember(instance, term);
        if !self.weak(Weakness::TakeOverFromOldSession) {
            self.mark_unusable();
        }
        self.writing = Some(session);
        self.link = Some(Link {
            session,
            heard: false,
            answers: Time::default(),
            standby: StandbyTrial::NotTried,
            trial_failures: 0,
        });
        self.phase = Phase::Following;
        self.hear(now);
        self.command(BackupCommand::Accept(session));
    }

    /// When the next candidate's question is due, to be repeated or to be given up.
    pub(super) fn candidates_at(&self) -> Option<Time> {
        let at = |candidate: &Candidate| candidate.read.retry_at.min(candidate.give_up_at);
        self.candidates.iter().map(at).min()
    }

    pub(super) fn fire_candidates(&mut self, now: Time) {
        let (late, mut waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.candidates)
            .into_iter()
            .partition(|candidate| candidate.give_up_at <= now);
        for candidate in late {
            self.command(BackupCommand::Refuse(
                candidate.claim.session,
                RefuseReason::WitnessSilent,
            ));
        }
        for candidate in waiting
            .iter_mut()
            .filter(|candidate| candidate.read.retry_at <= now)
        {
            let told = candidate.read.repeat(now, self.config.retry_ns);
            self.command(BackupCommand::AskWitness(candidate.read.request.clone()));
            if let Some(tries) = told {
                self.report(Notice::WitnessSilent(tries));
            }
        }
        self.candidates = waiting;
    }
}
