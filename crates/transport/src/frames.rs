//! Whole frames from a stream of bytes.

use std::time::Instant;

use bytes::Bytes;
use romulus_types::Session;
use romulus_wire::{Frame, FrameDecoder, FrameType, WireError};

use crate::connection::RecvStream;
use crate::error::TransportError;

/// Why no further frame comes.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream or its connection failed.
    #[error("the stream broke off")]
    Transport(#[from] TransportError),
    /// The peer sent something that is no frame of this session.
    #[error("the peer sent a frame that can't be taken")]
    Wire(#[from] WireError),
    /// The stream ended in the middle of a frame.
    #[error("the stream ended in the middle of a frame, with {0} bytes not yet used")]
    Cut(usize),
}

/// Reads frames. Holds at most one frame and one chunk of the stream.
#[derive(Debug)]
pub struct FrameReader {
    stream: RecvStream,
    decoder: FrameDecoder,
    chunk: Bytes,
    /// No frame came yet that ended in the chunk.
    chunk_is_new: bool,
    chunk_read: Instant,
}

impl FrameReader {
    /// For a stream of a known session.
    pub fn for_session(stream: RecvStream, session: Session) -> Self {
        Self {
            stream,
            decoder: FrameDecoder::for_session(session),
            chunk: Bytes::new(),
            chunk_is_new: false,
            chunk_read: Instant::now(),
        }
    }

    /// For a stream whose first frame must have this type and names the session.
    pub fn first_frame(stream: RecvStream, frame_type: FrameType) -> Self {
        Self {
            stream,
            decoder: FrameDecoder::first_frame(frame_type),
            chunk: Bytes::new(),
            chunk_is_new: false,
            chunk_read: Instant::now(),
        }
    }

    /// The next frame, `None` at the end of the stream. Cancel safe.
    ///
    /// # Errors
    /// [`FrameError`]; nothing further can be read then.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                if std::mem::take(&mut self.chunk_is_new) {
                    self.chunk_read = Instant::now();
                }
                return Ok(Some(frame));
            }
            if self.chunk.is_empty() {
                match self.stream.recv().await? {
                    Some(chunk) => (self.chunk, self.chunk_is_new) = (chunk, true),
                    None => return self.end(),
                }
            }
            let taken = self.decoder.push(&self.chunk);
            let _ = self.chunk.split_to(taken);
        }
    }

    /// When the last byte of the frame that [`next`](Self::next) gave last was taken from the connection: with it may have come
    /// frames that `next` gives later.
    pub fn received_at(&self) -> Instant {
        self.chunk_read
    }

    /// A header that was taken already counts as well: its payload is missing.
    fn end(&self) -> Result<Option<Frame>, FrameError> {
        match self.decoder.finish() {
            Ok(()) => Ok(None),
            Err(_) => Err(FrameError::Cut(self.decoder.buffered_bytes())),
        }
    }
}
