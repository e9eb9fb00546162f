//! The backup's deadlines. Silence is judged as the primary does it: grace after a stall of our own, drain, suspect.

use romulus_types::Time;

use super::{Backup, Link, Phase, StandbyTrial};
use crate::api::{BackupCommand, Notice, UNPAIRED_PATIENCE};

/// Being later than this part of the suspicion timeout is a stall of our own; the grace is as long.
const STALL_PARTS: u64 = 3;

impl Backup {
    /// When [`Backup::handle_timeout`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let retry_at = self.pending.as_ref().map(|pending| pending.retry_at);
        [retry_at, self.suspect_at(), self.force_at, self.candidates_at()]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn fire_timers(&mut self, now: Time) {
        let due = |at: Option<Time>| at.is_some_and(|at| at <= now);
        if due(self.pending.as_ref().map(|pending| pending.retry_at)) {
            self.ask_again(now);
        }
        if due(self.suspect_at()) {
            self.draining = true;
            self.command(BackupCommand::DrainSockets);
        }
        if due(self.force_at) {
            self.force(now);
        }
        if due(self.candidates_at()) {
            self.fire_candidates(now);
        }
    }

    /// A stall of our own: what the primary said meanwhile may not have been handed in.
    pub(super) fn make_up_for_stall(&mut self, now: Time) {
        let part_ns = self.config.suspicion_ns / STALL_PARTS;
        let late_ns = self.poll_timeout().map_or(0, |at| now.since_ns(at));
        if late_ns > part_ns && !self.graced {
            self.graced = true;
            let spent_ns = self.config.suspicion_ns - part_ns;
            self.heard_at = self.heard_at.max(Time::from_ns(now.ns.saturating_sub(spent_ns)));
        }
    }

    pub(super) fn on_drained(&mut self, now: Time) {
        let silent_ns = now.since_ns(self.heard_at);
        if std::mem::take(&mut self.draining) && self.is_watching() && silent_ns >= self.patience_ns() {
            self.report(Notice::Suspicion { silent_ns });
            self.lose_primary(now);
        }
    }

    /// The primary's silence means something.
    fn is_watching(&self) -> bool {
        match self.phase {
            Phase::Following => self.link.as_ref().is_some_and(|link| link.heard),
            Phase::Orphaned => true,
            Phase::Idle | Phase::Reading | Phase::Asking | Phase::Active { .. } => false,
        }
    }

    fn suspect_at(&self) -> Option<Time> {
        (self.is_watching() && !self.draining).then(|| self.heard_at.after_ns(self.patience_ns()))
    }

    /// How long the primary may be silent. Until a standby has loaded a checkpoint of the session there can be no pair, and so
    /// nothing to take over: a silence costs the copy that is under way, and that copy may well be what makes it late.
    fn patience_ns(&self) -> u64 {
        let proven = |link: &Link| link.standby == StandbyTrial::Loaded;
        let unproven = self.phase == Phase::Following && !self.link.as_ref().is_some_and(proven);
        if unproven {
            self.config.suspicion_ns.saturating_mul(UNPAIRED_PATIENCE)
        } else {
            self.config.suspicion_ns
        }
    }
}
