//! Mistakes that can be planted, to show that the checkers would find them.

use romulus_protocol::Weakness;

/// One planted mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mistake {
    /// The primary lets frames leave when their epoch is captured.
    ReleaseBeforeAck,
    /// The primary releases by answers of any age.
    ReleaseByStaleAnswer,
    /// The backup acknowledges while its takeover is asked for.
    AckWhileUnresolved,
    /// The backup takes over when it suspects.
    TakeOverWithoutGrant,
    /// The backup takes over from whatever session its image is of.
    TakeOverFromOldSession,
    /// The primary pairs at a commit from before the gate was closed.
    PairBeforeGateCommit,
    /// The backup takes the word of whoever says hello.
    BelieveHello,
    /// The backup starts another standby though one had the whole checkpoint.
    RetryAfterTheEnd,
    /// A capture leaves out a page that was written.
    PageLeftOut,
    /// A capture that is given up forgets the pages that it had harvested.
    DirtyForgotten,
    /// The pages of a commit are written again after the next one.
    CommitAppliedTwice,
    /// The backup tells what its image held a session earlier.
    OldListOfHeldPages,
}

impl Mistake {
    /// The protocol's part of it, if it is the protocol's.
    pub(crate) fn weakness(self) -> Option<Weakness> {
        match self {
            Self::ReleaseBeforeAck => Some(Weakness::ReleaseBeforeAck),
            Self::ReleaseByStaleAnswer => Some(Weakness::ReleaseByStaleAnswer),
            Self::AckWhileUnresolved => Some(Weakness::AckWhileUnresolved),
            Self::TakeOverWithoutGrant => Some(Weakness::TakeOverWithoutGrant),
            Self::TakeOverFromOldSession => Some(Weakness::TakeOverFromOldSession),
            Self::PairBeforeGateCommit => Some(Weakness::PairBeforeGateCommit),
            Self::BelieveHello => Some(Weakness::BelieveHello),
            Self::RetryAfterTheEnd
            | Self::PageLeftOut
            | Self::DirtyForgotten
            | Self::CommitAppliedTwice
            | Self::OldListOfHeldPages => None,
        }
    }
}
