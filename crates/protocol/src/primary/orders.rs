//! What operators order and what the guest does.

use romulus_types::Time;

use super::{Gate, Intent, Leave, Phase, Primary};
use crate::api::{GuestEvent, NotProtected, Notice, PrimaryCommand, PrimaryOrder};
use crate::message::PrimaryMessage;

impl Primary {
    pub(super) fn on_order(&mut self, now: Time, order: PrimaryOrder) {
        match order {
            PrimaryOrder::Unprotect => self.want(Intent::Unprotect),
            PrimaryOrder::HandOver => {
                let able = self.phase == Phase::Paired && self.link.is_some() && self.guest.running;
                if able && self.intent == Intent::Protect {
                    self.want(Intent::HandOver {
                        deadline: now.after_ns(self.config.hold_ns_max),
                    });
                } else {
                    let protection = self.protection();
                    self.report(Notice::OrderRefused(protection));
                }
            }
        }
    }

    pub(super) fn on_guest(&mut self, now: Time, event: GuestEvent) {
        match event {
            GuestEvent::Paused => self.guest.running = false,
            GuestEvent::Resumed => {
                self.guest.running = true;
                if let Gate::Closed { held_since, .. } = &mut self.gate {
                    // What a paused guest had sent waited for the operator, not for the backup.
                    *held_since = now;
                }
            }
            GuestEvent::Changed => {
                // The standby would get a machine that is no more. A request that is under way can't be taken back.
                let moving = matches!(self.intent, Intent::HandOver { .. });
                if moving && !matches!(self.phase, Phase::Leaving(_)) {
                    self.report(Notice::HandOverFailed);
                    self.intent = Intent::Rejoin;
                } else {
                    self.want(Intent::Rejoin);
                }
            }
            GuestEvent::PoweredOff => self.want(Intent::PowerOff),
            GuestEvent::Lost => {
                self.send(PrimaryMessage::GuestLost);
                self.finish(NotProtected::GuestNotRunning);
            }
        }
    }

    /// A stronger intent replaces a weaker one, never the other way round.
    fn want(&mut self, intent: Intent) {
        self.intent = self.intent.max(intent);
    }

    /// The record is `Alone(self)` and stays so: the guest is left as if we had never been here.
    pub(super) fn end_unprotected(&mut self) {
        let term = self
            .remembered
            .as_ref()
            .expect("alone is a record that was read")
            .term;
        // Even if it was never closed: one that was only prepared leaves traces, and opening one may have failed.
        self.open_gate();
        self.resume_guest();
        self.send(PrimaryMessage::Left { term });
        self.finish(NotProtected::Disabled);
    }

    /// Output has been held for too long: the backup is given up.
    pub(super) fn hold_expired(&mut self, now: Time, held_ns: u64) {
        self.report(Notice::HeldTooLong { held_ns });
        match self.phase {
            Phase::Alone => self.lose_link(now, false),
            Phase::Paired => self.leave(now, Leave::Alone),
            Phase::Consulting | Phase::Pairing { .. } | Phase::Leaving(_) | Phase::Finished(_) => {}
        }
    }

    /// A hand-over did not finish in time.
    pub(super) fn hand_over_expired(&mut self) {
        self.intent = Intent::Protect;
        self.report(Notice::HandOverFailed);
    }

    pub(super) fn suspend_guest(&mut self) {
        self.guest.suspended = true;
        self.command(PrimaryCommand::SuspendGuest);
    }
}
