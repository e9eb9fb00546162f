//! Writes the first inputs of the fuzz targets to `seeds/`: one well-formed value of each sort.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example seeds`, after a change of a format.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::Path;

use bytes::Bytes;
use romulus_page_codec::{Kind, Page, Scratch, encode};
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, Session};
use romulus_wire::{
    CommitRecord, FRAME_BYTES_MAX, FrameType, HEADER_BYTES, PagesSection, PagesWriter, device_state_frames,
    device_state_section, encode_control, pack_guest_state,
};

const SESSION: Session = Session(0x5e55_1070);

fn main() -> io::Result<()> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    wire_frames(&seeds.join("wire_frames"))?;
    page_decode(&seeds.join("page_decode"))
}

fn write(folder: &Path, name: &str, head: [u8; 2], bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join(name), [&head[..], bytes].concat())
}

fn wire_frames(folder: &Path) -> io::Result<()> {
    let mut writer = PagesWriter::new(SESSION, Epoch(1), FRAME_BYTES_MAX);
    for (page, kind, payload) in [(3, 1, &[][..]), (4, 3, b"some words"), (900, 5, b"a block")] {
        assert!(writer.push(PageIndex(page), kind, payload), "three pages fit");
    }
    let pages = writer.finish().expect("there are pages");
    let state = pack_guest_state(b"notes", b"device state");
    let record = CommitRecord {
        session: SESSION,
        epoch: Epoch(1),
        captured_ns: 1_000_000,
        image_digest: Digest(7),
        pages: pages.section,
        device_state: device_state_section(&state),
    };
    let empty = CommitRecord {
        pages: PagesSection::default(),
        ..record
    };
    let chunk = device_state_frames(SESSION, Epoch(1), &state)
        .expect("it is short")
        .next();
    let frames: [(&str, FrameType, Bytes); 5] = [
        (
            "control",
            FrameType::Control,
            encode_control(SESSION, &7u8).expect("it is short"),
        ),
        ("pages", FrameType::Pages, pages.frame),
        (
            "device_state",
            FrameType::DeviceState,
            chunk.expect("it has a chunk"),
        ),
        ("commit", FrameType::Commit, record.frame()),
        ("commit_without_pages", FrameType::Commit, empty.frame()),
    ];
    for (name, frame_type, frame) in &frames {
        let position = FrameType::ALL
            .iter()
            .position(|other| other == frame_type)
            .expect("it is a type");
        let position = u8::try_from(position).expect("there are few types");
        write(
            folder,
            &format!("{name}_payload"),
            [1, position],
            &frame[HEADER_BYTES..],
        )?;
    }
    let stream: Vec<u8> = frames.iter().flat_map(|(_, _, frame)| frame.to_vec()).collect();
    write(folder, "stream", [0, 250], &stream)
}

fn page_decode(folder: &Path) -> io::Result<()> {
    // The previous version that the target makes of seed 1.
    let previous: Page = std::array::from_fn(|i| (i / 16).to_le_bytes()[0]);
    let text: Page = std::array::from_fn(|i| b"the guest's text "[i * i / 3 % 17]);
    let mut few_words = previous;
    few_words.iter_mut().step_by(700).for_each(|byte| *byte ^= 1);
    let mut every_word = previous;
    every_word.iter_mut().step_by(8).for_each(|byte| *byte ^= 1);
    let pages = [[0; PAGE_BYTES], previous, few_words, every_word, text];
    for page in pages {
        let mut payload = Vec::new();
        let kind = encode(&page, Some(&previous), &mut Scratch::new(), &mut payload);
        write(folder, kind.name(), [kind.number(), 1], &payload)?;
    }
    write(folder, Kind::Raw.name(), [Kind::Raw.number(), 0], &previous)
}
