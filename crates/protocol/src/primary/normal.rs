//! For the exhaustive model alone: forgets what it does not distinguish, so that its states are finite in number.

use romulus_types::{Nonce, Time};

use super::{Gate, Intent, Primary};

impl Primary {
    /// Moves the clock back by `elapsed_ns`, forgets ages before `base` and the count of tries.
    pub(crate) fn normalise(&mut self, elapsed_ns: u64, base: Time) {
        let back = |time: &mut Time| {
            // Deadlines at the end of the clock stand for "never".
            if time.ns < u64::MAX / 2 {
                *time = Time::from_ns(time.ns.saturating_sub(elapsed_ns)).max(base);
            }
        };
        if let Some(pending) = &mut self.pending {
            pending.tries = 1;
            back(&mut pending.retry_at);
        }
        if let Some(link) = &mut self.link {
            link.answers = base;
            for time in [&mut link.due_at, &mut link.heard_at, &mut link.heartbeat_at] {
                back(time);
            }
        }
        if let Gate::Closed {
            ended, held_since, ..
        } = &mut self.gate
        {
            back(held_since);
            ended.iter_mut().for_each(|(_, at)| back(at));
        }
        if let Intent::HandOver { deadline } = &mut self.intent {
            back(deadline);
        }
        if let Some(at) = &mut self.reconnect_at {
            back(at);
        }
    }

    /// Whether the outstanding capture closes the gate, and whether it leaves the guest stopped.
    pub(crate) fn outstanding(&self) -> Option<(bool, bool)> {
        let outstanding = self.link.as_ref()?.outstanding?;
        Some((outstanding.close_gate, outstanding.stay_stopped))
    }

    /// No request is unresolved.
    pub(crate) fn is_settled(&self) -> bool {
        self.pending.is_none()
    }

    /// The request that is not resolved.
    pub(crate) fn asked(&self) -> Option<Nonce> {
        self.pending.as_ref().map(|pending| pending.request.nonce)
    }
}
