//! The sans-IO core of Romulus: who may speak for a VM, when output may leave, and when a backup takes over.
#![forbid(unsafe_code)]

mod api;
mod backup;
mod draw;
mod handshake;
mod message;
#[cfg(test)]
mod model;
mod pending;
mod primary;
mod record;
mod weakness;
mod witness;
mod words;

pub use api::{
    BackupCommand, BackupConfig, BackupEvent, BackupOrder, GuestEvent, ImageStatus, NotProtected, Notice,
    PrimaryCommand, PrimaryConfig, PrimaryEvent, PrimaryOrder, Protection, RefuseReason, Remembered,
};
pub use backup::Backup;
pub use handshake::{Hello, ToBackup, ToPrimary};
pub use message::{BackupMessage, PrimaryMessage};
pub use primary::Primary;
pub use record::{Answer, Ask, Mode, Record, WitnessReply, WitnessRequest, hand_over_nonce, takeover_nonce};
pub use weakness::Weakness;
pub use witness::{WITNESS_VMS_MAX, Witness};
