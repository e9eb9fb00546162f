//! Pages and device state arrive as they were sent, or are refused by name before any of it is used.

use bytes::Bytes;
use proptest::prelude::*;
use romulus_types::{Epoch, PAGE_BYTES, PageIndex, Session};
use romulus_wire::{
    CommitRecord, DEVICE_STATE_BYTES_MAX, DeviceStateAssembler, DeviceStateChunk, FRAME_BYTES_MAX, Frame,
    FrameDecoder, FrameType, PAGE_INDEX_MAX, PageEntry, Pages, PagesFrame, PagesSection, PagesWriter,
    WireError, device_state_frames, device_state_section,
};

const SESSION: Session = Session(0x5e55_1070);
const EPOCH: Epoch = Epoch(42);

fn receive(bytes: &[u8]) -> Frame {
    let mut decoder = FrameDecoder::for_session(SESSION);
    assert_eq!(decoder.push(bytes), bytes.len());
    let frame = decoder.next_frame().unwrap().unwrap();
    assert_eq!(decoder.finish(), Ok(()));
    frame
}

fn frame(frame_type: FrameType, payload: impl Into<Bytes>) -> Frame {
    Frame {
        frame_type,
        session: SESSION,
        payload: payload.into(),
    }
}

fn write(entries: &[(u64, u8, Vec<u8>)]) -> PagesFrame {
    let mut writer = PagesWriter::new(SESSION, EPOCH, FRAME_BYTES_MAX);
    for (page, kind, payload) in entries {
        assert!(writer.push(PageIndex(*page), *kind, payload));
    }
    writer.finish().expect("there are pages")
}

fn refused(payload: impl Into<Bytes>) -> WireError {
    Pages::parse(&frame(FrameType::Pages, payload)).expect_err("a malformed frame of pages is refused")
}

fn pages_payload(count: u32, entries: &[u8]) -> Vec<u8> {
    [&EPOCH.0.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4], entries].concat()
}

#[test]
fn the_layout_of_pages_on_the_wire_does_not_change() {
    let sent = write(&[(300, 1, vec![]), (301, 2, vec![]), (310, 3, vec![7, 8])]);
    let frame = receive(&sent.frame);
    let entries = [0xac, 0x02, 1, 0, 0, 2, 0, 8, 3, 2, 7, 8];
    assert_eq!(frame.payload, pages_payload(3, &entries));
}

#[test]
fn a_frame_of_pages_cut_off_anywhere_or_with_bytes_to_spare_is_refused() {
    let entries = [
        (3, 1, vec![]),
        (200, 9, vec![1; 300]),
        (PAGE_INDEX_MAX, 2, vec![5; PAGE_BYTES]),
    ];
    let good = receive(&write(&entries).frame).payload;
    for end in 0..good.len() {
        refused(good.slice(..end));
    }
    let longer = [&good[..], &[0]].concat();
    assert_eq!(
        refused(longer),
        WireError::Trailing {
            what: "pages frame",
            bytes: 1
        }
    );
}

