//! A stream of bytes becomes exactly the frames that were sent, or an error with a name; never a panic.

use bytes::Bytes;
use proptest::prelude::*;
use romulus_types::Session;
use romulus_wire::{
    BUFFER_BYTES_MAX, FRAME_BYTES_MAX, Frame, FrameDecoder, FrameType, HEADER_BYTES, PAYLOAD_BYTES_MAX,
    WireError, decode_control, decode_message, encode_control, encode_frame, encode_message,
};
use serde::{Deserialize, Serialize};

const SESSION: Session = Session(0x5e55_1070);

fn seal(header: &mut [u8]) {
    let crc = crc32fast::hash(&header[..HEADER_BYTES - 4]);
    header[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

/// A frame of any type number, as a later version might send it.
fn frame_of_type(number: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = encode_frame(FrameType::Control, SESSION, payload).to_vec();
    frame[6..8].copy_from_slice(&number.to_le_bytes());
    seal(&mut frame);
    frame
}

fn drain(decoder: &mut FrameDecoder) -> Result<Vec<Frame>, WireError> {
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    Ok(frames)
}

fn decode_all(bytes: &[u8]) -> Result<Vec<Frame>, WireError> {
    let mut decoder = FrameDecoder::for_session(SESSION);
    let mut frames = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let taken = decoder.push(rest);
        rest = &rest[taken..];
        frames.extend(drain(&mut decoder)?);
    }
    decoder.finish()?;
    Ok(frames)
}

fn frame(frame_type: FrameType, payload: &[u8]) -> Frame {
    Frame {
        frame_type,
        session: SESSION,
        payload: Bytes::copy_from_slice(payload),
    }
}

#[test]
fn every_flipped_bit_of_a_frame_is_refused_without_waiting_for_more() {
    for payload in [&b""[..], b"the payload of a frame"] {
        let good = encode_frame(FrameType::Control, SESSION, payload);
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut decoder = FrameDecoder::for_session(SESSION);
            assert_eq!(decoder.push(&bad), bad.len());
            assert!(decoder.next_frame().is_err(), "bit {bit}");
        }
    }
}

#[test]
fn a_frame_that_is_cut_off_anywhere_asks_for_more() {
    let good = encode_frame(FrameType::Pages, SESSION, b"payload");
    for end in 0..good.len() {
        let mut decoder = FrameDecoder::for_session(SESSION);
        assert_eq!(decoder.push(&good[..end]), end);
        assert_eq!(decoder.next_frame(), Ok(None));
        let at_the_end = if end == 0 {
            Ok(())
        } else {
            Err(WireError::Truncated("frame"))
        };
        assert_eq!(decoder.finish(), at_the_end, "{end} bytes");
        assert_eq!(decoder.push(&good[end..]), good.len() - end);
        assert_eq!(
            decoder.next_frame(),
            Ok(Some(frame(FrameType::Pages, b"payload")))
        );
        assert_eq!(decoder.finish(), Ok(()));
    }
}

#[test]
fn a_frame_replayed_from_another_session_is_refused() {
    let mut decoder = FrameDecoder::for_session(SESSION);
    let old = encode_frame(FrameType::Commit, Session(1), b"");
    assert_eq!(decoder.push(&old), old.len());
    assert_eq!(
        decoder.next_frame(),
        Err(WireError::Session {
            expected: SESSION,
            actual: Session(1)
        })
    );
}

#[test]
fn the_first_frame_names_the_session_and_later_ones_must_keep_to_it() {
    let mut decoder = FrameDecoder::first_frame(FrameType::Hello);
    assert_eq!(decoder.session(), None);
    let hello = encode_frame(FrameType::Hello, SESSION, b"hello");
    let other = encode_frame(FrameType::Hello, Session(1), b"hello");
    let both = [hello, other].concat();
    assert_eq!(decoder.push(&both), both.len());
    assert_eq!(decoder.next_frame(), Ok(Some(frame(FrameType::Hello, b"hello"))));
    assert_eq!(decoder.session(), Some(SESSION));
    assert!(matches!(decoder.next_frame(), Err(WireError::Session { .. })));
}

