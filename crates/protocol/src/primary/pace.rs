//! When to capture, and what may leave.

use std::collections::VecDeque;

use romulus_types::{Epoch, Session, Time};

use super::{Gate, Intent, Outstanding, Phase, Primary, Stage};
use crate::api::{Notice, PrimaryCommand};
use crate::weakness::Weakness;

impl Primary {
    /// Asks for the next capture, unless one is outstanding or too much is in flight: then the epoch stretches.
    pub(super) fn pace(&mut self, now: Time) {
        let moving = matches!(self.intent, Intent::HandOver { .. });
        let wanted = moving || self.intent == Intent::Protect;
        let phase = matches!(self.phase, Phase::Alone | Phase::Pairing { .. } | Phase::Paired);
        let still = !self.guest.running || self.guest.suspended || self.guest.stopped;
        if !wanted || !phase || still || self.in_flight() >= self.config.epochs_in_flight_max.max(1) {
            return;
        }
        let alone = self.phase == Phase::Alone;
        let gate_open = self.gate == Gate::Open;
        let paired = self.phase == Phase::Paired;
        let Some(link) = &mut self.link else { return };
        if link.stage != Stage::Capturing || link.outstanding.is_some() {
            return;
        }
        let stay_stopped = moving && paired;
        let close_gate = alone && gate_open && link.standby_loaded;
        let next_at = link.due_at.after_ns(self.config.epoch_ns);
        let at = if link.captured == Epoch::NONE || stay_stopped {
            now
        } else {
            next_at.max(now)
        };
        let (session, epoch) = (link.session, link.captured.next());
        link.due_at = at;
        link.outstanding = Some(Outstanding {
            epoch,
            close_gate,
            stay_stopped,
        });
        self.command(PrimaryCommand::Capture {
            session,
            epoch,
            at,
            close_gate,
            stay_stopped,
        });
    }

    pub(super) fn on_captured(&mut self, now: Time, session: Session, epoch: Epoch, due_at: Time) {
        let Some(link) = &mut self.link else { return };
        if link.session != session {
            return;
        }
        let outstanding = link
            .outstanding
            .take()
            .expect("the driver captures what it was told to");
        assert!(
            outstanding.epoch == epoch,
            "the driver captured {epoch}, not {}",
            outstanding.epoch
        );
        link.captured = epoch;
        link.due_at = link.due_at.max(due_at);
        if outstanding.stay_stopped {
            link.last_epoch = Some(epoch);
            self.guest.stopped = true;
        }
        if outstanding.close_gate {
            self.close_gate(epoch, now);
        } else if let Gate::Closed { ended, .. } = &mut self.gate {
            ended.push_back((epoch, now));
        }
        // The answer may have overtaken the driver's own report.
        self.release(now);
        if self.weak(Weakness::ReleaseBeforeAck) && self.phase == Phase::Paired {
            self.command(PrimaryCommand::Release(epoch));
        }
    }

    pub(super) fn close_gate(&mut self, epoch: Epoch, now: Time) {
        assert!(self.gate == Gate::Open, "a closed gate is not closed again");
        self.gate = Gate::Closed {
            released: epoch,
            ended: VecDeque::new(),
            held_since: now,
        };
    }

    /// Opens the gate, be it an earlier life's. The caller knows that the record is `Alone(self)`, with nothing under way
    /// that could change it.
    pub(super) fn open_gate(&mut self) {
        self.gate = Gate::Open;
        self.command(PrimaryCommand::OpenGate);
    }

    pub(super) fn resume_guest(&mut self) {
        if self.guest.suspended || self.guest.stopped {
            self.guest.suspended = false;
            self.guest.stopped = false;
            if let Some(link) = &mut self.link {
                link.last_epoch = None;
            }
            self.command(PrimaryCommand::ResumeGuest);
        }
    }

    /// Releases what the newest answer covers, if the record allows it and the answer is fresh.
    pub(super) fn release(&mut self, now: Time) {
        if self.phase != Phase::Paired {
            return;
        }
        assert!(
            self.pending.is_none(),
            "nothing is released with a request unresolved"
        );
        let trusting = self.weak(Weakness::ReleaseByStaleAnswer);
        let (
            Some(link),
            Gate::Closed {
                released,
                ended,
                held_since,
            },
        ) = (&mut self.link, &mut self.gate)
        else {
            return;
        };
        // What is not known to be captured has no barrier yet.
        let epoch = link.committed.min(link.captured);
        if epoch <= *released {
            return;
        }
        let age_ns = now.since_ns(link.answers);
        if age_ns > self.config.release_age_ns_max && !trusting {
            if !std::mem::replace(&mut link.stale, true) {
                self.report(Notice::StaleAnswer { age_ns });
            }
            return;
        }
        link.stale = false;
        *released = epoch;
        while let Some((_, at)) = ended.pop_front_if(|(ended, _)| *ended <= epoch) {
            *held_since = at;
        }
        self.command(PrimaryCommand::Release(epoch));
    }
}
