//! Makes a VMM attachable: a sidecar takes checkpoints of the running guest, and starts it from one, over a Unix socket.
#![forbid(unsafe_code)]

#[cfg(feature = "server")]
pub mod kvm;
