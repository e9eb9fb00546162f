//! Bytes ↔ values: what the daemons say to each other, without any I/O. The written specification is
//! `docs/src/wire-format.md`; where the two differ, one of them is a bug.
//!
//! ```text
//!   bytes ──► FrameDecoder ──► Frame { type, payload }
//!                                │
//!       Control, Hello, Witness… ├──► decode_message       serde types of the caller
//!       Pages                    ├──► Pages                entries in ascending order
//!       DeviceState              ├──► DeviceStateAssembler one blob from chunks
//!       HeldPages                ├──► HeldPagesFrame       hashes in ascending order
//!       Commit                   └──► CommitRecord         sections with count and digest
//! ```
//!
//! Invariants:
//! - Nothing that a peer sends panics or makes this side hold more than one frame and one device state, both of
//!   limited size. A length is checked before memory is set aside for it.
//! - Every frame is checked by CRC-32, and names its version and its session. A frame of another session is refused.
//! - Every value has one encoding (except inside postcard messages), so what was decoded encodes to the same bytes.
//! - The kind of a page's encoding is opaque here: this crate does not know the codec.
#![forbid(unsafe_code)]

mod commit;
mod decoder;
mod device_state;
mod error;
mod frame;
mod guest_state;
mod held;
mod message;
mod pages;
mod varint;

pub use commit::{
    COMMIT_BYTES_MAX, CommitRecord, DeviceStateSection, PagesSection, RECORD_VERSION, SECTIONS_MAX,
};
pub use decoder::{BUFFER_BYTES_MAX, FrameDecoder};
pub use device_state::{
    DEVICE_STATE_BYTES_MAX, DeviceStateAssembler, DeviceStateChunk, device_state_frames, device_state_section,
};
pub use error::WireError;
pub use frame::{
    FRAME_BYTES_MAX, Frame, FrameHeader, FrameType, HEADER_BYTES, MAGIC, OPTIONAL_BIT, PAYLOAD_BYTES_MAX,
    VERSION, encode_frame,
};
pub use guest_state::{NOTES_BYTES_MAX, pack_guest_state, unpack_guest_state};
pub use held::{HeldPagesFrame, HeldPagesWriter};
pub use message::{decode_control, decode_message, encode_control, encode_message};
pub use pages::{ENTRY_HEAD_BYTES_MAX, PAGE_INDEX_MAX, PageEntry, Pages, PagesFrame, PagesWriter};
