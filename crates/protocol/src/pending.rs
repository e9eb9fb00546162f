//! A request to the witness that is not resolved, and what a host believes of the witness.

use romulus_types::Time;

use crate::api::Remembered;
use crate::record::{Record, WitnessRequest};

/// Tries without an answer after which the witness counts as unreachable.
pub(crate) const TRIES_UNTIL_UNREACHABLE: u32 = 3;

/// One request, repeated unchanged until an answer resolves it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pending {
    pub(crate) request: WitnessRequest,
    pub(crate) retry_at: Time,
    pub(crate) tries: u32,
    /// An answer came that can't be believed; an operator has to say what is true.
    pub(crate) doubted: bool,
}

impl Pending {
    /// The state of the witness as operators see it.
    pub(crate) fn unreachable(&self) -> bool {
        self.tries >= TRIES_UNTIL_UNREACHABLE
    }

    /// Counts a repetition; tells when operators should hear of it: at the third and then at each doubling.
    pub(crate) fn repeat(&mut self, now: Time, retry_ns: u64) -> Option<u32> {
        self.tries = self.tries.saturating_add(1);
        self.retry_at = now.after_ns(retry_ns.max(1));
        let told = self.tries == TRIES_UNTIL_UNREACHABLE
            || (self.tries > TRIES_UNTIL_UNREACHABLE && self.tries.is_power_of_two());
        told.then_some(self.tries)
    }

    /// An answer came, though not one that resolves the request.
    pub(crate) fn doubt(&mut self) {
        self.doubted = true;
        self.tries = 1;
    }
}

/// Whether a record can be believed: made by the instance that is remembered, and not older than what was seen.
/// A host that remembers nothing believes the first witness that it meets.
pub(crate) fn believable(remembered: Option<&Remembered>, record: &Record) -> bool {
    remembered.is_none_or(|known| known.instance == record.instance && known.term <= record.term)
}
