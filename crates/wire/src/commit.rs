//! The commit record: what a checkpoint consists of, and how to know that all of it is there.
//!
//! ```text
//!    0        4         6          8              12      16        32      40            48             64
//!   | "RMCR" | version | sections | record bytes | CRC-32 | session | epoch | captured ns | image digest |
//!   section × n:
//!    0      2          4          8       16       32
//!   | type | reserved | instance | count | digest |
//! ```
//!
//! All little-endian. Sections ascend by type and instance. The record is a frame's payload on the wire and is kept
//! as it is in a commit slot, so it carries magic, version and CRC-32 of its own.

use bytes::Bytes;
use romulus_types::{Digest, Epoch, Session};
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::WireError;
use crate::frame::{Frame, FrameType, OPTIONAL_BIT, encode_frame};
use crate::message::expect_type;

/// Version of the record's layout.
pub const RECORD_VERSION: u16 = 1;
/// Most sections of a record.
pub const SECTIONS_MAX: usize = 64;
/// Most bytes of a record.
pub const COMMIT_BYTES_MAX: usize = HEAD_BYTES + SECTIONS_MAX * SECTION_BYTES;

const WHAT: &str = "commit record";
const MAGIC: [u8; 4] = *b"RMCR";
const HEAD_BYTES: usize = size_of::<RawHead>();
const SECTION_BYTES: usize = size_of::<RawSection>();
const CRC_AT: usize = 12;
const TYPE_PAGES: u16 = 1;
const TYPE_DEVICE_STATE: u16 = 2;

const _: () = assert!(HEAD_BYTES == 64 && SECTION_BYTES == 32);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHead {
    magic: [u8; 4],
    version: U16,
    sections: U16,
    record_bytes: U32,
    crc: U32,
    session: U128,
    epoch: U64,
    captured_ns: U64,
    image_digest: U128,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSection {
    section_type: U16,
    reserved: U16,
    instance: U32,
    count: U64,
    digest: U128,
}

/// The pages that were sent in a checkpoint: how many, and a digest of the frames that they were in.
///
/// The digest is the sum of the frames' xxh3_128, modulo 2^128, so frames may come in any order and over several
/// streams. It tells that what was sent has arrived; the record's image digest tells that the result is right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagesSection {
    /// Pages, over all frames.
    pub pages: u64,
    /// Sum of the digests of the frames' payloads.
    pub digest: Digest,
}

impl PagesSection {
    /// Adds what another frame, or another part of the checkpoint, contributes.
    pub fn add(&mut self, part: Self) {
        self.pages = self.pages.saturating_add(part.pages);
        self.digest = Digest(self.digest.0.wrapping_add(part.digest.0));
    }
}

/// The device state of a checkpoint: its length and its xxh3_128.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStateSection {
    /// Length in bytes.
    pub bytes: u64,
    /// Its xxh3_128.
    pub digest: Digest,
}

/// What makes a checkpoint complete. A checkpoint that does not match its record in every section is discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitRecord {
    /// The session of the checkpoint.
    pub session: Session,
    /// Its epoch, from 1.
    pub epoch: Epoch,
    /// When the guest was stopped for it, in nanoseconds of the primary's monotonic clock. Tells the backup nothing
    /// about its own clock; differences between records of one session are meaningful, and it names it in its answer.
    pub captured_ns: u64,
    /// Digest of the whole memory image after the checkpoint is applied.
    pub image_digest: Digest,
    /// The pages that were sent.
    pub pages: PagesSection,
    /// The device state that was sent.
    pub device_state: DeviceStateSection,
}

impl CommitRecord {
    /// The record as bytes.
    ///
    /// # Panics
    /// When the epoch is [`Epoch::NONE`].
    pub fn encode(&self) -> Bytes {
        assert_ne!(self.epoch, Epoch::NONE, "epochs are counted from 1");
        let sections = [
            raw_section(TYPE_PAGES, self.pages.pages, self.pages.digest),
            raw_section(
                TYPE_DEVICE_STATE,
                self.device_state.bytes,
                self.device_state.digest,
            ),
        ];
        encode_raw(self, &sections).into()
    }

