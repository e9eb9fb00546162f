//! Makes a VMM attachable: a sidecar takes checkpoints of the running guest, and starts it from one, over a Unix socket. The protocol
//! is written down in docs/src/attach-protocol.md.
//!
//! ```text
//!   VMM's process                                        sidecar
//!   Machine ── server ══ channel ═══ Unix socket ═══ channel ══ client
//!   guest memory, dirty bitmap, state ─── memory files, mapped or read by both
//! ```
//!
//! A VMM's author implements [`server::Machine`] and calls [`server::serve`]; for a VMM over kvm-ioctls and vm-memory most of that
//! is in [`kvm`]. The sidecar uses [`client::Client`]. Messages are in [`proto`], which does no I/O.
#![forbid(unsafe_code)]

pub mod channel;
#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod fake;
#[cfg(feature = "server")]
pub mod kvm;
pub mod memfd;
#[cfg(feature = "server")]
pub mod memory;
pub mod proto;
#[cfg(feature = "server")]
pub mod server;
