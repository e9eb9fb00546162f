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
