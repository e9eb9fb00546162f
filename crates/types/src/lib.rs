//! The vocabulary that every part of Romulus shares: newtypes for epochs, terms, names, nonces and pages,
//! and the layout of a guest's memory.
//!
//! Nothing here decides anything. The crate sits at the bottom of the dependency order, has no I/O and
//! no clock, and every type that crosses the network is bounded by construction.
#![forbid(unsafe_code)]

mod ids;
mod layout;
mod time;

pub use ids::{Digest, Epoch, HostId, NameError, Nonce, Session, Term, VmId, WitnessInstance, NAME_BYTES_MAX};
pub use layout::{
    BlockId, LayoutError, PageIndex, RamBlock, RamLayout, BLOCKS_MAX, BLOCK_NAME_BYTES_MAX, PAGE_BYTES,
    RAM_BYTES_MAX,
};
pub use time::Time;
