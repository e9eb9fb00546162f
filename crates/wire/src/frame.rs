//! The fixed header of every frame.
//!
//! ```text
//!    0        4        6        8              12             16                  32         36         40
//!   | "RMLS" | version | type   | payload bytes | payload CRC | session (128 bit) | reserved | hdr. CRC |
//! ```
//!
//! All little-endian. The header has a CRC of its own, over its first 36 bytes, so that a damaged length is found when
//! the header is there, and not after waiting for a payload that never comes. As it covers the payload's CRC, the
//! two together cover the whole frame.

use bytes::{BufMut, Bytes, BytesMut};
use romulus_types::Session;
use zerocopy::little_endian::{U16, U32, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::WireError;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"RMLS";
/// Version of the wire format. A peer of another version is refused.
pub const VERSION: u16 = 1;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 40;
/// Most bytes of any frame's payload.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Most bytes of a frame, with its header.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + PAYLOAD_BYTES_MAX;
/// This bit in a frame's type says that a receiver who does not know the type skips the frame.
pub const OPTIONAL_BIT: u16 = 0x8000;

const UNKNOWN_OPTIONAL_BYTES_MAX: usize = 64 << 10;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    frame_type: U16,
    payload_bytes: U32,
    payload_crc: U32,
    session: U128,
    reserved: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// What a frame holds. The numbers are part of the wire format and are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FrameType {
    /// A control message of the pair: acks, heartbeats and the like.
    Control = 1,
    /// Opens a session and describes the machine.
    Hello = 2,
    /// Pages of a checkpoint.
    Pages = 3,
    /// A piece of a checkpoint's device state.
    DeviceState = 4,
    /// The commit record of a checkpoint.
    Commit = 5,
    /// A request to the witness.
    WitnessRequest = 6,
    /// The witness's answer.
    WitnessReply = 7,
    /// Hashes of the pages that a backup holds from an earlier session.
    HeldPages = 8,
}

impl FrameType {
    /// Every type, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Control,
        Self::Hello,
        Self::Pages,
        Self::DeviceState,
        Self::Commit,
        Self::WitnessRequest,
        Self::WitnessReply,
        Self::HeldPages,
    ];

    /// The number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// The name in errors, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Hello => "hello",
            Self::Pages => "pages",
            Self::DeviceState => "device state",
            Self::Commit => "commit",
            Self::WitnessRequest => "witness request",
            Self::WitnessReply => "witness reply",
            Self::HeldPages => "held pages",
        }
    }

    /// Most bytes of such a frame's payload.
    pub const fn payload_bytes_max(self) -> usize {
        match self {
            Self::Hello | Self::Pages | Self::DeviceState | Self::HeldPages => PAYLOAD_BYTES_MAX,
            Self::Control | Self::WitnessRequest | Self::WitnessReply => 64 << 10,
            Self::Commit => crate::COMMIT_BYTES_MAX,
        }
    }

    fn from_number(number: u16) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|frame_type| frame_type.number() == number)
    }
}

/// A frame that was received whole and whose checksums, version and session are right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it holds.
    pub frame_type: FrameType,
    /// The session that it belongs to.
    pub session: Session,
    /// What it holds, as bytes.
    pub payload: Bytes,
}

/// A header whose checksum, version, type and length are right. For callers that read header and payload
/// themselves; others use [`FrameDecoder`](crate::FrameDecoder).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    frame_type: Option<FrameType>,
    session: Session,
    payload_bytes: usize,
    payload_crc: u32,
}

impl FrameHeader {
    /// Reads a header. `session` is the one that the frame has to belong to, or `None` while that is not known.
    ///
    /// # Errors
    /// [`WireError`] names what is wrong with it: magic, version, checksum, reserved field, session, type or length.
    pub fn parse(bytes: &[u8; HEADER_BYTES], session: Option<Session>) -> Result<Self, WireError> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if raw.magic != MAGIC {
            return Err(WireError::Magic(raw.magic));
        }
        // Before the checksum: another version may keep it elsewhere, and deserves to be named.
        if raw.version.get() != VERSION {
            return Err(WireError::Version(raw.version.get()));
        }
        let (expected, actual) = (raw.header_crc.get(), header_crc(bytes));
        if expected != actual {
            return Err(WireError::HeaderChecksum { expected, actual });
        }
        if raw.reserved.get() != 0 {
            return Err(WireError::Reserved("frame header"));
        }
        let actual = Session(raw.session.get());
        if let Some(expected) = session
            && expected != actual
        {
            return Err(WireError::Session { expected, actual });
        }
        let number = raw.frame_type.get();
        let frame_type = FrameType::from_number(number);
        if frame_type.is_none() && number & OPTIONAL_BIT == 0 {
            return Err(WireError::UnknownFrame(number));
        }
        let limit = frame_type.map_or(UNKNOWN_OPTIONAL_BYTES_MAX, FrameType::payload_bytes_max);
        let value = u64::from(raw.payload_bytes.get());
        let payload_bytes = usize::try_from(value)
            .ok()
            .filter(|bytes| *bytes <= limit)
            .ok_or(WireError::TooLarge {
                what: "the payload of a frame",
                value,
                limit: limit as u64,
            })?;
        Ok(Self {
            frame_type,
            session: actual,
            payload_bytes,
            payload_crc: raw.payload_crc.get(),
        })
    }

    /// What the frame holds, or `None` for an optional frame that this version does not know and skips.
    pub const fn frame_type(&self) -> Option<FrameType> {
        self.frame_type
    }

    /// The session that the frame belongs to.
    pub const fn session(&self) -> Session {
        self.session
    }

    /// Bytes that follow the header.
    pub const fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Checks the payload that came with this header. `None` for an optional frame that is to be skipped.
    ///
    /// # Errors
    /// [`WireError::PayloadChecksum`] when it is damaged.
    ///
    /// # Panics
    /// When the caller passes another number of bytes than [`Self::payload_bytes`].
    pub fn complete(self, payload: Bytes) -> Result<Option<Frame>, WireError> {
        assert_eq!(
            payload.len(),
            self.payload_bytes,
            "a header is completed by its own payload"
        );
        let actual = crc32fast::hash(&payload);
        if actual != self.payload_crc {
            let frame = self.frame_type.map_or("skipped", FrameType::name);
            return Err(WireError::PayloadChecksum {
                frame,
                expected: self.payload_crc,
                actual,
            });
        }
        let frame = |frame_type| Frame {
            frame_type,
            session: self.session,
            payload,
        };
        Ok(self.frame_type.map(frame))
    }
}

