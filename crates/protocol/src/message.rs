//! What primary and backup say to each other on the control stream of a session. The driver adds the session to
//! each message and drops what belongs to another one. Page data travels apart, as wire frames.

use romulus_types::{Epoch, Term, Time, WitnessInstance};
use serde::{Deserialize, Serialize};

/// From the primary to the backup.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PrimaryMessage {
    /// The primary lives. Answered by [`BackupMessage::Alive`].
    Heartbeat {
        /// When it was sent, by the primary's own clock; comes back in the answer.
        sent: Time,
    },
    /// The record now names this session.
    Paired {
        /// The record's term.
        term: Term,
        /// The witness's instance.
        instance: WitnessInstance,
        /// The first epoch that may be taken over from.
        first_epoch: Epoch,
    },
    /// The record was changed to `Alone(primary)` or `Ended` on purpose: there is nothing left to take over.
    Left {
        /// The record's term.
        term: Term,
    },
    /// The record was changed to `Alone(backup)` on purpose, after `last_epoch`: the backup is to activate it.
    HandOver {
        /// The record's term.
        term: Term,
        /// The final checkpoint.
        last_epoch: Epoch,
    },
    /// The guest's hypervisor died under the primary: it will not ask for the record, the backup should at once.
    GuestLost,
}

/// From the backup to the primary.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BackupMessage {
    /// The backup lives, and everything up to `committed` is committed. Sent for each heartbeat and at each commit.
    Alive {
        /// Newest committed epoch of this session, [`Epoch::NONE`] before the first.
        committed: Epoch,
        /// `sent` of the newest heartbeat that the backup had seen when it said this, or when the newest checkpoint that it had
        /// committed was captured: what is later.
        answers: Time,
    },
    /// A standby with the guest's configuration has loaded the checkpoint of this epoch.
    StandbyLoaded {
        /// The epoch that was loaded.
        epoch: Epoch,
    },
    /// The backup's operator asks for a planned failover.
    PleaseHandOver,
}
