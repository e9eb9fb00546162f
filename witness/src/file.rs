//! The form of a file in the store: a value under a checksum.
//!
//! ```text
//!    0          8         12              16        20
//!   | kind (8) | version | payload bytes | CRC-32  | payload (postcard) |   little-endian, nothing after it
//! ```
//!
//! The CRC covers everything but itself. A file that is not exactly this is corrupt: it is refused, never guessed.

use serde::Serialize;
use serde::de::DeserializeOwned;

const VERSION: u32 = 1;
const HEAD_BYTES: usize = 20;
const CRC_AT: usize = 16;
/// Most bytes of a file: names are at most 64 bytes, and a record has three of them.
pub(crate) const FILE_BYTES_MAX: u64 = 4096;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Instance,
    Record,
}

impl Kind {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Instance => b"RMLSWINS",
            Self::Record => b"RMLSWREC",
        }
    }
}

/// Why a file is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Corrupt {
    #[error("it has {0} bytes, fewer or more than it says")]
    Length(usize),
    #[error("it begins like no such file")]
    Kind,
    #[error("it is of version {0}, this program knows {VERSION}: use the program that wrote it")]
    Version(u32),
    #[error("its checksum is wrong")]
    Checksum,
    #[error("its contents make no sense")]
    Payload,
}

/// The bytes of a file that holds `value`.
///
/// # Panics
/// When `value` is too long: ours are not.
pub(crate) fn encode<T: Serialize>(kind: Kind, value: &T) -> Vec<u8> {
    let payload = postcard::to_stdvec(value).expect("plain values are always encoded");
    let length = u32::try_from(payload.len()).expect("a file is at most FILE_BYTES_MAX long");
    let mut bytes = Vec::with_capacity(HEAD_BYTES + payload.len());
    bytes.extend_from_slice(kind.magic());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    let crc = checksum(&bytes, &payload);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&payload);
    assert!(
        bytes.len() as u64 <= FILE_BYTES_MAX,
        "a file is at most FILE_BYTES_MAX long"
    );
    bytes
}

/// The value in a file.
pub(crate) fn decode<T: DeserializeOwned>(kind: Kind, bytes: &[u8]) -> Result<T, Corrupt> {
    let Some((head, payload)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
        return Err(Corrupt::Length(bytes.len()));
    };
    let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
    if head[..8] != *kind.magic() {
        return Err(Corrupt::Kind);
    }
    if number(8) != VERSION {
        return Err(Corrupt::Version(number(8)));
    }
    if usize::try_from(number(12)) != Ok(payload.len()) {
        return Err(Corrupt::Length(bytes.len()));
    }
    if number(CRC_AT) != checksum(&head[..CRC_AT], payload) {
        return Err(Corrupt::Checksum);
    }
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        _ => Err(Corrupt::Payload),
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_flipped_or_lengthened_file_is_refused_at_every_byte() {
        let value = ("web".to_owned(), 42u64, u128::MAX);
        let bytes = encode(Kind::Record, &value);
        assert_eq!(decode::<(String, u64, u128)>(Kind::Record, &bytes), Ok(value));
        let decode = |bytes: &[u8]| decode::<(String, u64, u128)>(Kind::Record, bytes);
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "cut at {cut}");
            let mut zeroed = bytes.clone();
            zeroed[cut..].fill(0);
            assert!(zeroed == bytes || decode(&zeroed).is_err(), "zeroed from {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&flipped).is_err(), "bit {bit} flipped");
        }
        assert!(decode(&[bytes.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn one_kind_is_not_taken_for_the_other() {
        let bytes = encode(Kind::Instance, &1u8);
        assert_eq!(decode::<u8>(Kind::Record, &bytes), Err(Corrupt::Kind));
    }
}
