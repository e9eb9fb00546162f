//! Any bytes at the frame decoder and at what reads its payloads: no panic, bounded memory, and whatever is accepted
//! is written back as the same bytes.
//!
//! The first byte chooses: even, the rest is the stream as it is; odd, it is the payload of a frame that gets the right
//! checksums, as random bytes would never get past them. The next byte is the frame's type or the length of the pieces.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use romulus_types::{Epoch, Session};
use romulus_wire::{
    BUFFER_BYTES_MAX, COMMIT_BYTES_MAX, CommitRecord, DeviceStateAssembler, DeviceStateChunk,
    FRAME_BYTES_MAX, Frame, FrameDecoder, FrameType, HeldPagesFrame, HeldPagesWriter, Pages, PagesWriter,
    decode_message, device_state_section, encode_frame, encode_message, unpack_guest_state,
};
use serde::{Deserialize, Serialize};

const SESSION: Session = Session(0x5e55_1070);
const COMMIT_CRC: std::ops::Range<usize> = 12..16;

/// Stands for the daemons' messages: one of each shape that serde knows.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Message {
    Unit,
    Number(u64),
    Wide { session: Session, epoch: Epoch },
    Text(String, Option<String>),
    List(Vec<(u16, i64, bool)>),
    Map(std::collections::BTreeMap<String, Vec<u8>>),
    Layout(romulus_types::RamLayout),
    Name(romulus_types::VmId),
}

fuzz_target!(|data: &[u8]| {
    let [mode, choice, rest @ ..] = data else { return };
    if mode % 2 == 0 {
        return stream(rest, usize::from(*choice) + 1);
    }
    let frame_type = FrameType::ALL[usize::from(*choice) % FrameType::ALL.len()];
    let mut payload = rest[..rest.len().min(frame_type.payload_bytes_max())].to_vec();
    if frame_type == FrameType::Commit && payload.len() >= COMMIT_CRC.end {
        seal_commit(&mut payload);
    }
    stream(&encode_frame(frame_type, SESSION, &payload), FRAME_BYTES_MAX);
});

fn seal_commit(record: &mut [u8]) {
    record[COMMIT_CRC].fill(0);
    let crc = crc32fast::hash(record);
    record[COMMIT_CRC].copy_from_slice(&crc.to_le_bytes());
}

fn stream(bytes: &[u8], piece_bytes: usize) {
    let mut decoder = FrameDecoder::for_session(SESSION);
    let mut device_state = DeviceStateAssembler::new(Epoch(1));
    for mut piece in bytes.chunks(piece_bytes) {
        while !piece.is_empty() {
            let taken = decoder.push(piece);
            assert!(decoder.buffered_bytes() <= BUFFER_BYTES_MAX);
            piece = &piece[taken..];
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => read(&frame, &mut device_state),
                    Ok(None) => break,
                    Err(error) => {
                        assert!(!error.to_string().is_empty() && !error.name().is_empty());
                        return;
                    }
                }
            }
        }
    }
    let _ = decoder.finish();
}

fn read(frame: &Frame, device_state: &mut DeviceStateAssembler) {
    match frame.frame_type {
        FrameType::Pages => pages(frame),
        FrameType::DeviceState => {
            let _ = unpack_guest_state(&frame.payload);
            if let Ok(chunk) = DeviceStateChunk::parse(frame) {
                let before = device_state.bytes();
                let added = device_state.push(chunk).map_or(0, |()| chunk.bytes.len());
                assert_eq!(device_state.bytes(), before + added);
                let whole = std::mem::replace(device_state, DeviceStateAssembler::new(Epoch(1)));
                let _ = whole.finish(&device_state_section(chunk.bytes));
            }
        }
        FrameType::HeldPages => held_pages(frame),
        FrameType::Commit => {
            if let Ok(record) = CommitRecord::from_frame(frame) {
                let again = record.encode();
                assert!(again.len() <= COMMIT_BYTES_MAX);
                assert_eq!(CommitRecord::decode(&again), Ok(record));
            }
        }
        kind => {
            if let Ok(message) = decode_message::<Message>(kind, frame) {
                let again = encode_message(kind, SESSION, &message).expect("what was short enough still is");
                assert!(again.len() <= FRAME_BYTES_MAX);
            }
        }
    }
}

fn held_pages(frame: &Frame) {
    let Ok(held) = HeldPagesFrame::parse(frame) else {
        return;
    };
    let mut writer = HeldPagesWriter::new(SESSION);
    let mut again: Vec<_> = Vec::new();
    for (page, hash) in held.entries() {
        again.extend(writer.push(page, hash));
    }
    again.extend(writer.finish());
    // The writer makes smaller frames than are accepted.
    if let [only, end] = &again[..] {
        assert_eq!(*only, encode_frame(FrameType::HeldPages, SESSION, &frame.payload));
        assert_eq!(*end, encode_frame(FrameType::HeldPages, SESSION, &[0; 8]));
    }
}

fn pages(frame: &Frame) {
    let Ok(pages) = Pages::parse(frame) else { return };
    let mut writer = PagesWriter::new(SESSION, pages.epoch(), FRAME_BYTES_MAX);
    for entry in pages.entries() {
        // The writer keeps room for the longest entry, so it may be full a little earlier than a frame can be.
        if !writer.push(entry.page, entry.kind, entry.payload) {
            return;
        }
    }
    let again = writer.finish().expect("an accepted frame has pages");
    assert_eq!(again.section, pages.section());
    assert_eq!(
        again.frame,
        encode_frame(FrameType::Pages, SESSION, &frame.payload)
    );
}
