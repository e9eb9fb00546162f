//! The ways in which a page can be encoded, and their numbers on the wire.

use romulus_types::PAGE_BYTES;

/// The bytes of one guest page.
pub type Page = [u8; PAGE_BYTES];

/// Longest payload of an encoded page, in bytes: that of [`Kind::Raw`].
pub const PAYLOAD_BYTES_MAX: usize = PAGE_BYTES;

/// How a page is encoded. The numbers are part of the wire format and are never reused; 0 is no kind, so that a
/// zeroed buffer does not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// All bytes are zero. No payload.
    Zero = 1,
    /// Equal to the previous version. No payload.
    Same = 2,
    /// Some 8-byte words replace those of the previous version. The payload is a mask of the words and the words.
    ///
    /// The words are the new values, not differences, so applying a delta twice gives the same page.
    Delta = 3,
    /// The LZ4 block of the page XORed with its previous version.
    XorLz4 = 4,
    /// The LZ4 block of the page.
    Lz4 = 5,
    /// The page itself, [`PAGE_BYTES`] bytes.
    Raw = 6,
}

/// A kind number that this version does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "page encoding {0} is unknown; the two hosts run different versions of Romulus, or the data is damaged"
)]
pub struct UnknownKind(pub u8);

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 6] = [
        Self::Zero,
        Self::Same,
        Self::Delta,
        Self::XorLz4,
        Self::Lz4,
        Self::Raw,
    ];

    /// The number on the wire.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Same => "same",
            Self::Delta => "delta",
            Self::XorLz4 => "xor_lz4",
            Self::Lz4 => "lz4",
            Self::Raw => "raw",
        }
    }

    /// Whether decoding needs the page's previous version.
    pub const fn needs_previous(self) -> bool {
        matches!(self, Self::Same | Self::Delta | Self::XorLz4)
    }
}

impl TryFrom<u8> for Kind {
    type Error = UnknownKind;

    fn try_from(number: u8) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.number() == number)
            .ok_or(UnknownKind(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_the_wire_do_not_change() {
        let numbers: Vec<u8> = Kind::ALL.into_iter().map(Kind::number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn exactly_the_known_numbers_are_kinds() {
        for number in 0..=u8::MAX {
            match Kind::try_from(number) {
                Ok(kind) => assert_eq!(kind.number(), number),
                Err(unknown) => assert_eq!(unknown, UnknownKind(number)),
            }
            assert_eq!(Kind::try_from(number).is_ok(), (1..=6).contains(&number));
        }
    }
}
