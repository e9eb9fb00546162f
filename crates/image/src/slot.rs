//! The two commit slots of the file `commit`.
//!
//! ```text
//!   byte    0                256          4096              4352        8192
//!           | slot 0         | zeros      | slot 1          | zeros     |
//!
//!   offset size  field (little-endian)        offset size  field
//!        0    8  magic "RMLSCMT\0"                64   16  session
//!        8    4  version, 1                       80   16  digest of the staged pages
//!       12    4  flags: 1 usable, 2 applied,      96   16  digest of the device state
//!                4 the staging area is B         112   16  digest of the image after applying
//!       16    8  sequence number                 128   16  digest of the staging records' headers
//!       24    8  epoch                           144   16  digest of the layout file
//!       32    8  term                            160   92  zeros
//!       40    8  pages staged                    252    4  CRC-32 of bytes 0..252
//!       48    8  bytes of device state
//!       56    8  bytes of the staging file
//! ```
//!
//! Sequence number s is written to slot s mod 2, so a write never touches the record that stands. The valid
//! slot with the higher number stands; a torn or damaged one is ignored, so the other one stands.
//!
//! Why a crash at any point leaves the last commit or the one before, and never a mix:
//!
//! 1. *Staging* writes only to the area that the standing record does not name.
//! 2. *Commit* writes record s+1 {usable} once the whole staging is written (and synced). Torn: record s
//!    stands, and the image is as s says, because nothing but the staging has been written. Whole: s+1 stands.
//! 3. *Apply* writes pages only while the standing record is {usable, not applied}; whatever part of them was
//!    written, writing them all again gives the same image (redo), and the staging is still there. Then record
//!    s+2 {usable, applied} is written; torn, s+1 stands, and the redo does no harm.
//! 4. *Synchronising* writes pages straight to the image, but only after records s+1 and s+2 {not usable} have
//!    both been written, so that no single damaged slot revives an old commit.
//!
//! Damage to the newest slot alone, with the other one intact, looks like a torn write and falls back to the
//! record before. If a page has been written since, the digest of the image tells; [`Recovery`](crate::Recovery)
//! says how many slots were damaged.

use romulus_types::{Digest, Epoch, Session, Term};
use zerocopy::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ImageError;
use crate::error::Named;
use crate::files::{Area, FileName, Files};

const MAGIC: [u8; 8] = *b"RMLSCMT\0";
const VERSION: u32 = 1;
const USABLE: u32 = 1;
const APPLIED: u32 = 2;
const AREA_B: u32 = 4;
const SLOT_BYTES: usize = 256;
const SLOT_STRIDE: u64 = 4096;
/// Length of the file `commit`, in bytes.
pub(crate) const COMMIT_FILE_BYTES: u64 = 2 * SLOT_STRIDE;

/// A commit: what was staged, and what the image is once it is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CommitRecord {
    pub(crate) session: Session,
    pub(crate) epoch: Epoch,
    pub(crate) term: Term,
    pub(crate) area: Area,
    pub(crate) staging_bytes: u64,
    pub(crate) page_count: u64,
    pub(crate) pages_digest: Digest,
    pub(crate) device_state_bytes: u64,
    pub(crate) device_state_digest: Digest,
    pub(crate) records_digest: Digest,
    pub(crate) image_digest: Digest,
}

/// What a slot says about the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Unusable,
    Committed { record: CommitRecord, applied: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) sequence: u64,
    /// Binds the slot to the layout file beside it.
    pub(crate) layout_digest: Digest,
    pub(crate) verdict: Verdict,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SlotBytes {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    sequence: U64,
    epoch: U64,
    term: U64,
    page_count: U64,
    device_state_bytes: U64,
    staging_bytes: U64,
    session: U128,
    pages_digest: U128,
    device_state_digest: U128,
    image_digest: U128,
    records_digest: U128,
    layout_digest: U128,
    zeros: [u8; 92],
    crc: U32,
}

const _: () = assert!(size_of::<SlotBytes>() == SLOT_BYTES);

impl Slot {
    fn to_bytes(self) -> [u8; SLOT_BYTES] {
        let mut bytes = SlotBytes::new_zeroed_slot();
        bytes.sequence = self.sequence.into();
        bytes.layout_digest = self.layout_digest.0.into();
        if let Verdict::Committed { record, applied } = self.verdict {
            let area = if record.area == Area::B { AREA_B } else { 0 };
            bytes.flags = (USABLE | if applied { APPLIED } else { 0 } | area).into();
            bytes.epoch = record.epoch.0.into();
            bytes.term = record.term.0.into();
            bytes.page_count = record.page_count.into();
            bytes.device_state_bytes = record.device_state_bytes.into();
            bytes.staging_bytes = record.staging_bytes.into();
            bytes.session = record.session.0.into();
            bytes.pages_digest = record.pages_digest.0.into();
            bytes.device_state_digest = record.device_state_digest.0.into();
            bytes.image_digest = record.image_digest.0.into();
            bytes.records_digest = record.records_digest.0.into();
        }
        bytes.crc = crc32fast::hash(&bytes.as_bytes()[..SLOT_BYTES - 4]).into();
        zerocopy::transmute!(bytes)
    }

