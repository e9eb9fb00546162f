//! QEMU's migration stream: read from a primary to learn its machine, written to a standby to wake it.
//!
//! Pure: bytes in, items out. All numbers are big-endian.
//!
//! ```text
//!   "QEVM" be32=3
//!   07 be32 length, machine name   { 05 u8 length, name, be32 version, data }*
//!   08 be16 command, be16 length, data                                          (bootstrap only)
//!   01 be32 id, u8 length, "ram", be32 instance, be32 version=4
//!        be64 total|04  { u8 length, block, be64 bytes [, be64 gpa] }*  be64 10   7e be32 id
//!   02 | 03 be32 id
//!        { be64 offset|flags [, u8 length, block]  00 | 4096 bytes }*   be64 10   7e be32 id
//!   04 ...                        device sections: they have no length, so they are opaque here
//!   00
//!   06 be32 length, JSON          what the device sections hold ("vmdesc")
//! ```
//!
//! `xen-save-devices-state` writes the first line, the device sections and the `00`.
//!
//! Written from measurements and the format's description in QEMU's `docs/devel/migration.rst`.

mod reader;
mod sections;
mod writer;

use romulus_types::{BLOCK_NAME_BYTES_MAX, BLOCKS_MAX};
use serde::{Deserialize, Serialize};

pub use reader::{Content, Item, Reader, vmdesc_at_end};
pub use sections::{Section, list_sections};
pub use writer::{BlockContent, device_sections, write_activation};

pub(crate) const MAGIC: [u8; 8] = *b"QEVM\0\0\0\x03";
pub(crate) const RAM_VERSION: u32 = 4;
pub(crate) const CAPABILITIES: &str = "configuration/capabilities";

/// The first byte of each part of a stream.
pub(crate) mod mark {
    pub(crate) const END: u8 = 0x00;
    pub(crate) const START: u8 = 0x01;
    pub(crate) const PART: u8 = 0x02;
    pub(crate) const LAST: u8 = 0x03;
    pub(crate) const FULL: u8 = 0x04;
    pub(crate) const SUBSECTION: u8 = 0x05;
    pub(crate) const VMDESC: u8 = 0x06;
    pub(crate) const CONFIGURATION: u8 = 0x07;
    pub(crate) const COMMAND: u8 = 0x08;
    pub(crate) const FOOTER: u8 = 0x7e;
}

/// Flags in the low bits of a RAM record.
pub(crate) mod flag {
    pub(crate) const ALL: u64 = 0xfff;
    pub(crate) const ZERO: u64 = 0x02;
    pub(crate) const BLOCKS: u64 = 0x04;
    pub(crate) const PAGE: u64 = 0x08;
    pub(crate) const END: u64 = 0x10;
    pub(crate) const CONTINUE: u64 = 0x20;
}

/// Most bytes that one item can need before it is complete: the block list.
pub const ITEM_BYTES_MAX: usize = 16 + BLOCKS_MAX * (1 + BLOCK_NAME_BYTES_MAX + 16) + 8;
/// Longest name of a machine, in bytes.
pub const MACHINE_NAME_BYTES_MAX: usize = 256;
/// Most subsections of the configuration.
pub const SUBSECTIONS_MAX: usize = 16;
/// Most names in the capabilities subsection.
pub const CAPABILITIES_MAX: u32 = 64;
/// Most bytes of device sections and vmdesc together.
pub const TAIL_BYTES_MAX: usize = 64 << 20;

/// Why a stream was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Not a migration stream, or one of another version.
    #[error("the stream does not start with QEMU's header of version 3")]
    Header,
    /// A part that does not belong here.
    #[error("unexpected byte {byte:#04x} where {expected} was expected in QEMU's stream")]
    Unexpected {
        /// What came.
        byte: u8,
        /// What should have come.
        expected: &'static str,
    },
    /// A configuration subsection whose length we do not know.
    #[error("QEMU's stream has the configuration subsection {0:?}, which this version does not know")]
    Subsection(String),
    /// A count or length over its limit.
    #[error("QEMU's stream has {what} over the limit: {value}")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How many or how long.
        value: u64,
    },
    /// A name that is empty, not UTF-8, or used twice.
    #[error("QEMU's stream has a bad name for {0}")]
    Name(&'static str),
    /// A device that migrates in several rounds, so that it has state that checkpoints do not carry.
    #[error("the device {0:?} has live migration state of its own: detach it, it cannot be protected")]
    LiveDevice(String),
    /// An unknown version of the RAM section.
    #[error("QEMU's RAM section has version {0}, only {RAM_VERSION} is known")]
    RamVersion(u32),
    /// A section with an id that is not the RAM section's.
    #[error("QEMU's stream continues section {0}, which is not its RAM")]
    SectionId(u32),
    /// The block list's lengths and its total differ.
    #[error("QEMU's RAM blocks do not add up to their total of {0} bytes")]
    BlockTotal(u64),
    /// A record with flags that only capabilities switched off here can produce.
    #[error("QEMU's stream has a RAM record with flags {0:#x}, which were not asked for")]
    PageFlags(u64),
    /// A page of a block that was never listed.
    #[error("QEMU's stream has a page of an unlisted RAM block")]
    PageBlock,
    /// A page past its block's end.
    #[error("QEMU's stream has a page at {offset:#x}, past the end of RAM block {block:?}")]
    PageOffset {
        /// The block.
        block: String,
        /// The page's offset, in bytes.
        offset: u64,
    },
    /// A fill page with something other than zeros.
    #[error("QEMU's stream has a page filled with {0:#04x}; only zeros are known")]
    Fill(u8),
    /// Something is missing.
    #[error("QEMU's stream has device sections before the end of its RAM")]
    DevicesTooEarly,
    /// The saved device state is not what xen-save-devices-state writes.
    #[error("the saved device state is damaged: {0}")]
    DeviceState(&'static str),
    /// The content of a block is not made of whole pages in ascending order inside it.
    #[error("the content of RAM block {0:?} does not fit into it")]
    BlockContent(String),
}

/// One subsection of the configuration section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subsection {
    /// Its name, such as `configuration/target-page-bits`.
    pub name: String,
    /// Its version.
    pub version: u32,
    /// Its data as it stands in the stream.
    pub data: Vec<u8>,
}

/// One RAM block as the stream lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamBlock {
    /// Its name.
    pub name: String,
    /// Its used length in bytes.
    pub bytes: u64,
    /// Its guest physical address, with x-ignore-shared only. 0 stands for a block that is not mapped, too.
    pub gpa: Option<u64>,
}

/// Everything of a stream but RAM and device state: with those two it makes a stream that wakes a standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// The machine's versioned name, such as `pc-q35-7.2`.
    pub machine: String,
    /// The configuration's subsections.
    pub subsections: Vec<Subsection>,
    /// The id of the RAM section.
    pub ram_section: u32,
    /// The blocks, in the stream's order.
    pub blocks: Vec<StreamBlock>,
    /// The JSON that describes the device sections.
    pub vmdesc: String,
}

#[cfg(test)]
mod tests;
