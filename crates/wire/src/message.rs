//! Messages of the caller's own types, as postcard in a frame.
//!
//! The message enums live with the state machines that use them. A type that is received here must not hold a
//! sequence of zero-sized elements: its length costs no bytes, so nothing would bound the work of reading it.

use bytes::Bytes;
use romulus_types::Session;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::WireError;
use crate::frame::{Frame, FrameType, encode_frame};

/// A frame with the message in it.
///
/// # Errors
/// [`WireError::TooLarge`] when the message is over the limit of `frame_type`, [`WireError::Message`] when it can't be
/// encoded.
///
/// # Panics
/// When `frame_type` is one that holds no message.
pub fn encode_message<T: Serialize>(
    frame_type: FrameType,
    session: Session,
    message: &T,
) -> Result<Bytes, WireError> {
    assert!(
        holds_message(frame_type),
        "a {} frame holds no message",
        frame_type.name()
    );
    let payload = postcard::to_stdvec(message).map_err(|source| WireError::Message {
        what: frame_type.name(),
        source,
    })?;
    let limit = frame_type.payload_bytes_max();
    if payload.len() > limit {
        let value = payload.len() as u64;
        return Err(WireError::TooLarge {
            what: "the length of a message",
            value,
            limit: limit as u64,
        });
    }
    Ok(encode_frame(frame_type, session, &payload))
}

/// The message in a frame, which must be of type `expected`.
///
/// # Errors
/// [`WireError`] when the frame has another type, the payload is no `T`, or there are bytes after it.
///
/// # Panics
/// When `expected` is a type that holds no message.
pub fn decode_message<T: DeserializeOwned>(expected: FrameType, frame: &Frame) -> Result<T, WireError> {
    assert!(
        holds_message(expected),
        "a {} frame holds no message",
        expected.name()
    );
    expect_type(expected, frame)?;
    let what = expected.name();
    let (message, rest) =
        postcard::take_from_bytes(&frame.payload).map_err(|source| WireError::Message { what, source })?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(WireError::Trailing {
            what,
            bytes: rest.len(),
        })
    }
}

/// [`encode_message`] for a control message.
///
/// # Errors
/// As [`encode_message`].
pub fn encode_control<T: Serialize>(session: Session, message: &T) -> Result<Bytes, WireError> {
    encode_message(FrameType::Control, session, message)
}

/// [`decode_message`] for a control message.
///
/// # Errors
/// As [`decode_message`].
pub fn decode_control<T: DeserializeOwned>(frame: &Frame) -> Result<T, WireError> {
    decode_message(FrameType::Control, frame)
}

const fn holds_message(frame_type: FrameType) -> bool {
    matches!(
        frame_type,
        FrameType::Control | FrameType::Hello | FrameType::WitnessRequest | FrameType::WitnessReply
    )
}

pub(crate) fn expect_type(expected: FrameType, frame: &Frame) -> Result<(), WireError> {
    if frame.frame_type == expected {
        return Ok(());
    }
    Err(WireError::UnexpectedFrame {
        expected: expected.name(),
        actual: frame.frame_type.name(),
    })
}
