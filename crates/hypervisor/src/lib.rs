//! The hypervisor's side of Romulus: where checkpoints come from and where they are resumed.
//!
//! ```text
//!   primary                                       backup
//!   trait GuestSource ── checkpoints ──────────►  trait Standby
//!     attach, capture, detach                       prepare, trial load, activate
//!        │                                              │
//!        └── qemu (over trait Monitor), kvm, fake ──────┘
//! ```
//!
//! [`spec::MachineSpec`] is what a standby needs to know about the primary's machine; it travels once a session.
#![forbid(unsafe_code)]

pub mod fake;
pub mod fault;
pub mod host;
pub mod kvm;
pub mod launcher;
mod memory_check;
mod process;
pub mod qemu;
pub mod source;
pub mod spec;
pub mod standby;
