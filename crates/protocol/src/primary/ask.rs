//! The primary and the witness: asking, believing or doubting answers, and what follows from the record.

use romulus_types::{Epoch, Nonce, Time};

use super::{Gate, Intent, Leave, Phase, Primary};
use crate::api::{NotProtected, Notice, PrimaryCommand, Remembered};
use crate::message::PrimaryMessage;
use crate::pending::{Pending, believable};
use crate::record::{Answer, Ask, Mode, Record, WitnessReply, WitnessRequest, hand_over_nonce};
use crate::weakness::Weakness;

impl Primary {
    pub(super) fn ask_read(&mut self, now: Time) {
        let nonce = Nonce(self.draw.next());
        self.ask(now, nonce, Ask::Read);
    }

    fn ask_register(&mut self, now: Time) {
        let nonce = Nonce(self.draw.next());
        self.ask(now, nonce, Ask::Register);
    }

    fn ask_change(&mut self, now: Time, nonce: Nonce, mode: Mode) {
        let known = self
            .remembered
            .as_ref()
            .expect("a change starts from a record that was read");
        let ask = Ask::Change {
            instance: known.instance,
            term: known.term,
            mode,
        };
        self.ask(now, nonce, ask);
    }

    fn ask_alone(&mut self, now: Time) {
        let nonce = Nonce(self.draw.next());
        self.ask_change(
            now,
            nonce,
            Mode::Alone {
                host: self.config.host.clone(),
            },
        );
    }

    /// Asks for `Paired` from the epoch at whose barrier the gate was closed.
    pub(super) fn ask_paired(&mut self, now: Time) {
        assert!(
            self.phase == Phase::Alone && self.pending.is_none(),
            "pairing starts from a settled record"
        );
        let Gate::Closed { released, .. } = &self.gate else {
            unreachable!("pairing follows a closed gate")
        };
        let link = self.link.as_ref().expect("pairing needs a backup");
        let early = self.weak(Weakness::PairBeforeGateCommit);
        let first_epoch = if early {
            link.committed.min(*released)
        } else {
            *released
        };
        let unbound = self.weak(Weakness::TakeOverFromOldSession);
        assert!(
            unbound || link.committed >= first_epoch,
            "the backup has committed the first epoch"
        );
        let session = link.session;
        let (primary, backup) = (self.config.host.clone(), self.config.backup.clone());
        let nonce = Nonce(self.draw.next());
        self.ask_change(
            now,
            nonce,
            Mode::Paired {
                primary,
                backup,
                session,
                first_epoch,
            },
        );
        self.phase = Phase::Pairing { first_epoch };
    }

    /// Asks for the record that follows `Paired`, or for the end.
    pub(super) fn leave(&mut self, now: Time, leave: Leave) {
        assert!(self.pending.is_none(), "one request at a time");
        self.phase = Phase::Leaving(leave);
        match leave {
            Leave::Alone if self.weak(Weakness::OpenWithoutAsking) => {
                self.ask_alone(now);
                self.command(PrimaryCommand::OpenGate);
            }
            Leave::Alone => self.ask_alone(now),
            Leave::Ended => {
                let nonce = Nonce(self.draw.next());
                self.ask_change(now, nonce, Mode::Ended);
            }
            Leave::HandedOver { .. } => {
                let session = self.link.as_ref().expect("handing over needs a backup").session;
                let host = self.config.backup.clone();
                self.ask_change(now, hand_over_nonce(session), Mode::Alone { host });
            }
        }
    }

    fn ask(&mut self, now: Time, nonce: Nonce, ask: Ask) {
        let (vm, host) = (self.config.vm.clone(), self.config.host.clone());
        let request = WitnessRequest { vm, host, nonce, ask };
        self.command(PrimaryCommand::AskWitness(request.clone()));
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
        let Some(pending) = &mut self.pending else { return };
        let told = pending.repeat(now, self.config.retry_ns);
        let request = pending.request.clone();
        self.command(PrimaryCommand::AskWitness(request));
        if let Some(tries) = told {
            self.report(Notice::WitnessSilent(tries));
        }
    }

    pub(super) fn on_witness(&mut self, now: Time, reply: WitnessReply) {
        let Some(pending) = &self.pending else { return };
        if reply.nonce != pending.request.nonce || reply.vm != self.config.vm {
            return;
        }
        let ask = pending.request.ask.clone();
        match (reply.answer, ask) {
            (Answer::Current(record), Ask::Read) => self.on_current(now, &record),
            (Answer::Granted(record), ask) => self.on_granted(now, record, &ask),
            (Answer::Refused(record), Ask::Change { term, .. }) => {
                let newer = record.term > term;
                self.report(Notice::Refusal(record.term, record.mode.clone()));
                if newer && self.believes(&record) {
                    self.follow(now, &record)
                } else {
                    self.doubt()
                }
            }
            // An earlier life of this host has registered it meanwhile. Another host's record is not ours to follow: an operator's word
            // brought us here, and it was wrong.
            (Answer::Refused(record), Ask::Register) if self.names_self(&record) => {
                self.on_current(now, &record)
            }
            (Answer::UnknownVm | Answer::WrongInstance(_), Ask::Read | Ask::Change { .. })
                if self.phase == Phase::Consulting && self.may_register() =>
            {
                self.ask_register(now);
            }
            _ => self.doubt(),
        }
    }