#[test]
fn a_connection_that_begins_with_another_frame_is_refused() {
    for first in [
        encode_frame(FrameType::Commit, SESSION, b"").to_vec(),
        frame_of_type(0x8001, b""),
    ] {
        let mut decoder = FrameDecoder::first_frame(FrameType::Hello);
        assert_eq!(decoder.push(&first), first.len());
        assert!(matches!(
            decoder.next_frame(),
            Err(WireError::FirstFrame {
                expected: "hello",
                ..
            })
        ));
    }
}

#[test]
fn another_protocol_is_refused_at_its_fourth_byte() {
    let mut decoder = FrameDecoder::for_session(SESSION);
    assert_eq!(decoder.push(b"GET"), 3);
    assert_eq!(decoder.next_frame(), Ok(None));
    assert_eq!(decoder.push(b" "), 1);
    assert_eq!(decoder.next_frame(), Err(WireError::Magic(*b"GET ")));
}

#[test]
fn after_an_error_nothing_is_accepted_or_kept() {
    let mut decoder = FrameDecoder::for_session(SESSION);
    let good = encode_frame(FrameType::Control, SESSION, b"x");
    let mut bad = good.to_vec();
    bad[HEADER_BYTES] ^= 1;
    assert_eq!(decoder.push(&bad), bad.len());
    let error = decoder.next_frame().unwrap_err();
    assert!(matches!(
        error,
        WireError::PayloadChecksum { frame: "control", .. }
    ));
    assert_eq!(decoder.push(&good), good.len());
    assert_eq!(decoder.buffered_bytes(), 0);
    assert_eq!(decoder.next_frame(), Err(error.clone()));
    assert_eq!(decoder.finish(), Err(error));
}

#[test]
fn unknown_optional_frames_are_skipped_and_counted_and_unknown_mandatory_ones_named() {
    let mut decoder = FrameDecoder::for_session(SESSION);
    let known = encode_frame(FrameType::Control, SESSION, b"known");
    let stream = [
        &frame_of_type(0x8123, b"new")[..],
        &frame_of_type(0xffff, b""),
        &known,
    ]
    .concat();
    assert_eq!(decoder.push(&stream), stream.len());
    assert_eq!(drain(&mut decoder), Ok(vec![frame(FrameType::Control, b"known")]));
    assert_eq!(decoder.skipped_frames(), 2);
    let mut damaged = frame_of_type(0x8123, b"new");
    *damaged.last_mut().unwrap() ^= 1;
    assert!(matches!(
        decode_all(&damaged),
        Err(WireError::PayloadChecksum { .. })
    ));
    assert_eq!(
        decode_all(&frame_of_type(0x7123, b"new")),
        Err(WireError::UnknownFrame(0x7123))
    );
}

