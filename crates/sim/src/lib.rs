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
//! [`run_fleet`] runs many of them in step, as VMs of several primaries on one agent with one witness: what they share fails for all.
//!
//! [`Mistake`]s are planted to show that the checkers find them.
//!
//! Invariant 7 (the guest's clock) is not simulated: it is a matter of hypervisors.
#![forbid(unsafe_code)]

mod backup_host;
mod checks;
mod context;
mod fleet;
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
mod witness_host;
mod world;

pub use checks::{Reached, Violation};
pub use fleet::{FaultCounts, FleetOutcome, run_fleet};
pub use mistake::Mistake;
pub use world::{Outcome, run};