#[test]
fn counts_indexes_and_lengths_that_lie_are_refused() {
    let entry = [5, 1, 0];
    assert!(matches!(
        refused(pages_payload(0, &[])),
        WireError::Malformed { .. }
    ));
    assert!(matches!(
        refused(pages_payload(u32::MAX, &entry)),
        WireError::TooLarge { .. }
    ));
    assert!(matches!(
        refused(pages_payload(2, &[&entry[..], &[9, 1, 5]].concat())),
        WireError::Truncated(_)
    ));
    assert!(matches!(
        refused(pages_payload(1, &[&entry[..], &entry].concat())),
        WireError::Trailing { .. }
    ));
    // One byte over a page, with that many bytes there.
    let long = [&[5, 1, 0x81, 0x20][..], &[0; PAGE_BYTES + 1]].concat();
    assert!(matches!(
        refused(pages_payload(1, &long)),
        WireError::TooLarge { value: 4097, .. }
    ));
    // Index 2^32, then 2^64 - 1, then one past the last page by way of a gap.
    let over = [0x80, 0x80, 0x80, 0x80, 0x10, 1, 0];
    assert!(matches!(
        refused(pages_payload(1, &over)),
        WireError::TooLarge { .. }
    ));
    let most = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 1, 0];
    assert!(matches!(
        refused(pages_payload(1, &most)),
        WireError::TooLarge { .. }
    ));
    assert!(matches!(
        refused(pages_payload(2, &[&entry[..], &most].concat())),
        WireError::TooLarge { .. }
    ));
    let last = [0xff, 0xff, 0xff, 0xff, 0x0f, 1, 0];
    assert!(Pages::parse(&frame(FrameType::Pages, pages_payload(1, &last))).is_ok());
    assert!(matches!(
        refused(pages_payload(2, &[&last[..], &[0, 1, 0]].concat())),
        WireError::TooLarge { .. }
    ));
    // Not the shortest form of 5.
    assert!(matches!(
        refused(pages_payload(1, &[0x85, 0, 1, 0])),
        WireError::Malformed { .. }
    ));
    let mut reserved = pages_payload(1, &entry);
    reserved[12] = 1;
    assert_eq!(refused(reserved), WireError::Reserved("pages frame"));
    assert!(matches!(
        Pages::parse(&frame(FrameType::Control, pages_payload(1, &entry))),
        Err(WireError::UnexpectedFrame { .. })
    ));
}

#[test]
fn a_frame_of_pages_never_exceeds_its_limit_and_an_empty_one_takes_any_page() {
    for limit in [0, 5_000, 128 << 10, usize::MAX] {
        let mut writer = PagesWriter::new(SESSION, EPOCH, limit);
        assert!(writer.push(PageIndex(PAGE_INDEX_MAX - 1_000_000), 6, &[1; PAGE_BYTES]));
        let mut page = PAGE_INDEX_MAX - 999_999;
        while writer.push(PageIndex(page), 6, &[1; 1000]) {
            page += 1;
        }
        let pages = writer.pages();
        let sent = writer.finish().unwrap();
        assert!(
            sent.frame.len() <= limit.clamp(5_000, FRAME_BYTES_MAX),
            "limit {limit}"
        );
        assert_eq!(Pages::parse(&receive(&sent.frame)).unwrap().count(), pages);
    }
    assert_eq!(PagesWriter::new(SESSION, EPOCH, 0).finish(), None);
}

#[test]
#[should_panic(expected = "ascending")]
fn a_page_that_is_written_twice_is_a_bug_of_ours() {
    write(&[(5, 1, vec![]), (5, 1, vec![])]);
}

#[test]
fn the_pages_section_does_not_depend_on_the_order_of_frames_but_on_every_frame() {
    let frames = [1u64, 2, 3].map(|n| write(&[(n, 6, vec![9; 100]), (n + 5, 1, vec![])]));
    let sum = |order: &[usize]| {
        let mut section = PagesSection::default();
        for at in order {
            let frame = receive(&frames[*at].frame);
            let received = Pages::parse(&frame).unwrap().section();
            assert_eq!(received, frames[*at].section);
            section.add(received);
        }
        section
    };
    assert_eq!(sum(&[0, 1, 2]), sum(&[2, 0, 1]));
    assert_eq!(sum(&[0, 1, 2]).pages, 6);
    assert_ne!(sum(&[0, 1, 2]), sum(&[0, 1, 1]));
    assert_ne!(sum(&[0, 1, 2]), sum(&[0, 1]));
}

fn assemble(state: &[u8], frames: &[Bytes]) -> Result<Vec<u8>, WireError> {
    let mut assembler = DeviceStateAssembler::new(EPOCH);
    for bytes in frames {
        let frame = receive(bytes);
        assembler.push(DeviceStateChunk::parse(&frame)?)?;
        assert!(assembler.bytes() <= state.len());
    }
    assembler.finish(&device_state_section(state))
}

