//! The outermost messages of a session's control stream: the handshake, and the envelope of everything after it.
//!
//! ```text
//!   primary                                backup
//!     | -- Hello (machine, term, session) --> |   admission: memory, hypervisor, CPU, files, certificate
//!     | <-- ToPrimary::Welcome | Refused ---- |   then the protocol's own say
//!     | -- ToBackup::Peer(..) --------------> |
//!     | <-- ToPrimary::Peer(..) ------------- |
//!     | == data stream: pages, commits =====> |
//! ```

use romulus_types::{HostId, Session, Term, VmId, WitnessInstance};
use serde::{Deserialize, Serialize};

use crate::message::{BackupMessage, PrimaryMessage};

/// The first message of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The VM to be protected.
    pub vm: VmId,
    /// The host that runs it; must be the name in the client's certificate.
    pub primary: HostId,
    /// The session that this connection is.
    pub session: Session,
    /// The record's term as the primary knows it.
    pub term: Term,
    /// The witness's instance as the primary knows it.
    pub instance: WitnessInstance,
    /// Length of an epoch in nanoseconds, for the backup's status.
    pub epoch_ns: u64,
    /// The machine's description as JSON, read by the hypervisor layer alone.
    pub machine: Vec<u8>,
}

/// Primary to backup, after [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToBackup {
    /// For the state machine.
    Peer(PrimaryMessage),
}

/// Backup to primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPrimary {
    /// The session is accepted: memory may be sent.
    Welcome {
        /// The backup's host name.
        backup: HostId,
    },
    /// It is not, and why, in words for the operator of the primary.
    Refused {
        /// Cause and remedy.
        reason: String,
        /// The same request may succeed later without an operator.
        passing: bool,
    },
    /// For the state machine.
    Peer(BackupMessage),
}
