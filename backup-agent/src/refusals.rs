//! Connections that were turned away after the handshake, by cause.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No hello in time, or none that can be read.
    Hello,
    /// The hello names another host than the certificate.
    Identity,
    /// The settings do not allow the host to have the VM backed up here.
    NotAllowed,
    /// The witness's record does not name the host, or is another witness's.
    NotNamed,
    /// The witness did not answer in time.
    WitnessSilent,
    /// The machine can't be backed up here, or has no room.
    Admission,
    /// What works at the VM here gave up, and is being started again.
    GivenUp,
    /// The protocol refuses the session: the VM runs here, another session is connected, the term is old.
    Protocol,
}

impl Refused {
    /// Every cause.
    pub const ALL: [Self; 8] = [
        Self::Hello,
        Self::Identity,
        Self::NotAllowed,
        Self::NotNamed,
        Self::WitnessSilent,
        Self::Admission,
        Self::GivenUp,
        Self::Protocol,
    ];

    /// The cause's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Identity => "identity",
            Self::NotAllowed => "not_allowed",
            Self::NotNamed => "not_named",
            Self::WitnessSilent => "witness_silent",
            Self::Admission => "admission",
            Self::GivenUp => "given_up",
            Self::Protocol => "protocol",
        }
    }
}

/// How many connections were refused, whoever refused them. Clones count together.
#[derive(Clone, Default)]
pub struct RefusedCount(Arc<[AtomicU64; Refused::ALL.len()]>);

impl RefusedCount {
    /// One more.
    pub fn count(&self, cause: Refused) {
        self.0[cause as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were of one cause.
    pub fn of(&self, cause: Refused) -> u64 {
        self.0[cause as usize].load(Ordering::Relaxed)
    }

    /// How many there were of each cause.
    pub fn each(&self) -> impl Iterator<Item = (Refused, u64)> + '_ {
        Refused::ALL.into_iter().map(|cause| (cause, self.of(cause)))
    }

    /// How many there were in all.
    pub fn total(&self) -> u64 {
        self.each().map(|(_, count)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_counted_by_itself() {
        let refused = RefusedCount::default();
        for cause in Refused::ALL {
            refused.count(cause);
            refused.clone().count(cause);
        }
        assert!(refused.each().all(|(_, count)| count == 2));
        assert_eq!(refused.total(), 2 * Refused::ALL.len() as u64);
    }
}
