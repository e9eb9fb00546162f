//! The backup's heart: the memory image of one VM, in files that outlive the process that writes them.
//!
//! ```text
//!   DIR/VM/         (or memory files of these names)
//!     layout      whose image this is, and its RAM blocks
//!     ram-0 …     the memory, sparse; a standby maps ram-0 as its RAM
//!     staging-A   the checkpoint that is committed …
//!     staging-B   … and the one that is coming in; they change places
//!     commit      two slots that say which commit stands
//!     lock
//!
//!             begin_sync            verify_and_commit {first}
//!   Unusable ──────────► Syncing ─────────────────────────► Committed{n} ◄─┐ begin, stage,
//!      ▲  ▲                 │                                   │  │       │ verify_and_commit, apply
//!      │  └─────────────────┴────────── mark_unusable ──────────┘  └───────┘ of n + 1
//!      └ create; open, when what it finds is not what was committed
//! ```
//!
//! Invariants:
//! - What is committed survives the death of this process at any point, whole; what is not, leaves no trace.
//!   The argument is at the head of `slot.rs`; `tests/crash.rs` tries it at every step.
//! - An image is durably unusable *before* the first page of a synchronisation overwrites it, and usable again only
//!   when the digest of all of it is the one that the primary computed.
//! - Every commit is checked against count and digest of each section *and* the digest of the whole image
//!   after applying it. A base that is not what it should be cannot go unnoticed.
//! - A peer can use no more than [`Limits`] allow.
//! - An image that a standby has activated is that guest's memory and no longer an image: whoever activates
//!   must remember it durably and neither open nor synchronise the image again while the guest lives.
//!
//! What survives is as durable as the [`Shelf`] that the files lie on: in a folder on tmpfs, or as memory files that somebody
//! keeps for us, the death of the agent, not of the host. On a disk, `sync` makes it survive a loss of power as well, at a
//! disk's speed.
//!
//! Calls block on the file system. [`Image::open`] and [`Image::verify_image`] read the whole image (about a second for
//! 4 GiB), so a daemon runs them off its event loop.
#![forbid(unsafe_code)]

mod commit;
mod digests;
mod error;
mod files;
mod image;
mod layout_file;
mod memory;
mod recover;
mod slot;
mod staging;
mod window;

pub use commit::Expected;
pub use error::ImageError;
pub use files::{
    Area, Claim, Crashing, FileName, Files, FolderShelf, Fuse, HostFiles, Keeper, KeptShelf, LateFiles,
    MemFiles, NoSuchFile, PlacedFiles, Places, Shelf, Spilling, StagingShare,
};
pub use image::{Image, ImageState, Limits, UnusableReason, Usage};
pub use recover::Recovery;

use romulus_types::Digest;

/// The digest of a checkpoint's device state as [`Expected::device_state_digest`] wants it: xxh3-128 with seed 0.
pub fn device_state_digest(state: &[u8]) -> Digest {
    Digest(xxhash_rust::xxh3::xxh3_128(state))
}
