//! The witness's record: who may let a VM speak, and the requests that change it.

use romulus_types::{Epoch, HostId, Nonce, Session, Term, VmId, WitnessInstance};
use serde::{Deserialize, Serialize};

/// Who may let the VM speak.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Mode {
    /// One host, with its gate open and nothing held.
    Alone {
        /// That host.
        host: HostId,
    },
    /// The primary, and only what the backup has committed.
    Paired {
        /// The host that runs the guest.
        primary: HostId,
        /// The host that may take over.
        backup: HostId,
        /// The session whose commits count.
        session: Session,
        /// The checkpoint at whose barrier the gate was closed. A takeover from an earlier one is refused.
        first_epoch: Epoch,
    },
    /// The guest was powered off on purpose: nobody may start it from a checkpoint.
    Ended,
}

/// The nonce of the one request by which a backup takes over from commits of `session`.
///
/// It is derived, not drawn: a backup that crashed after asking repeats the very same request, and a record that carries
/// it says by itself that this grant was for the image of `session`. So nothing about the request has to be remembered.
#[must_use]
pub fn takeover_nonce(session: Session) -> Nonce {
    Nonce(session.0 ^ 0x7461_6b65_6f76_6572_0000_0000_0000_0001)
}

/// The nonce of the one request by which a primary hands over to the backup of `session`, after its final checkpoint
/// was acknowledged. Derived like [`takeover_nonce`]: the backup recognises the record even if no message arrives.
#[must_use]
pub fn hand_over_nonce(session: Session) -> Nonce {
    Nonce(session.0 ^ 0x6861_6e64_206f_7665_7200_0000_0000_0002)
}

/// What the witness keeps for each VM. Changed only by compare-and-set on `term`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Record {
    /// The life of the witness's store that made this record.
    pub instance: WitnessInstance,
    /// Grows with every change.
    pub term: Term,
    /// Who may speak.
    pub mode: Mode,
    /// The request that made this record, so that its repetition gets the same answer.
    pub nonce: Nonce,
}

impl Record {
    /// Whether it says that `host` runs the VM by itself, in this very term of this witness: what is true whenever a
    /// primary says hello to a backup.
    #[must_use]
    pub fn names_alone(&self, host: &HostId, instance: WitnessInstance, term: Term) -> bool {
        let alone = matches!(&self.mode, Mode::Alone { host: named } if named == host);
        alone && self.instance == instance && self.term == term
    }
}

/// What a host, or an operator through it, asks of the witness.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WitnessRequest {
    /// The VM.
    pub vm: VmId,
    /// The host that asks. The driver of the witness checks it against the certificate.
    pub host: HostId,
    /// Names the request; repeated unchanged when a reply is missing.
    pub nonce: Nonce,
    /// What is asked.
    pub ask: Ask,
}

/// The kinds of request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Ask {
    /// The record as it is.
    Read,
    /// An operator declares a VM that the witness does not know (or whose record is `Ended`) as `Alone(host)`.
    Register,
    /// Compare-and-set: from the record with exactly this instance and term to `mode`.
    Change {
        /// The instance that the asker remembers.
        instance: WitnessInstance,
        /// The term that the asker believes current.
        term: Term,
        /// The mode to set.
        mode: Mode,
    },
}

/// The witness's answer to one request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WitnessReply {
    /// The VM.
    pub vm: VmId,
    /// The request that this answers.
    pub nonce: Nonce,
    /// The answer.
    pub answer: Answer,
}

/// What the witness said.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Answer {
    /// Answer to `Read`.
    Current(Record),
    /// The change was made, now or by an earlier copy of the same request.
    Granted(Record),
    /// The record is another one than the asker believed, or the change is not the asker's to make.
    Refused(Record),
    /// No record for this VM.
    UnknownVm,
    /// The store is not the one the asker remembers; this is its instance.
    WrongInstance(WitnessInstance),
}