fn header_crc(header: &[u8; HEADER_BYTES]) -> u32 {
    crc32fast::hash(&header[..HEADER_BYTES - size_of::<U32>()])
}

/// The header that belongs to a payload.
///
/// # Panics
/// When the payload is over the limit of its type: our own parts know their limits.
pub(crate) fn header(frame_type: FrameType, session: Session, payload: &[u8]) -> [u8; HEADER_BYTES] {
    let limit = frame_type.payload_bytes_max();
    assert!(
        payload.len() <= limit,
        "a {} frame holds at most {limit} bytes",
        frame_type.name()
    );
    raw_header(frame_type.number(), session, payload)
}

pub(crate) fn raw_header(frame_type: u16, session: Session, payload: &[u8]) -> [u8; HEADER_BYTES] {
    let raw = RawHeader {
        magic: MAGIC,
        version: U16::new(VERSION),
        frame_type: U16::new(frame_type),
        payload_bytes: U32::new(u32::try_from(payload.len()).expect("the limits fit in 32 bits")),
        payload_crc: U32::new(crc32fast::hash(payload)),
        session: U128::new(session.0),
        reserved: U32::new(0),
        header_crc: U32::new(0),
    };
    let mut bytes: [u8; HEADER_BYTES] = zerocopy::transmute!(raw);
    let crc = header_crc(&bytes);
    bytes[HEADER_BYTES - size_of::<U32>()..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// A whole frame: header and payload.
///
/// # Panics
/// When the payload is over [`FrameType::payload_bytes_max`].
pub fn encode_frame(frame_type: FrameType, session: Session, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEADER_BYTES + payload.len());
    frame.put_slice(&header(frame_type, session, payload));
    frame.put_slice(payload);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: Session = Session(0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100);

    fn parse(frame: &[u8]) -> Result<FrameHeader, WireError> {
        FrameHeader::parse(frame[..HEADER_BYTES].try_into().unwrap(), Some(SESSION))
    }

    #[test]
    fn the_layout_on_the_wire_does_not_change() {
        let frame = encode_frame(FrameType::Commit, SESSION, b"123456789");
        assert_eq!(frame[..4], *b"RMLS");
        assert_eq!(frame[4..12], [1, 0, 5, 0, 9, 0, 0, 0]);
        // The check value of CRC-32 (the one of Ethernet and zlib).
        assert_eq!(frame[12..16], 0xcbf4_3926_u32.to_le_bytes());
        assert_eq!(
            frame[16..32],
            std::array::from_fn::<u8, 16, _>(|i| u8::try_from(i).unwrap())
        );
        assert_eq!(frame[32..36], [0; 4]);
        assert_eq!(frame[36..40], crc32fast::hash(&frame[..36]).to_le_bytes());
        assert_eq!(frame[40..], *b"123456789");
    }

    #[test]
    fn numbers_on_the_wire_do_not_change() {
        let numbers: Vec<u16> = FrameType::ALL.into_iter().map(FrameType::number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn a_payload_over_the_limit_of_its_type_is_refused_by_the_header_alone() {
        for frame_type in FrameType::ALL {
            let limit = frame_type.payload_bytes_max();
            let fits = raw_header(frame_type.number(), SESSION, &vec![0; limit]);
            assert_eq!(parse(&fits).unwrap().payload_bytes(), limit);
            let over = raw_header(frame_type.number(), SESSION, &vec![0; limit + 1]);
            assert!(
                matches!(parse(&over), Err(WireError::TooLarge { .. })),
                "{}",
                frame_type.name()
            );
        }
        let over = raw_header(0x8fff, SESSION, &vec![0; UNKNOWN_OPTIONAL_BYTES_MAX + 1]);
        assert!(matches!(parse(&over), Err(WireError::TooLarge { .. })));
    }

    #[test]
    fn another_version_is_named_before_anything_else_is_read() {
        let mut frame = encode_frame(FrameType::Control, SESSION, b"").to_vec();
        frame[4] = 2;
        assert_eq!(parse(&frame), Err(WireError::Version(2)));
        assert!(parse(&frame).unwrap_err().to_string().contains("version 2"));
    }

    #[test]
    fn an_unknown_mandatory_frame_is_named_and_an_optional_one_is_known_as_such() {
        assert_eq!(
            parse(&raw_header(0x0123, SESSION, b"")),
            Err(WireError::UnknownFrame(0x0123))
        );
        assert!(WireError::UnknownFrame(0x0123).to_string().contains("0x0123"));
        let header = parse(&raw_header(0x8123, SESSION, b"new")).unwrap();
        assert_eq!(header.frame_type(), None);
        assert_eq!(header.complete(Bytes::from_static(b"new")), Ok(None));
    }

    #[test]
    fn a_reserved_field_that_is_set_is_refused() {
        let mut header = raw_header(1, SESSION, b"");
        header[33] = 1;
        let crc = header_crc(&header);
        header[36..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(parse(&header), Err(WireError::Reserved("frame header")));
    }
}
