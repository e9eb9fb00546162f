//! The packet gate: holds what a guest sends until the checkpoint behind it is committed on the backup, and announces the
//! guest's addresses after a takeover.
//!
//! The guest's tap stays on its bridge. While the gate is closed, a filter on the tap's ingress sends every frame, of whatever
//! protocol, to a *relay* tap that this process reads; what is released is written to the relay, and arrives at the
//! guest's tap as if the guest had sent it then, so that the bridge's MAC table and every firewall rule on that
//! port work as before. Frames *to* the guest never pass here. Segmentation-offload packets stay whole.
//!
//! ```text
//!                     ┌──────────── this process ───────────┐
//!                     │  thread ──► queue by epoch ──► release│
//!                     └─────▲─────────────────────────┬─────┘
//!                           │ relay tap               │
//!   guest ──► guest's tap ──┘        guest's tap ◄────┘ ──► bridge ──► network
//!   guest ◄── guest's tap ◄──────────────────────────────── bridge
//! ```
//!
//! Invariants: nothing leaves before `release` of its epoch; frames leave in the order in which they were sent; a crash at any
//! point leaves the guest mute, never heard (the filter outlives the process, the relay does not); memory is bounded, and what
//! is over the limit is dropped and counted. An error in attributing a frame to an epoch can only be towards a later one.
//!
//! It needs `CAP_NET_ADMIN` and `CAP_BPF` (or root), `/dev/net/tun`, and a kernel with `cls_bpf`, `act_mirred` and `sch_ingress`.
#![forbid(unsafe_code)]

pub mod announce;
mod announcer;
mod bridge;
mod error;
mod gate;
mod learn;
pub mod netlink;
mod plumbing;
mod programs;
mod queue;
mod stats;
mod tc;

pub use announcer::{Announcer, Announcing};
pub use bridge::{interface_exists, join_bridge};
pub use error::GateError;
pub use gate::{Gate, GateOptions};
pub use learn::{LEARNT_MAX, LearntAddress, LearntTable, Mac};
pub use stats::{GateStats, HOLD_BUCKETS, HoldTimes};
