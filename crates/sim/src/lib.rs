//! A deterministic simulator: primary, backup and witness with the real state machines, frames, codec and image, on a clock,
//! a network and disks that a seed decides, with a model guest and checkers that see everything.
//!
//! ```text
//!   PrimaryHost: guest ─ gate ─ Primary ─ Sender ══ frames ══ Receiver ─ Image ─ Backup ─ survivor :BackupHost
//!        │                         └───────── datagrams ── Witness ── datagrams ─────┘               │
//!        └──────────────── frames that leave ──► Checks ◄──── what the image holds ──────────────────┘
//! ```
//!
//! A run of [`run`] is decided by its seed alone: the same seed and the same code give the same run, event by event. For
//! the first 700 ms of the run's clock things go wrong as the seed's plan says: crashes of processes and hosts (of
//! the agent in the middle of a write), stalls, cut and slow lines, broken connections, spoilt frames, orders and events
//! of the guest; many are aimed at a named step. Then everything is healed, and in the end the VM must be well.
//!
//! [`Mistake`]s are planted to show that the checkers find them.
//!
//! Invariant 7 (the guest's clock) is not simulated: it is a matter of hypervisors.
#![forbid(unsafe_code)]

mod backup_host;
mod checks;
mod context;
mod gate;
mod guest;
mod mistake;
mod network;
mod plan;
mod primary_host;
mod random;
mod receiver;
mod sender;
mod store;
mod world;

pub use checks::{Reached, Violation};
pub use mistake::Mistake;
pub use world::{Outcome, run};
