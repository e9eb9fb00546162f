//! The sans-IO core of Romulus: who may speak for a VM, when output may leave, and when a backup takes over.
#![forbid(unsafe_code)]

mod api;
mod handshake;
mod message;
mod record;
mod words;

pub use api::{
    BackupCommand, BackupConfig, BackupEvent, BackupOrder, GuestEvent, ImageStatus, NotProtected, Notice,
    PrimaryCommand, PrimaryConfig, PrimaryEvent, PrimaryOrder, Protection, RefuseReason, Remembered,
};
pub use handshake::{Hello, ToBackup, ToPrimary};
pub use message::{BackupMessage, PrimaryMessage};
pub use record::{Answer, Ask, Mode, Record, WitnessReply, WitnessRequest};
