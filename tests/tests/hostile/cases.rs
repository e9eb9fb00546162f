//! What liars send. Pure bytes; `at_agent` sends them.

use bytes::Bytes;
use romulus_e2e::strangers::noise;
use romulus_page_codec::Kind;
use romulus_types::{Digest, Epoch, PAGE_BYTES, RamBlock, RamLayout, Session};
use romulus_wire::{
    CommitRecord, FRAME_BYTES_MAX, FrameType, HEADER_BYTES, PagesSection, device_state_section, encode_frame,
};

use crate::place::STAGING_MIB;
use crate::primary::{PAGES, Primary, hello, hello_frame, machine, own, pages_frame};

/// The VM that liars speak of.
pub const VM: &str = "db";
const OTHER: Session = Session(0xbad);
const RAW: u8 = 6;
const PAGE: &[u8] = &[0x5a; PAGE_BYTES];

/// A frame with any type, and any length in its header; its checksums are right.
fn raw_frame(number: u16, session: Session, payload: &[u8], payload_bytes: u32) -> Bytes {
    let mut frame = b"RMLS".to_vec();
    frame.extend(1u16.to_le_bytes());
    frame.extend(number.to_le_bytes());
    frame.extend(payload_bytes.to_le_bytes());
    frame.extend(crc32fast::hash(payload).to_le_bytes());
    frame.extend(session.0.to_le_bytes());
    frame.extend([0; 4]);
    frame.extend(crc32fast::hash(&frame).to_le_bytes());
    assert_eq!(frame.len(), HEADER_BYTES);
    frame.extend(payload);
    frame.into()
}

/// A frame of an unknown type, which its receiver must refuse, or skip if it is optional.
pub fn unknown_frame(number: u16, session: Session) -> Bytes {
    raw_frame(number, session, b"from the future", 15)
}

fn changed(frame: &Bytes, at: usize, bits: u8) -> Bytes {
    let mut bytes = frame.to_vec();
    bytes[at] ^= bits;
    bytes.into()
}

/// The first thing on a connection that is not a hello that can be read.
pub struct BadHello {
    pub name: &'static str,
    pub bytes: Bytes,
    pub reason: &'static str,
}

pub fn bad_hellos() -> Vec<BadHello> {
    let session = Session(0x1000);
    let good = hello_frame(&hello(VM, "other", session));
    let payload = &good[HEADER_BYTES..];
    let path = (
        "../../etc",
        "other",
        session.0,
        5u64,
        7u128,
        25_000_000u64,
        Vec::<u8>::new(),
    );
    let path = postcard::to_stdvec(&path).unwrap();
    let list = [
        (
            "nothing at all",
            Bytes::new(),
            "the stream ended before the hello",
        ),
        ("noise", noise(1, 4096).into(), "not Romulus' protocol"),
        (
            "a hello that is cut off",
            good.slice(..good.len() - 1),
            "in the middle of a frame",
        ),
        (
            "a header that is cut off",
            good.slice(..20),
            "in the middle of a frame",
        ),
        (
            "a flipped bit in a hello",
            changed(&good, 99, 4),
            "payload of a hello frame is damaged",
        ),
        (
            "a flipped bit in a header",
            changed(&good, 9, 4),
            "header is damaged",
        ),
        ("another version", changed(&good, 4, 8), "wire version 9"),
        (
            "a hello of 1 GiB",
            raw_frame(2, session, b"", 1 << 30),
            "over the limit",
        ),
        (
            "another frame first",
            encode_frame(FrameType::Control, session, b"x"),
            "began with a control frame",
        ),
        (
            "an unknown frame first",
            unknown_frame(0x123, session),
            "0x0123 is mandatory and unknown",
        ),
        (
            "a session that is not the frame's",
            encode_frame(FrameType::Hello, OTHER, payload),
            "another session",
        ),
        (
            "a hello of noise",
            encode_frame(FrameType::Hello, session, &noise(2, 64)),
            "hello message can't be read",
        ),
        (
            "a path for a name",
            encode_frame(FrameType::Hello, session, &path),
            "hello message can't be read",
        ),
    ];
    list.map(|(name, bytes, reason)| BadHello { name, bytes, reason })
        .into()
}

