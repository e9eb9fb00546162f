//! Cuts a stream of bytes into frames.
//!
//! ```text
//!   for_session(s) ───────────────────────────────► frames of session s
//!   first_frame(t) ──first frame is a t: adopt its session──►  … the same
//!         any error ──► the same error for ever: a stream that lost its step is not to be trusted again
//! ```

use bytes::{Buf, Bytes, BytesMut};
use romulus_types::Session;

use crate::error::WireError;
use crate::frame::{FRAME_BYTES_MAX, Frame, FrameHeader, FrameType, HEADER_BYTES};

/// Most bytes that a decoder holds back.
pub const BUFFER_BYTES_MAX: usize = FRAME_BYTES_MAX;

/// Room beyond a frame for what the chunk with its end brings of the next one.
const BEYOND_BYTES: usize = 8 << 10;

#[derive(Debug)]
enum Expect {
    FirstFrame(FrameType),
    Session(Session),
}

/// Cuts the bytes of one stream into frames, and refuses everything else as soon as it is seen.
///
/// Call [`push`](Self::push) with what was read, then [`next_frame`](Self::next_frame) until it has no more, and
/// push the rest if `push` did not take all. It holds at most [`BUFFER_BYTES_MAX`] bytes.
#[derive(Debug)]
pub struct FrameDecoder {
    expect: Expect,
    buffer: BytesMut,
    header: Option<FrameHeader>,
    failed: Option<WireError>,
    skipped_frames: u64,
}

impl FrameDecoder {
    /// For a stream of a known session: frames of any other are refused.
    pub fn for_session(session: Session) -> Self {
        Self::new(Expect::Session(session))
    }

    /// For a stream whose session is not known: its first frame must have this type and names the session.
    pub fn first_frame(frame_type: FrameType) -> Self {
        Self::new(Expect::FirstFrame(frame_type))
    }

    fn new(expect: Expect) -> Self {
        Self {
            expect,
            buffer: BytesMut::new(),
            header: None,
            failed: None,
            skipped_frames: 0,
        }
    }

    /// The session of the stream, once it is known.
    pub fn session(&self) -> Option<Session> {
        match self.expect {
            Expect::Session(session) => Some(session),
            Expect::FirstFrame(_) => None,
        }
    }

    /// Optional frames that this version does not know and skipped.
    pub fn skipped_frames(&self) -> u64 {
        self.skipped_frames
    }

    /// Bytes held back: the beginning of a frame that is not whole yet, and frames not yet asked for.
    pub fn buffered_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Takes bytes that were read, and returns how many. It takes fewer when the buffer is full; then
    /// [`next_frame`](Self::next_frame) has a frame or an error, which makes room.
    #[must_use = "bytes that were not taken have to be pushed again"]
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        if self.failed.is_some() {
            return bytes.len();
        }
        let taken = bytes.len().min(BUFFER_BYTES_MAX - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// The next whole frame, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`WireError`] for the first thing that is wrong with the stream, and the same one from then on.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let next = self.try_next_frame();
        if let Err(error) = &next {
            self.failed = Some(error.clone());
            self.buffer = BytesMut::new();
        }
        next
    }

    /// To be called when the peer has closed the stream.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when it ends in the middle of a frame.
    pub fn finish(&self) -> Result<(), WireError> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None if self.buffer.is_empty() && self.header.is_none() => Ok(()),
            None => Err(WireError::Truncated("frame")),
        }
    }

    fn try_next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        loop {
            let header = match self.header {
                Some(header) => header,
                None => match self.take_header()? {
                    Some(header) => header,
                    None => return Ok(None),
                },
            };
            let Some(payload) = self.take(header.payload_bytes()) else {
                return Ok(None);
            };
            self.header = None;
            if let Some(frame) = header.complete(payload)? {
                self.expect = Expect::Session(frame.session);
                return Ok(Some(frame));
            }
            self.skipped_frames += 1;
        }
    }

    fn take_header(&mut self) -> Result<Option<FrameHeader>, WireError> {
        let Some(bytes) = self.buffer.first_chunk::<HEADER_BYTES>() else {
            return self.check_magic().map(|()| None);
        };
        let header = FrameHeader::parse(bytes, self.session())?;
        if let Expect::FirstFrame(expected) = self.expect
            && header.frame_type() != Some(expected)
        {
            let actual = header.frame_type().map_or("unknown optional", FrameType::name);
            return Err(WireError::FirstFrame {
                expected: expected.name(),
                actual,
            });
        }
        self.buffer.advance(HEADER_BYTES);
        // In one piece from the beginning: a buffer that grows with what comes is copied each time.
        let missing_bytes = header.payload_bytes().saturating_sub(self.buffer.len());
        if missing_bytes > 0 {
            self.buffer.reserve(missing_bytes + BEYOND_BYTES);
        }
        self.header = Some(header);
        Ok(Some(header))
    }

    /// Refuses a peer that speaks something else without waiting for a whole header.
    fn check_magic(&self) -> Result<(), WireError> {
        match self.buffer.first_chunk() {
            Some(first) if *first != crate::MAGIC => Err(WireError::Magic(*first)),
            _ => Ok(()),
        }
    }

    fn take(&mut self, bytes: usize) -> Option<Bytes> {
        if self.buffer.len() < bytes {
            return None;
        }
        Some(self.buffer.split_to(bytes).freeze())
    }
}