    /// `Ok(None)`: blank, torn or damaged.
    fn from_bytes(bytes: [u8; SLOT_BYTES]) -> Result<Option<Self>, ImageError> {
        let crc = crc32fast::hash(&bytes[..SLOT_BYTES - 4]);
        let bytes: SlotBytes = zerocopy::transmute!(bytes);
        if bytes.magic != MAGIC || bytes.crc.get() != crc {
            return Ok(None);
        }
        let found = bytes.version.get();
        if found != VERSION {
            return Err(ImageError::Version {
                file: FileName::Commit,
                found,
                known: VERSION,
            });
        }
        let flags = bytes.flags.get();
        if flags & !(USABLE | APPLIED | AREA_B) != 0 {
            return Ok(None);
        }
        let record = CommitRecord {
            session: Session(bytes.session.get()),
            epoch: Epoch(bytes.epoch.get()),
            term: Term(bytes.term.get()),
            area: if flags & AREA_B == 0 { Area::A } else { Area::B },
            staging_bytes: bytes.staging_bytes.get(),
            page_count: bytes.page_count.get(),
            pages_digest: Digest(bytes.pages_digest.get()),
            device_state_bytes: bytes.device_state_bytes.get(),
            device_state_digest: Digest(bytes.device_state_digest.get()),
            records_digest: Digest(bytes.records_digest.get()),
            image_digest: Digest(bytes.image_digest.get()),
        };
        let verdict = if flags & USABLE == 0 {
            Verdict::Unusable
        } else {
            Verdict::Committed {
                record,
                applied: flags & APPLIED != 0,
            }
        };
        let layout_digest = Digest(bytes.layout_digest.get());
        Ok(Some(Self {
            sequence: bytes.sequence.get(),
            layout_digest,
            verdict,
        }))
    }
}

impl SlotBytes {
    fn new_zeroed_slot() -> Self {
        let mut bytes: Self = zerocopy::transmute!([0u8; SLOT_BYTES]);
        bytes.magic = MAGIC;
        bytes.version = VERSION.into();
        bytes
    }
}

fn offset_of(sequence: u64) -> u64 {
    (sequence % 2) * SLOT_STRIDE
}

/// Writes a slot durably.
pub(crate) fn write<F: Files>(files: &mut F, slot: Slot) -> Result<(), ImageError> {
    files
        .write_at(FileName::Commit, offset_of(slot.sequence), &slot.to_bytes())
        .named("write", FileName::Commit)?;
    files.sync(FileName::Commit).named("sync", FileName::Commit)
}

/// What the file `commit` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slots {
    /// The newest valid slot of this layout.
    pub(crate) standing: Option<Slot>,
    /// Slots that are torn, damaged or of another layout.
    pub(crate) damaged: u8,
}

/// Reads both slots.
pub(crate) fn read<F: Files>(files: &F, layout_digest: Digest) -> Result<Slots, ImageError> {
    let mut slots = Slots {
        standing: None,
        damaged: 0,
    };
    for position in 0..2 {
        let mut bytes = [0; SLOT_BYTES];
        files
            .read_at(FileName::Commit, offset_of(position), &mut bytes)
            .named("read", FileName::Commit)?;
        match Slot::from_bytes(bytes)? {
            Some(slot) if slot.layout_digest == layout_digest && slot.sequence % 2 == position => {
                if slots
                    .standing
                    .is_none_or(|standing| slot.sequence > standing.sequence)
                {
                    slots.standing = Some(slot);
                }
            }
            _ => slots.damaged += 1,
        }
    }
    Ok(slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(sequence: u64) -> Slot {
        let record = CommitRecord {
            session: Session(7),
            epoch: Epoch(sequence),
            term: Term(3),
            area: Area::B,
            staging_bytes: 4112,
            page_count: 1,
            pages_digest: Digest(11),
            device_state_bytes: 5,
            device_state_digest: Digest(12),
            records_digest: Digest(13),
            image_digest: Digest(u128::MAX),
        };
        Slot {
            sequence,
            layout_digest: Digest(1),
            verdict: Verdict::Committed {
                record,
                applied: true,
            },
        }
    }

    #[test]
    fn a_slot_reads_back_as_it_was_written() {
        for verdict in [slot(9).verdict, Verdict::Unusable] {
            let slot = Slot { verdict, ..slot(9) };
            assert_eq!(Slot::from_bytes(slot.to_bytes()).unwrap(), Some(slot));
        }
    }

    #[test]
    fn no_flipped_bit_and_no_torn_write_yields_another_slot() {
        let (old, new) = (slot(7).to_bytes(), slot(9).to_bytes());
        for bit in 0..SLOT_BYTES * 8 {
            let mut flipped = new;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Slot::from_bytes(flipped).unwrap(), None, "bit {bit}");
        }
        for cut in 0..SLOT_BYTES {
            let mut torn = old;
            torn[..cut].copy_from_slice(&new[..cut]);
            let read = Slot::from_bytes(torn).unwrap();
            assert!(
                read.is_none() || read == Some(slot(7)) || read == Some(slot(9)),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn a_newer_format_is_refused_by_name() {
        let mut bytes = slot(1).to_bytes();
        bytes[8] = 2;
        let crc = crc32fast::hash(&bytes[..SLOT_BYTES - 4]);
        bytes[SLOT_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(
            Slot::from_bytes(bytes),
            Err(ImageError::Version { found: 2, .. })
        ));
    }
}