    /// The record as a frame of its session.
    pub fn frame(&self) -> Bytes {
        encode_frame(FrameType::Commit, self.session, &self.encode())
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`WireError`] names what is wrong with it: magic, version, length, checksum, an unknown mandatory section or
    /// a missing one.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (head, rest) = RawHead::ref_from_prefix(bytes).map_err(|_| WireError::Truncated(WHAT))?;
        let sections = check_head(head, bytes)?;
        let sections =
            <[RawSection]>::ref_from_bytes_with_elems(rest, sections).expect("the length was checked");
        check_sections(sections)?;
        let find = |section_type: u16, name: &'static str| {
            let found = sections
                .iter()
                .find(|section| section.section_type.get() == section_type);
            found.ok_or(WireError::MissingSection(name))
        };
        let pages = find(TYPE_PAGES, "pages")?;
        let device_state = find(TYPE_DEVICE_STATE, "device state")?;
        Ok(Self {
            session: Session(head.session.get()),
            epoch: Epoch(head.epoch.get()),
            captured_ns: head.captured_ns.get(),
            image_digest: Digest(head.image_digest.get()),
            pages: PagesSection {
                pages: pages.count.get(),
                digest: Digest(pages.digest.get()),
            },
            device_state: DeviceStateSection {
                bytes: device_state.count.get(),
                digest: Digest(device_state.digest.get()),
            },
        })
    }

    /// Reads the record in a frame, which must belong to the frame's session.
    ///
    /// # Errors
    /// As [`Self::decode`]; [`WireError::Session`] for a record of another session.
    pub fn from_frame(frame: &Frame) -> Result<Self, WireError> {
        expect_type(FrameType::Commit, frame)?;
        let record = Self::decode(&frame.payload)?;
        if record.session != frame.session {
            return Err(WireError::Session {
                expected: frame.session,
                actual: record.session,
            });
        }
        Ok(record)
    }
}

/// Checks everything in front of the sections, and returns how many there are.
fn check_head(head: &RawHead, bytes: &[u8]) -> Result<usize, WireError> {
    if head.magic != MAGIC {
        return Err(WireError::Malformed {
            what: WHAT,
            problem: "it does not begin with RMCR",
        });
    }
    if head.version.get() != RECORD_VERSION {
        return Err(WireError::RecordVersion(head.version.get()));
    }
    let sections = usize::from(head.sections.get());
    if sections > SECTIONS_MAX {
        let what = "the number of sections of a commit record";
        return Err(WireError::TooLarge {
            what,
            value: sections as u64,
            limit: SECTIONS_MAX as u64,
        });
    }
    let record_bytes = HEAD_BYTES + sections * SECTION_BYTES;
    if u64::from(head.record_bytes.get()) != record_bytes as u64 {
        let problem = "its length is not that of its sections";
        return Err(WireError::Malformed { what: WHAT, problem });
    }
    if bytes.len() < record_bytes {
        return Err(WireError::Truncated(WHAT));
    }
    if bytes.len() > record_bytes {
        return Err(WireError::Trailing {
            what: WHAT,
            bytes: bytes.len() - record_bytes,
        });
    }
    let (expected, actual) = (head.crc.get(), record_crc(bytes));
    if expected != actual {
        return Err(WireError::RecordChecksum { expected, actual });
    }
    if head.epoch.get() == Epoch::NONE.0 {
        return Err(WireError::Malformed {
            what: WHAT,
            problem: "its epoch is 0",
        });
    }
    Ok(sections)
}

fn check_sections(sections: &[RawSection]) -> Result<(), WireError> {
    for section in sections {
        let section_type = section.section_type.get();
        let known = matches!(section_type, TYPE_PAGES | TYPE_DEVICE_STATE);
        if !known && section_type & OPTIONAL_BIT == 0 {
            return Err(WireError::UnknownSection(section_type));
        }
        if section.reserved.get() != 0 {
            return Err(WireError::Reserved("section of a commit record"));
        }
        if known && section.instance.get() != 0 {
            let problem = "memory and device state have one section each";
            return Err(WireError::Malformed { what: WHAT, problem });
        }
    }
    let place = |section: &RawSection| (section.section_type.get(), section.instance.get());
    if !sections.is_sorted_by(|a, b| place(a) < place(b)) {
        return Err(WireError::Malformed {
            what: WHAT,
            problem: "its sections are repeated or out of order",
        });
    }
    Ok(())
}

fn raw_section(section_type: u16, count: u64, digest: Digest) -> RawSection {
    RawSection {
        section_type: U16::new(section_type),
        reserved: U16::new(0),
        instance: U32::new(0),
        count: U64::new(count),
        digest: U128::new(digest.0),
    }
}