    fn names_self(&self, record: &Record) -> bool {
        match &record.mode {
            Mode::Alone { host } | Mode::Paired { primary: host, .. } => self.is_self(host),
            Mode::Ended => false,
        }
    }

    fn on_current(&mut self, now: Time, record: &Record) {
        let registers = self.config.register && record.mode == Mode::Ended;
        if !self.believes(record) {
            self.doubt();
        } else if registers {
            self.ask_register(now);
        } else {
            self.follow(now, record);
        }
    }

    /// An operator's word that stays in a unit file must not answer for a witness that lost its store: only a host that
    /// remembers nothing registers a VM that the witness does not know.
    fn may_register(&self) -> bool {
        self.config.register && self.remembered.is_none()
    }

    fn believes(&self, record: &Record) -> bool {
        self.weak(Weakness::TrustAnyWitness) || believable(self.remembered.as_ref(), record)
    }

    fn doubt(&mut self) {
        if let Some(pending) = &mut self.pending {
            pending.doubt();
        }
    }

    /// A record that is not the answer to a granted request: what it means for this host.
    fn follow(&mut self, now: Time, record: &Record) {
        let trusting = self.weak(Weakness::TrustReadRecord);
        match &record.mode {
            Mode::Alone { host } if self.is_self(host) && trusting && self.phase == Phase::Consulting => {
                self.adopt(record);
                self.pending = None;
                self.become_alone(now);
            }
            Mode::Alone { host } | Mode::Paired { primary: host, .. } if self.is_self(host) => {
                // Of an earlier life: a term of our own voids what that life may still have under way.
                self.adopt(record);
                if self.phase != Phase::Consulting {
                    self.phase = Phase::Leaving(Leave::Alone);
                }
                self.ask_alone(now);
            }
            Mode::Ended if self.phase == Phase::Consulting => self.doubt(),
            Mode::Alone { .. } | Mode::Paired { .. } | Mode::Ended => {
                self.adopt(record);
                self.fence();
            }
        }
    }

    fn on_granted(&mut self, now: Time, record: Record, ask: &Ask) {
        let alone = Mode::Alone {
            host: self.config.host.clone(),
        };
        let (asked, believed) = match ask {
            Ask::Read => return self.doubt(),
            Ask::Register => (&alone, true),
            Ask::Change { term, mode, .. } => (mode, record.term > *term && self.believes(&record)),
        };
        if !believed || record.mode != *asked {
            return self.doubt();
        }
        self.adopt(&record);
        self.pending = None;
        self.report(Notice::Grant(record.term, record.mode));
        match self.phase {
            Phase::Consulting | Phase::Leaving(Leave::Alone) => self.become_alone(now),
            Phase::Pairing { first_epoch } => self.become_paired(now, first_epoch),
            Phase::Leaving(Leave::HandedOver { last_epoch }) => {
                self.send(PrimaryMessage::HandOver {
                    term: record.term,
                    last_epoch,
                });
                self.command(PrimaryCommand::StopGuest);
                self.finish(NotProtected::Fenced);
            }
            Phase::Leaving(Leave::Ended) => {
                self.command(PrimaryCommand::OpenGate);
                self.send(PrimaryMessage::Left { term: record.term });
                self.finish(NotProtected::GuestNotRunning);
            }
            Phase::Alone | Phase::Paired | Phase::Finished(_) => {
                unreachable!("nothing is asked in these phases")
            }
        }
    }

    /// Remembers a record, durably before anything that follows from it.
    fn adopt(&mut self, record: &Record) {
        let remembered = Remembered {
            instance: record.instance,
            term: record.term,
        };
        if self.remembered.as_ref() != Some(&remembered) {
            self.remembered = Some(remembered.clone());
            self.command(PrimaryCommand::Remember(remembered));
        }
    }

    /// The record is `Alone(self)`: everything held leaves, and the guest runs.
    fn become_alone(&mut self, now: Time) {
        let soon = self.intent == Intent::Rejoin || self.phase == Phase::Consulting;
        self.phase = Phase::Alone;
        if self.intent != Intent::Unprotect {
            self.drop_link();
        }
        self.open_gate();
        self.resume_guest();
        self.reconnect_at = Some(if soon {
            now
        } else {
            now.after_ns(self.config.retry_ns)
        });
    }

    fn become_paired(&mut self, now: Time, first_epoch: Epoch) {
        self.phase = Phase::Paired;
        let known = self.remembered.clone().expect("the grant was remembered");
        self.report(Notice::Paired(known.term, first_epoch));
        if self.link.is_some() {
            self.send(PrimaryMessage::Paired {
                term: known.term,
                instance: known.instance,
                first_epoch,
            });
            self.release(now);
        }
    }

    /// Another host speaks for the VM: this guest stops, and what it said since is dropped.
    fn fence(&mut self) {
        self.drop_link();
        self.command(PrimaryCommand::StopGuest);
        self.finish(NotProtected::Fenced);
    }

    pub(super) fn finish(&mut self, why: NotProtected) {
        self.pending = None;
        self.reconnect_at = None;
        self.phase = Phase::Finished(why);
        self.refresh();
        self.command(PrimaryCommand::Finish);
    }
}
