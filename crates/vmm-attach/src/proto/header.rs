//! The 16 bytes before every message. They are the same in every version of the protocol, for ever.

use super::ProtoError;

/// The first bytes of every message.
pub const MAGIC: [u8; 4] = *b"RATT";
/// Length of the header.
pub const HEADER_BYTES: usize = 16;
/// Longest payload.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 10;

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version that both sides agreed on; before that, and in a refusal of a `Hello`, it means nothing.
    pub version: u16,
    /// Which message it is.
    pub kind: u16,
    /// Bytes of payload that follow, at most [`PAYLOAD_BYTES_MAX`].
    pub length: u32,
    /// The request's number, and that of its replies; 0 in an event.
    pub number: u32,
}

impl Header {
    /// As bytes.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`ProtoError::Magic`], or [`ProtoError::TooLong`] for a payload over the limit: nothing was allocated for it.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, ProtoError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes[..4] != MAGIC {
            return Err(ProtoError::Magic);
        }
        let header = Self {
            version: half(4),
            kind: half(6),
            length: word(8),
            number: word(12),
        };
        if header.length as usize > PAYLOAD_BYTES_MAX {
            return Err(ProtoError::TooLong(header.length));
        }
        Ok(header)
    }
}
