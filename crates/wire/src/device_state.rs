//! The device state of a checkpoint: one opaque blob, in chunks of at most one frame.
//!
//! ```text
//!   payload   epoch u64 | total u32 | offset u32 | bytes
//! ```
//!
//! Chunks come in order, without gaps. A blob without bytes has no chunk.

use bytes::{BufMut, Bytes, BytesMut};
use romulus_types::{Digest, Epoch, Session};
use xxhash_rust::xxh3::xxh3_128;

use crate::commit::DeviceStateSection;
use crate::error::WireError;
use crate::frame::{Frame, FrameType, PAYLOAD_BYTES_MAX, encode_frame};
use crate::message::expect_type;

/// Most bytes of a device state: 64 MiB.
pub const DEVICE_STATE_BYTES_MAX: usize = 64 << 20;

const WHAT: &str = "device state chunk";
const HEAD_BYTES: usize = 16;
const CHUNK_BYTES: usize = PAYLOAD_BYTES_MAX - HEAD_BYTES;

/// What the commit record says about this device state.
pub fn device_state_section(state: &[u8]) -> DeviceStateSection {
    DeviceStateSection {
        bytes: state.len() as u64,
        digest: Digest(xxh3_128(state)),
    }
}

/// The frames that carry a device state, in order.
///
/// # Errors
/// [`WireError::TooLarge`] when it has more than [`DEVICE_STATE_BYTES_MAX`] bytes.
pub fn device_state_frames(
    session: Session,
    epoch: Epoch,
    state: &[u8],
) -> Result<impl Iterator<Item = Bytes>, WireError> {
    let total = check_total(state.len() as u64)?;
    Ok(state.chunks(CHUNK_BYTES).enumerate().map(move |(number, chunk)| {
        let offset = u32::try_from(number * CHUNK_BYTES).expect("the offset is below the total");
        let mut payload = BytesMut::with_capacity(HEAD_BYTES + chunk.len());
        payload.put_u64_le(epoch.0);
        payload.put_u32_le(total);
        payload.put_u32_le(offset);
        payload.put_slice(chunk);
        encode_frame(FrameType::DeviceState, session, &payload)
    }))
}

fn check_total(total: u64) -> Result<u32, WireError> {
    let limit = DEVICE_STATE_BYTES_MAX as u64;
    u32::try_from(total)
        .ok()
        .filter(|_| total <= limit)
        .ok_or(WireError::TooLarge {
            what: "the length of the device state",
            value: total,
            limit,
        })
}

/// One piece of a device state, checked against its own total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStateChunk<'a> {
    /// The epoch whose checkpoint it belongs to.
    pub epoch: Epoch,
    /// Bytes of the whole device state.
    pub total: u32,
    /// Where in it this piece begins.
    pub offset: u32,
    /// The piece, at least one byte.
    pub bytes: &'a [u8],
}

impl<'a> DeviceStateChunk<'a> {
    /// Checks a frame.
    ///
    /// # Errors
    /// [`WireError`] when it holds something else, is cut off or empty, or reaches past the total or the total past its
    /// limit.
    pub fn parse(frame: &'a Frame) -> Result<Self, WireError> {
        expect_type(FrameType::DeviceState, frame)?;
        let (head, bytes) = frame
            .payload
            .split_first_chunk::<HEAD_BYTES>()
            .ok_or(WireError::Truncated(WHAT))?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 of 16 bytes"));
        let epoch = Epoch(u64::from_le_bytes(head[..8].try_into().expect("8 of 16 bytes")));
        let total = check_total(u64::from(word(8)))?;
        let offset = word(12);
        if bytes.is_empty() {
            return Err(WireError::Malformed {
                what: WHAT,
                problem: "it has no bytes",
            });
        }
        let end = u64::from(offset) + bytes.len() as u64;
        if end > u64::from(total) {
            let what = "the end of a chunk of the device state";
            return Err(WireError::TooLarge {
                what,
                value: end,
                limit: u64::from(total),
            });
        }
        Ok(Self {
            epoch,
            total,
            offset,
            bytes,
        })
    }
}

/// Puts the chunks of one device state together. Holds at most as much memory as the chunks' total says, and sets it
/// aside as bytes arrive, not when they are promised.
#[derive(Debug)]
pub struct DeviceStateAssembler {
    epoch: Epoch,
    total: Option<u32>,
    state: Vec<u8>,
}

impl DeviceStateAssembler {
    /// Waits for the first chunk of `epoch`.
    pub fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            total: None,
            state: Vec::new(),
        }
    }

    /// Bytes received so far.
    pub fn bytes(&self) -> usize {
        self.state.len()
    }

    /// Adds the next chunk.
    ///
    /// # Errors
    /// [`WireError`] when the chunk belongs to another epoch, does not continue the one before, or tells another total.
    pub fn push(&mut self, chunk: DeviceStateChunk<'_>) -> Result<(), WireError> {
        if chunk.epoch != self.epoch {
            let what = "a chunk of the device state";
            return Err(WireError::Epoch {
                what,
                expected: self.epoch,
                actual: chunk.epoch,
            });
        }
        if *self.total.get_or_insert(chunk.total) != chunk.total {
            return Err(WireError::Malformed {
                what: WHAT,
                problem: "its total is not that of the first chunk",
            });
        }
        let (expected, actual) = (self.state.len() as u64, u64::from(chunk.offset));
        if expected != actual {
            return Err(WireError::ChunkOrder {
                epoch: self.epoch,
                expected,
                actual,
            });
        }
        let needed = self.state.len() + chunk.bytes.len();
        if needed > self.state.capacity() {
            // Doubling, as a vector does, but never past the total, which the chunk's end was checked against.
            let total = usize::try_from(chunk.total).expect("the total is at most 64 MiB");
            let capacity = needed.max(self.state.len() * 2).min(total);
            self.state.reserve_exact(capacity - self.state.len());
        }
        self.state.extend_from_slice(chunk.bytes);
        Ok(())
    }

    /// The whole device state, if it is the one that the commit record names.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when chunks are missing, [`WireError::Malformed`] when it is another one.
    pub fn finish(self, expected: &DeviceStateSection) -> Result<Vec<u8>, WireError> {
        let total = self.total.map_or(0, u64::from);
        if (self.state.len() as u64) < total.max(expected.bytes) {
            return Err(WireError::Truncated("device state"));
        }
        if device_state_section(&self.state) != *expected {
            let problem = "it is not the one that the commit record names";
            return Err(WireError::Malformed {
                what: "device state",
                problem,
            });
        }
        Ok(self.state)
    }
}
