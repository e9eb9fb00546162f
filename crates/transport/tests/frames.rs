//! Frames over a connection: whole ones come out, cut ones and wrong ones are told apart.

mod common;

use bytes::Bytes;
use romulus_transport::{FrameError, FrameReader, Network, memory};
use romulus_types::{HostId, Session};
use romulus_wire::{FrameType, HEADER_BYTES, WireError, encode_frame};

const SESSION: Session = Session(7);

/// A reader of what `sent` says, in these pieces, over a stream in memory that then ends.
async fn reader(sent: Vec<Bytes>) -> (FrameReader, tokio::task::JoinHandle<()>) {
    let (a, b, _) = memory::pair(
        &HostId::new("a").unwrap(),
        &HostId::new("b").unwrap(),
        &Network::default(),
    );
    let sending = tokio::spawn(async move {
        let mut stream = a.open_data().await.unwrap();
        for piece in sent {
            stream.send(piece).await.unwrap();
        }
        stream.finish();
        a.closed().await;
    });
    let stream = b.accept_data().await.unwrap();
    (FrameReader::for_session(stream, SESSION), sending)
}

#[tokio::test]
async fn frames_come_out_whole_however_they_were_cut() {
    let frames: Vec<Bytes> = (0..20u8)
        .map(|n| encode_frame(FrameType::Pages, SESSION, &vec![n; usize::from(n) * 9000]))
        .collect();
    let all: Vec<u8> = frames.concat();
    for piece_bytes in [13, 1000, all.len()] {
        let pieces = all.chunks(piece_bytes).map(Bytes::copy_from_slice).collect();
        let (mut reader, _sending) = reader(pieces).await;
        for n in 0..20u8 {
            let frame = reader.next().await.unwrap().unwrap();
            assert!(
                frame.payload.iter().all(|byte| *byte == n) && frame.payload.len() == usize::from(n) * 9000
            );
        }
        assert!(reader.next().await.unwrap().is_none());
    }
}

#[tokio::test]
async fn a_stream_that_ends_within_a_frame_is_an_error_at_every_byte() {
    let frame = encode_frame(FrameType::Commit, SESSION, &[1; 10]);
    for cut in [
        1,
        4,
        HEADER_BYTES - 1,
        HEADER_BYTES,
        HEADER_BYTES + 1,
        frame.len() - 1,
    ] {
        let (mut reader, _sending) = reader(vec![frame.slice(..cut)]).await;
        assert!(
            matches!(reader.next().await, Err(FrameError::Cut(_))),
            "cut at {cut}"
        );
    }
}

#[tokio::test]
async fn a_frame_of_another_session_is_refused_by_name() {
    let (mut reader, _sending) = reader(vec![encode_frame(FrameType::Commit, Session(8), &[])]).await;
    let refused = reader.next().await;
    assert!(
        matches!(refused, Err(FrameError::Wire(WireError::Session { .. }))),
        "{refused:?}"
    );
}
