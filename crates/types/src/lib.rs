//! The vocabulary that every part of Romulus shares: newtypes for epochs, terms, names, nonces and pages,
//! and the layout of a guest's memory.
//!
//! Nothing here decides anything. The crate sits at the bottom of the dependency order, has no I/O and
//! no clock, and every type that crosses the network is bounded by construction.
#![forbid(unsafe_code)]

mod ids;
mod layout;
mod time;

pub use ids::{
    Digest, Epoch, HostId, NAME_BYTES_MAX, NameError, Nonce, Session, Term, VmId, WitnessInstance,
};
pub use layout::{
    BLOCK_NAME_BYTES_MAX, BLOCKS_MAX, BlockId, LayoutError, PAGE_BYTES, PageIndex, RAM_BYTES_MAX, RamBlock,
    RamLayout,
};
pub use time::Time;
