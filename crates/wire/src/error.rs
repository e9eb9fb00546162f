//! Everything that can be wrong with received bytes.

use romulus_types::{Epoch, Session};

/// Why received bytes were refused, or a message of our own can't be sent. The connection they came from has to be
/// closed; the last commit stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The stream does not begin with a frame.
    #[error(
        "this is not Romulus' protocol (the first bytes are {0:02x?}); check the address and port of the peer"
    )]
    Magic([u8; 4]),
    /// The peer speaks another version.
    #[error("the peer speaks wire version {0}, this side speaks {ours}; run the same Romulus version on both hosts",
        ours = crate::VERSION)]
    Version(u16),
    /// The header does not match its checksum.
    #[error("a frame's header is damaged (its CRC-32 is {actual:08x}, not {expected:08x})")]
    HeaderChecksum {
        /// CRC-32 in the header.
        expected: u32,
        /// CRC-32 of the header.
        actual: u32,
    },
    /// The payload does not match its checksum.
    #[error("the payload of a {frame} frame is damaged (its CRC-32 is {actual:08x}, not {expected:08x})")]
    PayloadChecksum {
        /// The frame's type.
        frame: &'static str,
        /// CRC-32 in the header.
        expected: u32,
        /// CRC-32 of the payload.
        actual: u32,
    },
    /// The frame belongs to another session: a replay, or a peer that restarted.
    #[error("a frame of session {actual} came in session {expected}; the peer has to connect again")]
    Session {
        /// The session of this connection.
        expected: Session,
        /// The session that the frame names.
        actual: Session,
    },
    /// A mandatory frame of a type that this version does not know.
    #[error("frame type {0:#06x} is mandatory and unknown here; run the same Romulus version on both hosts")]
    UnknownFrame(u16),
    /// A field that must be zero in this version is not.
    #[error("a reserved field of a {0} is not zero; run the same Romulus version on both hosts")]
    Reserved(&'static str),
    /// The connection began with another frame than the one that has to come first.
    #[error("the connection began with a {actual} frame instead of a {expected} frame")]
    FirstFrame {
        /// What has to come first.
        expected: &'static str,
        /// What came.
        actual: &'static str,
    },
    /// A frame that holds something else was handed to a decoder.
    #[error("a {actual} frame came where a {expected} frame is due")]
    UnexpectedFrame {
        /// What was to come.
        expected: &'static str,
        /// What came.
        actual: &'static str,
    },
    /// A length or a count over its limit.
    #[error("{what} is {value}, over the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The bytes end before the value does.
    #[error("a {0} is cut off")]
    Truncated(&'static str),
    /// There are bytes after the value.
    #[error("a {what} has {bytes} bytes too many")]
    Trailing {
        /// What was decoded.
        what: &'static str,
        /// Bytes left over.
        bytes: usize,
    },
    /// A value that is not allowed, or not in its one allowed form.
    #[error("a {what} is malformed: {problem}")]
    Malformed {
        /// What was decoded.
        what: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A message that can't be decoded as its type, or that can't be encoded.
    #[error("a {what} message can't be read or written")]
    Message {
        /// The frame's type.
        what: &'static str,
        /// What postcard found.
        #[source]
        source: postcard::Error,
    },
    /// A commit record in another version's layout.
    #[error("a commit record has version {0}, this side knows {ours}; run the same Romulus version on both hosts",
        ours = crate::RECORD_VERSION)]
    RecordVersion(u16),
    /// The commit record does not match its checksum.
    #[error("a commit record is damaged (its CRC-32 is {actual:08x}, not {expected:08x})")]
    RecordChecksum {
        /// CRC-32 in the record.
        expected: u32,
        /// CRC-32 of the record.
        actual: u32,
    },
    /// A mandatory section of a commit record that this version does not know.
    #[error(
        "section type {0:#06x} of a commit record is mandatory and unknown here; run the same Romulus version on both hosts"
    )]
    UnknownSection(u16),
    /// A section that every commit record has is not there.
    #[error("a commit record has no {0} section")]
    MissingSection(&'static str),
    /// A chunk of a device state that does not continue what came before.
    #[error("a chunk of the device state of epoch {epoch} begins at byte {actual} instead of {expected}")]
    ChunkOrder {
        /// The chunk's epoch.
        epoch: Epoch,
        /// Where the next chunk has to begin.
        expected: u64,
        /// Where this one begins.
        actual: u64,
    },
    /// Data of another epoch than the one being received.
    #[error("{what} of epoch {actual} came in the middle of epoch {expected}")]
    Epoch {
        /// What came.
        what: &'static str,
        /// The epoch being received.
        expected: Epoch,
        /// The epoch of what came.
        actual: Epoch,
    },
}

impl WireError {
    /// A short stable name, for the label of a metric.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Magic(_) => "magic",
            Self::Version(_) => "version",
            Self::HeaderChecksum { .. } => "header_checksum",
            Self::PayloadChecksum { .. } => "payload_checksum",
            Self::Session { .. } => "session",
            Self::UnknownFrame(_) => "unknown_frame",
            Self::Reserved(_) => "reserved",
            Self::FirstFrame { .. } => "first_frame",
            Self::UnexpectedFrame { .. } => "unexpected_frame",
            Self::TooLarge { .. } => "too_large",
            Self::Truncated(_) => "truncated",
            Self::Trailing { .. } => "trailing",
            Self::Malformed { .. } => "malformed",
            Self::Message { .. } => "message",
            Self::RecordVersion(_) => "record_version",
            Self::RecordChecksum { .. } => "record_checksum",
            Self::UnknownSection(_) => "unknown_section",
            Self::MissingSection(_) => "missing_section",
            Self::ChunkOrder { .. } => "chunk_order",
            Self::Epoch { .. } => "epoch",
        }
    }
}