fn encode_raw(record: &CommitRecord, sections: &[RawSection]) -> Vec<u8> {
    let record_bytes = HEAD_BYTES + size_of_val(sections);
    let head = RawHead {
        magic: MAGIC,
        version: U16::new(RECORD_VERSION),
        sections: U16::new(u16::try_from(sections.len()).expect("a record has few sections")),
        record_bytes: U32::new(u32::try_from(record_bytes).expect("a record is short")),
        crc: U32::new(0),
        session: U128::new(record.session.0),
        epoch: U64::new(record.epoch.0),
        captured_ns: U64::new(record.captured_ns),
        image_digest: U128::new(record.image_digest.0),
    };
    let mut bytes = [head.as_bytes(), sections.as_bytes()].concat();
    let crc = record_crc(&bytes);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// CRC-32 of the record, taken with its own field as zero.
fn record_crc(record: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&record[..CRC_AT]);
    crc.update(&[0; 4]);
    crc.update(&record[CRC_AT + 4..]);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> CommitRecord {
        CommitRecord {
            session: Session(7),
            epoch: Epoch(9),
            captured_ns: 11,
            image_digest: Digest(13),
            pages: PagesSection {
                pages: 15,
                digest: Digest(17),
            },
            device_state: DeviceStateSection {
                bytes: 19,
                digest: Digest(21),
            },
        }
    }

    fn sections() -> Vec<RawSection> {
        vec![
            raw_section(TYPE_PAGES, 15, Digest(17)),
            raw_section(TYPE_DEVICE_STATE, 19, Digest(21)),
        ]
    }

    fn with(change: impl FnOnce(&mut Vec<RawSection>)) -> Result<CommitRecord, WireError> {
        let mut sections = sections();
        change(&mut sections);
        CommitRecord::decode(&encode_raw(&record(), &sections))
    }

    #[test]
    fn the_layout_on_the_wire_does_not_change() {
        let bytes = record().encode();
        assert_eq!(bytes.len(), 128);
        assert_eq!(bytes[..12], [b'R', b'M', b'C', b'R', 1, 0, 2, 0, 128, 0, 0, 0]);
        let numbers = [
            (16, 7),
            (32, 9),
            (40, 11),
            (48, 13),
            (64, 1),
            (72, 15),
            (80, 17),
            (96, 2),
            (104, 19),
        ];
        for (at, value) in numbers {
            assert_eq!(bytes[at], value, "byte {at}");
        }
        assert_eq!(CommitRecord::decode(&bytes), Ok(record()));
    }

    #[test]
    fn an_unknown_mandatory_section_is_named_and_an_optional_one_is_skipped() {
        let unknown = with(|sections| sections.push(raw_section(0x0042, 1, Digest(1))));
        assert_eq!(unknown, Err(WireError::UnknownSection(0x0042)));
        assert!(unknown.unwrap_err().to_string().contains("0x0042"));
        let optional = with(|sections| sections.push(raw_section(0x8042, 1, Digest(1))));
        assert_eq!(optional, Ok(record()));
    }

    #[test]
    fn missing_repeated_and_reordered_sections_are_refused() {
        assert_eq!(with(|s| s.truncate(0)), Err(WireError::MissingSection("pages")));
        assert_eq!(
            with(|s| s.truncate(1)),
            Err(WireError::MissingSection("device state"))
        );
        assert!(matches!(with(|s| s.push(s[1])), Err(WireError::Malformed { .. })));
        assert!(matches!(with(|s| s.reverse()), Err(WireError::Malformed { .. })));
        assert!(matches!(
            with(|s| s[0].instance = U32::new(1)),
            Err(WireError::Malformed { .. })
        ));
        assert!(matches!(
            with(|s| s[0].reserved = U16::new(1)),
            Err(WireError::Reserved(_))
        ));
    }

    #[test]
    fn the_number_of_sections_is_limited() {
        let fill = |count: u32| {
            with(|sections| {
                let optional = (2..count).map(|instance| RawSection {
                    instance: U32::new(instance),
                    ..raw_section(0x8000, 0, Digest(0))
                });
                sections.extend(optional);
            })
        };
        let most = u32::try_from(SECTIONS_MAX).unwrap();
        assert_eq!(fill(most), Ok(record()));
        assert!(matches!(fill(most + 1), Err(WireError::TooLarge { .. })));
    }

    #[test]
    fn another_version_and_epoch_zero_are_refused() {
        let mut bytes = record().encode().to_vec();
        bytes[4] = 2;
        assert_eq!(CommitRecord::decode(&bytes), Err(WireError::RecordVersion(2)));
        let none = encode_raw(
            &CommitRecord {
                epoch: Epoch::NONE,
                ..record()
            },
            &sections(),
        );
        assert!(matches!(
            CommitRecord::decode(&none),
            Err(WireError::Malformed { .. })
        ));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let good = record().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(CommitRecord::decode(&bad).is_err(), "bit {bit}");
        }
        for end in 0..good.len() {
            assert_eq!(
                CommitRecord::decode(&good[..end]),
                Err(WireError::Truncated(WHAT))
            );
        }
        let longer = [&good[..], &[0]].concat();
        assert_eq!(
            CommitRecord::decode(&longer),
            Err(WireError::Trailing { what: WHAT, bytes: 1 })
        );
    }
}
