//! Encodes one 4 KiB guest page, if possible against its previous version, and digests whole memory images.
//!
//! ```text
//!   page, previous ──► encode ──► kind + payload ──(wire)──► decode ──► page
//!                        │
//!          zero? ─ same? ─ few words changed? ─ LZ4 of the XOR ─ LZ4 of the page ─ raw
//!          cheap                                                          expensive
//! ```
//!
//! Invariants:
//! - `decode(encode(page, previous), previous) == page`, for every page and every previous version, and the
//!   payload never has more than [`PAYLOAD_BYTES_MAX`] bytes.
//! - `decode` refuses every payload that `encode` could not have made *by its length and structure*, by name, and
//!   allocates nothing.
//! - Both sides must hold the same previous version. [`ImageDigest`] is what finds out when they do not.
//!
//! [`SessionEncoder`] puts it together for one session of a primary; [`HeldPages`] is what its backup had before.
//!
//! The crate has no I/O, no clock and no randomness.
#![forbid(unsafe_code)]

mod decode;
mod delta;
mod digest;
mod encode;
mod held;
mod kind;
mod previous;
mod session;

pub use decode::{DecodeError, decode};
pub use delta::DeltaError;
pub use digest::{ImageDigest, page_digest};
pub use encode::{Scratch, encode};
pub use held::{Held, HeldPages, NoSuchPage, PageHasher};
pub use kind::{Kind, PAYLOAD_BYTES_MAX, Page, UnknownKind};
pub use previous::{PreviousPages, PreviousPagesCounters, SLOT_OVERHEAD_BYTES};
pub use session::SessionEncoder;
