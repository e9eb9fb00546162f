//! The records of the log that the guest keeps on its disk: numbered, checksummed, and read back.
//!
//! ```text
//!   record of 4096 bytes: magic u64 | boot u64 | sequence u64 | written_at_ns u64 | filling | CRC-32 of all before, u32
//! ```
//! Record *n* lies in slot *n* modulo the number of slots. `boot` tells this boot's records from an earlier one's.

use core::fmt;

use crate::random::Random;

/// Size of a record, in bytes.
pub const RECORD_BYTES: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"ROMLOGv1");
const CRC_AT: usize = RECORD_BYTES - 4;
const HEAD_BYTES: usize = 32;

/// Why a record that was read back is not the one that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordError {
    /// Not a record at all.
    Magic(u64),
    /// Its checksum is wrong.
    Crc {
        /// The checksum that it carries.
        stored: u32,
        /// The checksum that it has.
        computed: u32,
    },
    /// A whole record, but another one.
    Other {
        /// The boot that wrote it.
        boot: u64,
        /// Its sequence number.
        sequence: u64,
    },
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordError::Magic(magic) => write!(f, "no record is there (it begins with {magic:#x})"),
            RecordError::Crc { stored, computed } => {
                write!(f, "its checksum is {computed:#x} instead of {stored:#x}")
            }
            RecordError::Other { boot, sequence } => {
                write!(f, "record {sequence} of boot {boot:#x} is there")
            }
        }
    }
}

/// Writes record `sequence` of boot `boot` into `record`.
pub fn write(record: &mut [u8; RECORD_BYTES], boot: u64, sequence: u64, now_ns: u64) {
    for (field, value) in record.chunks_exact_mut(8).zip([MAGIC, boot, sequence, now_ns]) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    let mut random = Random::new(boot ^ sequence);
    for word in record[HEAD_BYTES..CRC_AT].chunks_mut(8) {
        let bytes = random.number().to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
    let crc = crc32fast::hash(&record[..CRC_AT]);
    record[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

/// Looks whether `record` is record `sequence` of boot `boot`.
///
/// # Errors
/// [`RecordError`] when it is not.
pub fn check(record: &[u8; RECORD_BYTES], boot: u64, sequence: u64) -> Result<(), RecordError> {
    let word = |index: usize| {
        record[index * 8..]
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    if word(0) != MAGIC {
        return Err(RecordError::Magic(word(0)));
    }
    let stored = record.last_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let computed = crc32fast::hash(&record[..CRC_AT]);
    if stored != computed {
        return Err(RecordError::Crc { stored, computed });
    }
    if (word(1), word(2)) != (boot, sequence) {
        return Err(RecordError::Other {
            boot: word(1),
            sequence: word(2),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn another_record_is_told_from_the_one_wanted() {
        let mut record = [0; RECORD_BYTES];
        assert_eq!(check(&record, 1, 2), Err(RecordError::Magic(0)));
        write(&mut record, 1, 2, 3);
        assert_eq!(check(&record, 1, 2), Ok(()));
        assert_eq!(
            check(&record, 1, 3),
            Err(RecordError::Other { boot: 1, sequence: 2 })
        );
        assert_eq!(
            check(&record, 2, 2),
            Err(RecordError::Other { boot: 1, sequence: 2 })
        );
    }

    proptest! {
        #[test]
        fn a_single_flipped_bit_is_found(at in 0..RECORD_BYTES, bit in 0..8_u32, boot: u64, sequence: u64) {
            let mut record = [0; RECORD_BYTES];
            write(&mut record, boot, sequence, 99);
            record[at] ^= 1_u8 << bit;
            prop_assert!(check(&record, boot, sequence).is_err());
        }
    }
}
