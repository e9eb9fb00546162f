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
use romulus_vmm_attach::kvm::blob::{BlobWriter, HEADER_BYTES as HEADER_BYTES_OF_STATE, Kind as BlobKind};
use romulus_vmm_attach::proto::{
    Disk, ErrorCode, Event, Hello, MachineInfo, Nic, Output, PAGE_BYTES as ATTACH_PAGE_BYTES, Pause, Paused,
    Prepare, Refusal, Region, Reply, Request, Role, VERSION, Versions, Welcome,
};
use romulus_wire::{
    CommitRecord, FRAME_BYTES_MAX, FrameType, HEADER_BYTES, PagesSection, PagesWriter, device_state_frames,
    device_state_section, encode_control, pack_guest_state,
};

const SESSION: Session = Session(0x5e55_1070);

fn main() -> io::Result<()> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    wire_frames(&seeds.join("wire_frames"))?;
    page_decode(&seeds.join("page_decode"))?;
    attach(&seeds)?;
    guest_resp(&seeds.join("guest_resp"))?;
    attach_state(&seeds.join("attach_state"))
}

fn attach_state(folder: &Path) -> io::Result<()> {
    let mut blob = Vec::new();
    let mut writer = BlobWriter::begin(&mut blob, 1);
    writer.section(BlobKind::MpState, 0, &[0; 4]);
    writer.section(BlobKind::Msrs, 0, &[1; 32]);
    writer.section(BlobKind::Devices, 0, b"devices");
    writer.finish().expect("it is short");
    write(folder, "sections", [1, 1], &blob[HEADER_BYTES_OF_STATE..])?;
    fs::write(folder.join("whole"), [&[0], &blob[..]].concat())
}

fn guest_resp(folder: &Path) -> io::Result<()> {
    let inputs: [(&str, &[u8]); 5] = [
        ("array", b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nv\r\n v\r\n"),
        ("inline", b"SET key value\r\nGET key\n"),
        ("pipeline", b"*1\r\n$4\r\nPING\r\n*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n\r\n"),
        ("empty", b"*0\r\n*-1\r\n*1\r\n$0\r\n\r\n"),
        ("numbers", b"EXPIRE -1 0 9223372036854775807\r\n"),
    ];
    fs::create_dir_all(folder)?;
    inputs
        .iter()
        .try_for_each(|(name, input)| fs::write(folder.join(name), input))
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

fn attach(seeds: &Path) -> io::Result<()> {
    let machine = MachineInfo {
        vmm: "testbed".into(),
        vmm_version: "1".into(),
        vcpus: 1,
        regions: vec![Region {
            name: "ram".into(),
            gpa: 0,
            bytes: 70 * ATTACH_PAGE_BYTES,
            fd_offset: 0,
        }],
        nics: vec![Nic {
            name: "net0".into(),
            mac: [2; 6],
            tap: "tap0".into(),
        }],
        disks: vec![Disk {
            id: "blk0".into(),
            bytes: 512,
            path: "/log".into(),
        }],
        outputs: vec![Output {
            id: "serial".into(),
            to: "stdout".into(),
        }],
        ..MachineInfo::default()
    };
    let hello = Request::Hello(Hello {
        versions: Versions { min: 1, max: 1 },
        client: "replicator".into(),
    });
    let prepare = Request::Prepare(Prepare {
        machine: machine.clone(),
        private: true,
    });
    let requests = [
        hello,
        Request::Arm,
        Request::Pause(Pause { limit_ns: 1_000_000 }),
        prepare,
    ];
    let welcome = Reply::Welcome(Welcome {
        version: VERSION,
        vmm: "testbed".into(),
        vmm_version: "1".into(),
        role: Role::Running,
        bitmap_bytes: machine.bitmap_bytes(),
        machine: Some(machine),
        state_bytes_max: 1 << 20,
        pause_limit_ns_max: 1_000_000_000,
        halt_limit_ns: 1_000_000_000,
    });
    let paused = Reply::Paused(Paused {
        stopped_at_ns: 1,
        kick_ns: 2,
        harvest_ns: 3,
        dirty_pages: 4,
    });
    let busy = Reply::Error(Refusal::new(ErrorCode::Busy, "another client is attached"));
    let replies = [welcome, paused, busy, Reply::Event(Event::Reset)];
    let requests = requests.map(|request| (request.name(), request.encode(1)));
    let replies = replies.map(|reply| (reply.name(), reply.encode(1)));
    for (target, messages) in [("attach_request", requests), ("attach_reply", replies)] {
        for (name, message) in messages {
            let message = message.expect("it is short");
            // As it comes over the socket: the target looks at the first byte only.
            write(
                &seeds.join(target),
                &name.to_lowercase(),
                [0, message[0]],
                &message[1..],
            )?;
        }
    }
    Ok(())
}
