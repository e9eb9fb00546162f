//! For the exhaustive model alone: forgets what it does not distinguish, so that its states are finite in number.

use romulus_types::{Nonce, Time};

use super::{Backup, Phase, StandbyTrial};

impl Backup {
    /// Moves the clock back by `elapsed_ns`, forgets ages before `base` and the count of tries.
    pub(crate) fn normalise(&mut self, elapsed_ns: u64, base: Time) {
        let back = |time: &mut Time| *time = Time::from_ns(time.ns.saturating_sub(elapsed_ns)).max(base);
        back(&mut self.heard_at);
        self.graced = false;
        if let Some(pending) = &mut self.pending {
            pending.tries = 1;
            back(&mut pending.retry_at);
        }
        for candidate in &mut self.candidates {
            candidate.read.tries = 1;
            back(&mut candidate.read.retry_at);
            back(&mut candidate.give_up_at);
        }
        if let Some(link) = &mut self.link {
            link.answers = base;
            link.trial_failures = link.trial_failures.min(1);
            if let StandbyTrial::FailedAt(at) = &mut link.standby {
                back(at);
            }
        }
    }

    /// A takeover is asked for and not resolved, or was granted.
    pub(crate) fn is_past_return(&self) -> bool {
        matches!(self.phase, Phase::Asking | Phase::Active { .. })
    }

    /// The answer to this request is awaited.
    pub(crate) fn awaits(&self, nonce: Nonce) -> bool {
        let asked = self.pending.as_ref();
        self.awaits_word(nonce) || asked.is_some_and(|pending| pending.request.nonce == nonce)
    }

    /// This request is about a host that said hello.
    pub(crate) fn awaits_word(&self, nonce: Nonce) -> bool {
        self.candidates
            .iter()
            .any(|candidate| candidate.read.request.nonce == nonce)
    }
}