/// Descriptions of machines that must be refused, and a word of the reason.
pub fn bad_machines() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let mut shell = machine();
    own(&mut shell).argv[0] = "/bin/sh".into();
    let mut huge = machine();
    let name = huge.main_name().to_owned();
    let bytes = 8 << 40;
    huge.layout = RamLayout::new(vec![RamBlock { name, bytes }]).unwrap();
    own(&mut huge).template.blocks[0].bytes = bytes;
    let mut other = machine();
    own(&mut other).template.blocks.clear();
    let mut option = machine();
    own(&mut option).argv.push("-no-such-option".into());
    let mut newer = machine();
    newer.format = 99;
    vec![
        ("a machine of noise", noise(3, 500), "description cannot be read"),
        ("a machine of another format", newer.to_json(), "format 99"),
        (
            "a machine that contradicts itself",
            other.to_json(),
            "contradicts itself",
        ),
        ("a machine of 8 TiB", huge.to_json(), "has no room"),
        ("a machine that is a shell", shell.to_json(), "is not a QEMU"),
        (
            "an option without a rule",
            option.to_json(),
            "-no-such-option has no rule",
        ),
    ]
}

/// What is sent in a session whose first checkpoint was good.
#[derive(Default)]
pub struct Lie {
    pub control: Vec<Bytes>,
    pub data: Vec<Bytes>,
    /// Say that nothing more comes on the data stream.
    pub finish: bool,
}

fn on_data(frames: impl IntoIterator<Item = Bytes>) -> Lie {
    Lie {
        data: frames.into_iter().collect(),
        ..Lie::default()
    }
}

fn on_control(frame: Bytes) -> Lie {
    Lie {
        control: vec![frame],
        ..Lie::default()
    }
}

pub struct BadSession {
    pub name: &'static str,
    pub lie: fn(&mut Primary) -> Lie,
    pub reason: &'static str,
}

const fn case(name: &'static str, reason: &'static str, lie: fn(&mut Primary) -> Lie) -> BadSession {
    BadSession { name, lie, reason }
}

/// A frame of one page, of epoch 2 unless said otherwise.
fn page(primary: &Primary, epoch: u64, index: u64, kind: u8, payload: &[u8]) -> Bytes {
    pages_frame(primary.session, Epoch(epoch), &[(index, kind, payload)]).0
}

/// A chunk of device state, as it is on the wire.
fn chunk(primary: &Primary, total: u32, offset: u32, bytes: &[u8]) -> Bytes {
    let mut payload = 2u64.to_le_bytes().to_vec();
    payload.extend(total.to_le_bytes());
    payload.extend(offset.to_le_bytes());
    payload.extend(bytes);
    encode_frame(FrameType::DeviceState, primary.session, &payload)
}

/// The good checkpoint of epoch 2 with another commit record.
fn other_record(primary: &mut Primary, change: fn(&mut CommitRecord)) -> Lie {
    let [pages, state, commit] = primary.checkpoint(Epoch(2));
    let mut record = CommitRecord::decode(&commit[HEADER_BYTES..]).unwrap();
    change(&mut record);
    on_data([pages, state, record.frame()])
}

/// Frames and their order.
pub const BAD_FRAMES: &[BadSession] = &[
    case("noise", "not Romulus' protocol", |_| {
        on_data([noise(4, 100_000).into()])
    }),
    case("a frame of another session", "came in session", |_| {
        on_data([pages_frame(OTHER, Epoch(2), &[(1, RAW, PAGE)]).0])
    }),
    case(
        "a flipped bit in a page",
        "payload of a pages frame is damaged",
        |p| on_data([changed(&page(p, 2, 1, RAW, PAGE), 500, 1)]),
    ),
    case("a flipped bit in a header", "header is damaged", |p| {
        on_data([changed(&page(p, 2, 1, RAW, PAGE), 13, 1)])
    }),
    case("a frame that is cut off", "in the middle of a frame", |p| Lie {
        data: vec![page(p, 2, 1, RAW, PAGE).slice(..900)],
        finish: true,
        ..Lie::default()
    }),
    case("another version", "wire version 3", |p| {
        on_data([changed(&page(p, 2, 1, RAW, PAGE), 4, 2)])
    }),
    case(
        "an unknown mandatory frame",
        "0x0123 is mandatory and unknown",
        |p| on_data([unknown_frame(0x123, p.session)]),
    ),
    case("a frame of 4 GiB", "over the limit", |p| {
        on_data([raw_frame(3, p.session, b"", u32::MAX)])
    }),
    case(
        "a frame that has no place here",
        "no place in the data stream",
        |p| on_data([encode_frame(FrameType::WitnessRequest, p.session, b"x")]),
    ),
    case("the first checkpoint again", "replayed", |p| {
        on_data(p.checkpoint(Epoch(1)))
    }),
    case(
        "the checkpoint after the next",
        "the ones between are missing",
        |p| on_data(p.checkpoint(Epoch(3))),
    ),
    case(
        "the last checkpoint there can be",
        "the ones between are missing",
        |p| on_data([page(p, u64::MAX, 1, RAW, PAGE)]),
    ),
    case(
        "first copy after a checkpoint",
        "came after the first checkpoint",
        |p| on_data([page(p, 0, 1, RAW, PAGE)]),
    ),
    case("a checkpoint inside another", "came inside the checkpoint", |p| {
        on_data([page(p, 2, 1, RAW, PAGE), page(p, 3, 2, RAW, PAGE)])
    }),
    case("noise on the control stream", "not Romulus' protocol", |_| {
        on_control(noise(5, 5000).into())
    }),
    case("a message of noise", "control message can't be read", |p| {
        on_control(encode_frame(FrameType::Control, p.session, &noise(6, 40)))
    }),
    case("a message of 1 MiB", "over the limit", |p| {
        on_control(raw_frame(1, p.session, b"", 1 << 20))
    }),
    case(
        "pages on the control stream",
        "pages frame came where a control frame",
        |p| on_control(page(p, 2, 1, RAW, PAGE)),
    ),
    case("a second hello", "hello frame came where a control frame", |p| {
        on_control(hello_frame(&hello(VM, "other", p.session)))
    }),
];