fn device_state(bytes: usize) -> (Vec<u8>, Vec<Bytes>) {
    let state: Vec<u8> = (0..bytes).map(|i| u8::try_from(i * i % 251).unwrap()).collect();
    let frames = device_state_frames(SESSION, EPOCH, &state).unwrap().collect();
    (state, frames)
}

#[test]
fn a_device_state_comes_back_whole_in_as_many_frames_as_it_needs() {
    for (bytes, frames_needed) in [(0, 0), (1, 1), (171_000, 1), (3 << 20, 4)] {
        let (state, frames) = device_state(bytes);
        assert_eq!(frames.len(), frames_needed, "{bytes} bytes");
        assert_eq!(assemble(&state, &frames), Ok(state.clone()));
    }
}

#[test]
fn a_device_state_with_a_chunk_missing_repeated_or_reordered_is_refused() {
    let (state, frames) = device_state(3 << 20);
    let pick = |order: &[usize]| {
        let frames: Vec<Bytes> = order.iter().map(|at| frames[*at].clone()).collect();
        assemble(&state, &frames)
    };
    assert!(pick(&[0, 1, 2, 3]).is_ok());
    assert_eq!(pick(&[0, 1, 2]), Err(WireError::Truncated("device state")));
    assert_eq!(pick(&[]), Err(WireError::Truncated("device state")));
    for order in [&[1][..], &[0, 0], &[0, 2], &[0, 1, 0]] {
        assert!(
            matches!(pick(order), Err(WireError::ChunkOrder { .. })),
            "{order:?}"
        );
    }
}

#[test]
fn a_device_state_that_is_not_the_one_of_the_commit_is_refused() {
    let (mut state, frames) = device_state(1000);
    state[999] ^= 1;
    assert!(matches!(
        assemble(&state, &frames),
        Err(WireError::Malformed { .. })
    ));
    state.pop();
    let mut assembler = DeviceStateAssembler::new(EPOCH);
    let frame = receive(&frames[0]);
    assembler.push(DeviceStateChunk::parse(&frame).unwrap()).unwrap();
    assert!(matches!(
        assembler.finish(&device_state_section(&state)),
        Err(WireError::Malformed { .. })
    ));
}

#[test]
fn chunks_that_lie_about_total_offset_or_epoch_are_refused() {
    let chunk = |epoch: u64, total: usize, offset: u32, bytes: &[u8]| {
        let total = u32::try_from(total).unwrap();
        let head = [
            &epoch.to_le_bytes()[..],
            &total.to_le_bytes(),
            &offset.to_le_bytes(),
            bytes,
        ]
        .concat();
        frame(FrameType::DeviceState, head)
    };
    for (total, offset) in [
        (DEVICE_STATE_BYTES_MAX + 1, 0),
        (9, 8),
        (1, 0),
        (0, 0),
        (9, u32::MAX),
    ] {
        let frame = chunk(42, total, offset, b"ab");
        assert!(
            matches!(DeviceStateChunk::parse(&frame), Err(WireError::TooLarge { .. })),
            "{total} {offset}"
        );
    }
    assert!(matches!(
        DeviceStateChunk::parse(&chunk(42, 9, 0, b"")),
        Err(WireError::Malformed { .. })
    ));
    let short = frame(FrameType::DeviceState, vec![0; 15]);
    assert!(matches!(
        DeviceStateChunk::parse(&short),
        Err(WireError::Truncated(_))
    ));

    let mut assembler = DeviceStateAssembler::new(EPOCH);
    let push = |assembler: &mut DeviceStateAssembler, frame: &Frame| {
        assembler.push(DeviceStateChunk::parse(frame).unwrap())
    };
    let other_epoch = push(&mut assembler, &chunk(41, 9, 0, b"ab"));
    assert!(matches!(
        other_epoch,
        Err(WireError::Epoch {
            actual: Epoch(41),
            ..
        })
    ));
    assert_eq!(push(&mut assembler, &chunk(42, 9, 0, b"ab")), Ok(()));
    assert!(matches!(
        push(&mut assembler, &chunk(42, 8, 2, b"cd")),
        Err(WireError::Malformed { .. })
    ));
}