#[test]
fn an_oversized_length_is_refused_before_its_payload_is_waited_for() {
    for bytes in [PAYLOAD_BYTES_MAX + 1, 1 << 30, u32::MAX as usize] {
        let mut header = encode_frame(FrameType::Hello, SESSION, b"").to_vec();
        header[8..12].copy_from_slice(&u32::try_from(bytes).unwrap().to_le_bytes());
        seal(&mut header);
        let limit = PAYLOAD_BYTES_MAX as u64;
        match decode_all(&header) {
            Err(WireError::TooLarge { value, limit: l, .. }) => assert_eq!((value, l), (bytes as u64, limit)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_buffer_is_bounded_whatever_is_pushed() {
    let mut decoder = FrameDecoder::for_session(SESSION);
    let largest = encode_frame(FrameType::Pages, SESSION, &vec![7; PAYLOAD_BYTES_MAX]);
    assert_eq!(largest.len(), FRAME_BYTES_MAX);
    let stream = [&largest[..], &largest, &largest].concat();
    let (mut rest, mut frames) = (&stream[..], 0);
    while !rest.is_empty() {
        // The second push meets a buffer that is not empty, the third one that is full.
        for bytes in [100, rest.len(), rest.len()] {
            let taken = decoder.push(&rest[..bytes.min(rest.len())]);
            assert!(decoder.buffered_bytes() <= BUFFER_BYTES_MAX);
            rest = &rest[taken..];
        }
        let before = frames;
        frames += drain(&mut decoder).unwrap().len();
        assert!(frames > before, "a full buffer has a frame");
    }
    assert_eq!(frames, 3);
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Message {
    Ack { epoch: u64 },
    Text(String),
}

#[test]
fn messages_come_back_as_they_were() {
    let message = Message::Text("ready".into());
    let frames = decode_all(&encode_control(SESSION, &message).unwrap()).unwrap();
    assert_eq!(decode_control::<Message>(&frames[0]), Ok(message));
    let hello = encode_message(FrameType::Hello, SESSION, &Message::Ack { epoch: 3 }).unwrap();
    let frames = decode_all(&hello).unwrap();
    assert_eq!(
        decode_message::<Message>(FrameType::Hello, &frames[0]),
        Ok(Message::Ack { epoch: 3 })
    );
}

#[test]
fn messages_that_are_too_long_cut_followed_by_bytes_or_of_another_type_are_refused() {
    let long = Message::Text("x".repeat(64 << 10));
    assert!(matches!(
        encode_control(SESSION, &long),
        Err(WireError::TooLarge { .. })
    ));
    assert!(encode_message(FrameType::Hello, SESSION, &long).is_ok());
    let cut = frame(FrameType::Control, &[1, 5, b'a']);
    assert!(matches!(
        decode_control::<Message>(&cut),
        Err(WireError::Message { what: "control", .. })
    ));
    let unknown = frame(FrameType::Control, &[9]);
    assert!(matches!(
        decode_control::<Message>(&unknown),
        Err(WireError::Message { .. })
    ));
    let longer = frame(FrameType::Control, &[0, 3, 0]);
    let trailing = WireError::Trailing {
        what: "control",
        bytes: 1,
    };
    assert_eq!(decode_control::<Message>(&longer), Err(trailing));
    let other = frame(FrameType::Hello, &[0, 3]);
    assert!(matches!(
        decode_control::<Message>(&other),
        Err(WireError::UnexpectedFrame { .. })
    ));
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..100),
        prop::collection::vec(any::<u8>(), 0..romulus_wire::COMMIT_BYTES_MAX),
    ];
    (prop::sample::select(&FrameType::ALL[..]), payload).prop_map(|(kind, payload)| frame(kind, &payload))
}

proptest! {
    #[test]
    fn frames_come_back_however_the_stream_is_cut(
        frames in prop::collection::vec(any_frame(), 0..12),
        cuts in prop::collection::vec(1usize..300, 1..200),
    ) {
        let encode = |frame: &Frame| encode_frame(frame.frame_type, frame.session, &frame.payload);
        let stream: Vec<u8> = frames.iter().flat_map(|frame| encode(frame).to_vec()).collect();
        let mut decoder = FrameDecoder::for_session(SESSION);
        let (mut rest, mut decoded) = (&stream[..], Vec::new());
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at(rest.len().min(*cut));
            prop_assert_eq!(decoder.push(piece), piece.len());
            decoded.extend(drain(&mut decoder).unwrap());
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(decoded, frames);
        prop_assert_eq!(decoder.finish(), Ok(()));
    }

    #[test]
    fn any_bytes_are_frames_or_an_error_without_a_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        header in any::<bool>(),
    ) {
        if header && bytes.len() >= HEADER_BYTES {
            bytes[..6].copy_from_slice(b"RMLS\x01\x00");
            bytes[16..32].copy_from_slice(&SESSION.0.to_le_bytes());
            seal(&mut bytes);
        }
        let _ = decode_all(&bytes);
    }

    #[test]
    fn any_payload_is_a_message_or_an_error_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let _ = decode_control::<Message>(&frame(FrameType::Control, &bytes));
    }
}
