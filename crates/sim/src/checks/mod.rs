//! What must be true of every run, whatever goes wrong. The checkers see all parts at once; the parts do not see them.
//!
//! `output` watches what clients see (invariants 1 and 2), `memory` what the image holds (3 and 4), `survival` that the VM
//! is still there in the end (5 and 6).

mod memory;
mod output;
mod survival;

pub(crate) use survival::Outlook;

use std::collections::{BTreeMap, VecDeque};

use romulus_types::{Epoch, PageIndex, Session, Time};

use crate::guest::{Memory, Output};

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Invariant 1.
    #[error("output {counter} left while paired, and no checkpoint at the backup covers it")]
    OutputBeforeCommit {
        /// Number of the output.
        counter: u64,
    },
    /// Invariant 1.
    #[error("epoch {epoch} was released before the backup said that it is committed")]
    ReleaseBeforeAck {
        /// The epoch.
        epoch: Epoch,
    },
    /// Invariant 1.
    #[error("a client has seen output {counter}, and the survivor's memory does not have it")]
    OutputLost {
        /// Number of the output.
        counter: u64,
    },
    /// Invariant 2.
    #[error("the primary let the VM speak in the backup's term")]
    PrimarySpokeInBackupsTerm,
    /// Invariant 2.
    #[error("the backup let the VM speak without a grant")]
    BackupSpokeUngranted,
    /// Invariant 2.
    #[error("the backup acknowledged with its own takeover asked for")]
    AckWhileUnresolved,
    /// Invariant 2.
    #[error("the backup let a host in that the record does not name")]
    LiarLetIn,
    /// Invariant 2.
    #[error("the backup remembers a term that there never was")]
    FalseTerm,
    /// Invariant 2.
    #[error("the guest was activated twice")]
    ActivatedTwice,
    /// Invariant 3.
    #[error("the guest was activated from an image that holds no commit of that session")]
    ActivatedWithoutCommit,
    /// Invariant 3.
    #[error("after a crash the image holds {found:?}, and {committed:?} was committed")]
    CommitLost {
        /// What is there.
        found: Option<(Session, Epoch)>,
        /// What was promised.
        committed: (Session, Epoch),
    },
    /// Invariants 3 and 4.
    #[error("page {} of the image at epoch {epoch} is not the guest's", page.0)]
    WrongMemory {
        /// The first page that differs.
        page: PageIndex,
        /// The checkpoint.
        epoch: Epoch,
    },
    /// Invariants 3 and 4.
    #[error("the backup could not use checkpoint {epoch}, and nothing spoilt it on its way: {reason}")]
    Invalid {
        /// The checkpoint.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// Invariant 6, and what it is all for.
    #[error("in the end the VM does not run, and it should: {0}")]
    VmLost(&'static str),
}

/// What the checkers remember of a run.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    pub(crate) violation: Option<Violation>,
    /// A frame was spoilt on its way: an invalid checkpoint is to be expected.
    pub(crate) spoilt: bool,
    seen: VecDeque<Output>,
    pub(crate) last_output: Option<Time>,
    checkpoints: BTreeMap<(Session, Epoch), Memory>,
    committed: Option<(Session, Epoch)>,
    covered: BTreeMap<Session, u64>,
    said: BTreeMap<Session, Epoch>,
    activated: bool,
    /// What a run reached, for the summary.
    pub(crate) reached: Reached,
}

/// What a run reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The record named the pair.
    pub paired: bool,
    /// The guest was activated at the backup.
    pub took_over: bool,
    /// Commits.
    pub commits: u64,
    /// Outputs that a client saw.
    pub outputs: u64,
    /// Images opened again after a crash with a commit in them.
    pub reopened: u64,
    /// Pages that a backup held when a session began.
    pub held_pages: u64,
}

impl Checks {
    fn violate(&mut self, violation: Violation) {
        self.violation.get_or_insert(violation);
    }
}