#[test]
fn a_device_state_over_the_limit_is_not_sent() {
    let state = vec![0; DEVICE_STATE_BYTES_MAX + 1];
    let refused = device_state_frames(SESSION, EPOCH, &state).err();
    assert!(matches!(refused, Some(WireError::TooLarge { .. })));
}

#[test]
fn a_commit_record_of_another_session_than_its_frame_is_refused() {
    let record = CommitRecord {
        session: SESSION,
        epoch: EPOCH,
        captured_ns: 1,
        image_digest: romulus_types::Digest(2),
        pages: PagesSection::default(),
        device_state: device_state_section(b"state"),
    };
    let mut frame = receive(&record.frame());
    assert_eq!(CommitRecord::from_frame(&frame), Ok(record));
    frame.session = Session(1);
    let error = WireError::Session {
        expected: Session(1),
        actual: SESSION,
    };
    assert_eq!(CommitRecord::from_frame(&frame), Err(error));
}

fn any_entries() -> impl Strategy<Value = Vec<(u64, u8, Vec<u8>)>> {
    let index = prop_oneof![0..100u64, 0..=PAGE_INDEX_MAX];
    let length = prop_oneof![0..3usize, 0..=PAGE_BYTES];
    let entry =
        (any::<u8>(), length, any::<u8>()).prop_map(|(kind, length, byte)| (kind, vec![byte; length]));
    prop::collection::btree_map(index, entry, 1..60).prop_map(|entries| {
        entries
            .into_iter()
            .map(|(page, (kind, bytes))| (page, kind, bytes))
            .collect()
    })
}

proptest! {
    #[test]
    fn pages_come_back_as_they_were_written(entries in any_entries()) {
        let sent = write(&entries);
        let frame = receive(&sent.frame);
        let pages = Pages::parse(&frame).unwrap();
        prop_assert_eq!(pages.epoch(), EPOCH);
        prop_assert_eq!(pages.section(), sent.section);
        let read: Vec<(u64, u8, Vec<u8>)> = pages
            .entries()
            .map(|PageEntry { page, kind, payload }| (page.0, kind, payload.to_vec()))
            .collect();
        prop_assert_eq!(read, entries);
    }

    #[test]
    fn what_is_accepted_is_written_back_as_the_same_bytes(
        entries in any_entries(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut payload = receive(&write(&entries).frame).payload.to_vec();
        for (at, byte) in damage {
            let at = at.index(payload.len());
            payload[at] ^= byte;
        }
        let frame = frame(FrameType::Pages, payload);
        if let Ok(pages) = Pages::parse(&frame) {
            let mut writer = PagesWriter::new(SESSION, pages.epoch(), FRAME_BYTES_MAX);
            for entry in pages.entries() {
                prop_assert!(writer.push(entry.page, entry.kind, entry.payload));
            }
            prop_assert_eq!(&receive(&writer.finish().unwrap().frame), &frame);
        }
    }

    #[test]
    fn any_bytes_are_checkpoint_data_or_an_error_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let _ = Pages::parse(&frame(FrameType::Pages, bytes.clone()));
        let _ = DeviceStateChunk::parse(&frame(FrameType::DeviceState, bytes.clone()));
        let _ = CommitRecord::from_frame(&frame(FrameType::Commit, bytes));
    }

    #[test]
    fn any_commit_record_comes_back(values: (u128, u64, u64, u128, u64, u128, u64, u128)) {
        let record = CommitRecord {
            session: Session(values.0),
            epoch: Epoch(values.1.max(1)),
            captured_ns: values.2,
            image_digest: romulus_types::Digest(values.3),
            pages: PagesSection { pages: values.4, digest: romulus_types::Digest(values.5) },
            device_state: romulus_wire::DeviceStateSection {
                bytes: values.6,
                digest: romulus_types::Digest(values.7),
            },
        };
        prop_assert_eq!(CommitRecord::decode(&record.encode()), Ok(record));
    }
}
