//! The primary's deadlines, and what a stall of its own means.
//!
//! Silence is judged in three steps, so that our own lateness is not taken for the backup's: a stall gives a short grace,
//! then the sockets are drained, and only then is the backup suspected.

use romulus_types::Time;

use super::{Gate, Intent, Phase, Primary, Stage};
use crate::api::{Notice, PrimaryCommand, UNPAIRED_PATIENCE};

/// Being later than this part of the suspicion timeout is a stall of our own; the grace is as long.
const STALL_PARTS: u64 = 3;

impl Primary {
    /// When [`Primary::handle_timeout`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        if matches!(self.phase, Phase::Finished(_)) {
            return None;
        }
        let deadlines = [
            self.pending.as_ref().map(|pending| pending.retry_at),
            self.heartbeat_at(),
            self.suspect_at(),
            self.reconnect_at(),
            self.hold_at(),
            self.mute_at(),
            self.hand_over_at(),
        ];
        deadlines.into_iter().flatten().min()
    }

    pub(super) fn fire_timers(&mut self, now: Time) {
        let due = |at: Option<Time>| at.is_some_and(|at| at <= now);
        if due(self.pending.as_ref().map(|pending| pending.retry_at)) {
            self.ask_again(now);
        }
        if due(self.heartbeat_at()) {
            self.heartbeat(now);
        }
        if due(self.suspect_at()) {
            if let Some(link) = &mut self.link {
                link.draining = true;
            }
            self.command(PrimaryCommand::DrainSockets);
        }
        if due(self.hold_at()) {
            let held_ns = self.held_since().map_or(0, |since| now.since_ns(since));
            self.hold_expired(now, held_ns);
        }
        if due(self.mute_at()) {
            self.suspend_guest();
        }
        if due(self.hand_over_at()) {
            self.hand_over_expired();
        }
        if due(self.reconnect_at()) {
            self.connect(now);
        }
    }

    /// A stall of our own: what the backup said meanwhile may not have been handed in, and it may have had nothing to
    /// answer, since we were silent.
    pub(super) fn make_up_for_stall(&mut self, now: Time) {
        let part_ns = self.config.suspicion_ns / STALL_PARTS;
        let late_ns = self.poll_timeout().map_or(0, |at| now.since_ns(at));
        if let Some(link) = &mut self.link
            && late_ns > part_ns
            && !link.graced
        {
            link.graced = true;
            let spent_ns = self.config.suspicion_ns - part_ns;
            link.heard_at = link.heard_at.max(Time::from_ns(now.ns.saturating_sub(spent_ns)));
        }
    }

    pub(super) fn on_drained(&mut self, now: Time) {
        let patience_ns = self.patience_ns();
        let Some(link) = &mut self.link else { return };
        let silent_ns = now.since_ns(link.heard_at);
        if std::mem::take(&mut link.draining) && silent_ns >= patience_ns {
            self.report(Notice::Suspicion { silent_ns });
            self.lose_link(now, false);
        }
    }

    fn heartbeat_at(&self) -> Option<Time> {
        let link = self
            .link
            .as_ref()
            .filter(|link| link.stage != Stage::Connecting)?;
        Some(link.heartbeat_at)
    }

    fn suspect_at(&self) -> Option<Time> {
        let link = self
            .link
            .as_ref()
            .filter(|link| link.stage != Stage::Connecting && !link.draining)?;
        Some(link.heard_at.after_ns(self.patience_ns()))
    }

    /// How long the backup may be silent. While nothing is held and the record is ours, its loss costs nothing but the
    /// copy that is under way, and that copy may well be what makes it late.
    fn patience_ns(&self) -> u64 {
        match (&self.phase, &self.gate) {
            (Phase::Alone, Gate::Open) => self.config.suspicion_ns.saturating_mul(UNPAIRED_PATIENCE),
            _ => self.config.suspicion_ns,
        }
    }

    fn reconnect_at(&self) -> Option<Time> {
        let idle = self.phase == Phase::Alone && self.link.is_none() && self.intent == Intent::Protect;
        self.reconnect_at.filter(|_| idle)
    }

    fn held_since(&self) -> Option<Time> {
        match &self.gate {
            Gate::Open => None,
            Gate::Closed { held_since, .. } => Some(*held_since),
        }
    }

    fn hold_at(&self) -> Option<Time> {
        let settled = matches!(self.phase, Phase::Alone | Phase::Paired) && self.pending.is_none();
        let since = self
            .held_since()
            .filter(|_| settled && self.guest.running && !self.guest.stopped)?;
        Some(since.after_ns(self.config.hold_ns_max.min(self.config.mute_ns_max)))
    }

    fn mute_at(&self) -> Option<Time> {
        let runs = self.guest.running && !self.guest.suspended && !self.guest.stopped;
        let since = self.held_since().filter(|_| runs && self.pending.is_some())?;
        Some(since.after_ns(self.config.mute_ns_max))
    }

    fn hand_over_at(&self) -> Option<Time> {
        match (self.intent, &self.phase) {
            (Intent::HandOver { deadline }, Phase::Paired) => Some(deadline),
            _ => None,
        }
    }
}