/// Contents and promises.
pub const BAD_CHECKPOINTS: &[BadSession] = &[
    case("a page twice", "staged twice", |p| {
        on_data([page(p, 2, 9, RAW, PAGE), page(p, 2, 9, RAW, PAGE)])
    }),
    case("a page past the guest's end", "not one of the guest's", |p| {
        on_data([page(p, 2, PAGES, RAW, PAGE)])
    }),
    case("an unknown encoding", "page encoding 99 is unknown", |p| {
        on_data([page(p, 2, 1, 99, PAGE)])
    }),
    case("a raw page of 5 bytes", "5 bytes of payload", |p| {
        on_data([page(p, 2, 1, RAW, b"short")])
    }),
    case("noise for LZ4", "LZ4", |p| {
        on_data([page(p, 2, 1, Kind::Lz4.number(), &noise(7, 900))])
    }),
    case("a delta of noise", "delta", |p| {
        on_data([page(p, 2, 1, Kind::Delta.number(), &noise(8, 200))])
    }),
    case("a page fewer than promised", "are not the 2 that", |p| {
        other_record(p, |record| record.pages.pages = 2)
    }),
    case("another digest of the pages", "are not the 1 that", |p| {
        other_record(p, |record| record.pages.digest = Digest(1))
    }),
    case(
        "another digest of the image",
        "memory must be copied again",
        |p| other_record(p, |record| record.image_digest = Digest(1)),
    ),
    case("another device state", "device state", |p| {
        other_record(p, |record| record.device_state = device_state_section(b"another"))
    }),
    case("a commit of nothing", "pages that came (0 of them)", |p| {
        let [_, _, commit] = p.checkpoint(Epoch(2));
        on_data([commit])
    }),
    case("a device state of 4 GiB", "length of the device state", |p| {
        on_data([chunk(p, u32::MAX, 0, b"x")])
    }),
    case("a device state with a hole", "begins at byte 500", |p| {
        on_data([chunk(p, 1000, 0, b"x"), chunk(p, 1000, 500, b"x")])
    }),
    case("a device state that is never complete", "device state", |p| {
        let promised = chunk(p, 64 << 20, 0, b"x");
        let record = CommitRecord {
            session: p.session,
            epoch: Epoch(2),
            captured_ns: 0,
            image_digest: Digest(0),
            pages: PagesSection::default(),
            device_state: device_state_section(b"x"),
        };
        on_data([promised, record.frame()])
    }),
    case(
        "a device state over the limit of staging",
        "staging_bytes_max",
        |p| {
            let state = vec![7; 64 << 20];
            let frames = romulus_wire::device_state_frames(p.session, Epoch(2), &state).unwrap();
            let record = CommitRecord {
                session: p.session,
                epoch: Epoch(2),
                captured_ns: 0,
                image_digest: Digest(0),
                pages: PagesSection::default(),
                device_state: device_state_section(&state),
            };
            on_data(frames.chain([record.frame()]))
        },
    ),
    case("a checkpoint without an end", "staging_bytes_max", |p| {
        let pages_each = (FRAME_BYTES_MAX / (PAGE_BYTES + 16)) as u64;
        let frames = (STAGING_MIB << 20) / FRAME_BYTES_MAX as u64 + 3;
        let frame = |number: u64| {
            let pages: Vec<_> = (0..pages_each)
                .map(|n| (number * pages_each + n, RAW, PAGE))
                .collect();
            pages_frame(p.session, Epoch(2), &pages).0
        };
        on_data((0..frames).map(frame))
    }),
];
