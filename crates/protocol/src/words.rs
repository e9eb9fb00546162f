//! The operator's words for a state: VMware FT's.

use crate::api::{NotProtected, Protection};

impl Protection {
    /// `("protected", None)` or `("not_protected", Some(reason))`.
    pub fn words(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Protected => ("protected", None),
            Self::NotProtected(reason) => ("not_protected", Some(reason.words())),
        }
    }
}

impl NotProtected {
    /// Every reason.
    pub const ALL: [Self; 12] = [
        Self::Starting,
        Self::WitnessRefuses,
        Self::WitnessUnreachable,
        Self::NoBackup,
        Self::Resynchronising,
        Self::StandbyNotProven,
        Self::Pairing,
        Self::Resolving,
        Self::GuestNotRunning,
        Self::Disabled,
        Self::Fenced,
        Self::TookOver,
    ];

    /// The reason as a name, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::WitnessRefuses => "witness_refuses",
            Self::WitnessUnreachable => "witness_unreachable",
            Self::NoBackup => "no_backup",
            Self::Resynchronising => "resynchronising",
            Self::StandbyNotProven => "standby_not_proven",
            Self::Pairing => "pairing",
            Self::Resolving => "resolving",
            Self::GuestNotRunning => "guest_not_running",
            Self::Disabled => "disabled",
            Self::Fenced => "fenced",
            Self::TookOver => "took_over",
        }
    }

    /// The reason in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::WitnessRefuses => "the witness does not know this VM, or is not the one remembered",
            Self::WitnessUnreachable => "witness unreachable",
            Self::NoBackup => "no backup",
            Self::Resynchronising => "resynchronising",
            Self::StandbyNotProven => "the standby has not loaded a checkpoint yet",
            Self::Pairing => "pairing",
            Self::Resolving => "asking the witness who speaks",
            Self::GuestNotRunning => "guest not running",
            Self::Disabled => "disabled",
            Self::Fenced => "fenced: another host speaks for this VM",
            Self::TookOver => "running here after a takeover",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_name_and_words_of_its_own() {
        let mut names = NotProtected::ALL.map(NotProtected::name).to_vec();
        let mut words = NotProtected::ALL.map(NotProtected::words).to_vec();
        for list in [&mut names, &mut words] {
            list.sort_unstable();
            list.dedup();
            assert_eq!(list.len(), NotProtected::ALL.len());
        }
    }
}
