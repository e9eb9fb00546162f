//! The attach protocol, version 1, as values and bytes: no I/O, and nothing that a peer sends makes it panic. Its rules are written
//! down in docs/src/attach-protocol.md.
//!
//! ```text
//!   0      4         6      8           12          16
//!   | RATT | version | kind | length    | number    | payload: `length` bytes of postcard
//!   little-endian; a reply has the number of its request, an event has 0
//! ```
//!
//! File descriptors travel beside the first byte of the header. How many a message brings follows from its payload:
//! [`Request::descriptors`] and [`Reply::descriptors`].

mod codec;
mod header;
mod machine;
mod message;
#[cfg(test)]
mod tests;

pub use codec::ProtoError;
pub use header::{HEADER_BYTES, Header, MAGIC, PAYLOAD_BYTES_MAX};
pub use machine::{
    CONFIG_BYTES_MAX, DISKS_MAX, Disk, MEMORY_BYTES_MAX, MachineError as MachineInfoError, MachineInfo,
    NAME_BYTES_MAX, NICS_MAX, Nic, OUTPUTS_MAX, Output, PAGE_BYTES, PATH_BYTES_MAX, REGIONS_MAX, Region,
    Tracking, VCPUS_MAX, bitmap_bytes,
};
pub use message::{
    Activated, Captured, ErrorCode, Event, Halt, Harvested, Hello, Pause, Paused, Prepare, Refusal, Reply,
    Request, Restore, Restored, Resumed, Role, TEXT_BYTES_MAX, Versions, Welcome,
};

/// The version of the protocol that this library speaks.
pub const VERSION: u16 = 1;
/// Most file descriptors with one message: the regions, the bitmap and the state.
pub const DESCRIPTORS_MAX: usize = REGIONS_MAX + 2;
