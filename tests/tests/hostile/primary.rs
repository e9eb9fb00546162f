//! A primary made of the shipped parts (transport, wire, page-codec): good unless a case makes it bad.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use romulus_hypervisor::qemu::stream::{StreamBlock, Template};
use romulus_hypervisor::spec::{Hypervisor, MachineSpec, QemuMachine, SPEC_FORMAT};
use romulus_page_codec::{ImageDigest, Kind, Page, page_digest};
use romulus_protocol::{BackupMessage, Hello, PrimaryMessage, ToBackup, ToPrimary};
use romulus_transport::{CloseCode, Connection, Endpoint, FrameReader, SendStream, TransportError};
use romulus_types::{
    BlockId, Digest, Epoch, HostId, PAGE_BYTES, PageIndex, RamBlock, RamLayout, Session, Term, Time, VmId,
    WitnessInstance,
};
use romulus_wire::{
    CommitRecord, FrameType, HeldPagesFrame, PagesSection, PagesWriter, decode_control, device_state_frames,
    device_state_section, encode_control, encode_message, pack_guest_state,
};

use crate::place::{Place, SOON, peer};

/// Pages of the machine that is described.
pub const PAGES: u64 = RAM_BYTES / PAGE_BYTES as u64;
/// A witness's instance, for hellos that are never compared with it.
pub const INSTANCE: WitnessInstance = WitnessInstance(7);
const RAM_BYTES: u64 = 64 << 20;

/// A machine that QEMU has everywhere.
pub fn machine() -> MachineSpec {
    machine_of(RAM_BYTES)
}

/// The same with so many bytes of memory, in whole MiB.
pub fn machine_of(ram_bytes: u64) -> MachineSpec {
    let name = "pc.ram".to_owned();
    let layout = vec![RamBlock {
        name: name.clone(),
        bytes: ram_bytes,
    }];
    let mib = (ram_bytes >> 20).to_string();
    let argv = ["qemu-system-x86_64", "-nodefaults", "-M", "q35", "-m", &mib];
    MachineSpec {
        format: SPEC_FORMAT,
        version: "7.2.22".into(),
        host_cpu: "any".into(),
        vcpus: 1,
        layout: RamLayout::new(layout).unwrap(),
        main: BlockId(0),
        nics: vec![],
        disks: vec![],
        disposable: vec![],
        hypervisor: Hypervisor::Qemu(QemuMachine {
            accelerator: "tcg".into(),
            cpu_model: "qemu64-x86_64-cpu".into(),
            cpu_features: None,
            argv: argv.map(str::to_owned).to_vec(),
            cwd: "/".into(),
            files: vec![],
            template: Template {
                machine: "pc-q35-7.2".into(),
                subsections: vec![],
                ram_section: 2,
                blocks: vec![StreamBlock {
                    name,
                    bytes: ram_bytes,
                    gpa: None,
                }],
                vmdesc: "{}".into(),
            },
        }),
    }
}

/// What is QEMU's of it.
pub fn own(machine: &mut MachineSpec) -> &mut QemuMachine {
    machine.qemu_mut().unwrap()
}

/// A true hello: the VM is registered as running on `host`, unless another host has it.
pub async fn true_hello(place: &Place, vm: &str, host: &str, session: Session) -> Hello {
    let record = place.register(vm, host).await;
    Hello {
        term: record.term,
        instance: record.instance,
        ..hello(vm, host, session)
    }
}

/// A hello that can be read.
pub fn hello(vm: &str, host: &str, session: Session) -> Hello {
    Hello {
        vm: VmId::new(vm).unwrap(),
        primary: HostId::new(host).unwrap(),
        session,
        term: Term(5),
        instance: INSTANCE,
        epoch_ns: 25_000_000,
        machine: machine().to_json(),
    }
}

/// The hello as a frame.
pub fn hello_frame(hello: &Hello) -> Bytes {
    encode_message(FrameType::Hello, hello.session, hello).unwrap()
}

/// How a connection or a session was refused.
#[derive(Debug)]
pub struct Refusal {
    /// The code of the close.
    pub code: CloseCode,
    /// The reason: of the close, or in the refusal before it.
    pub reason: String,
}

/// Waits for the agent to close the connection.
pub async fn closed(connection: &Connection) -> Refusal {
    let end = tokio::time::timeout(SOON, connection.closed()).await;
    match end.expect("the daemon closes the connection") {
        TransportError::Closed { code, reason, .. } => Refusal { code, reason },
        other => panic!("lost instead of closed: {other}"),
    }
}

/// The pages that the agent says it holds from an earlier session.
async fn held_pages(reader: &mut FrameReader) -> Vec<PageIndex> {
    let mut held = Vec::new();
    loop {
        let frame = reader.next().await.unwrap().expect("the list goes on");
        let part = HeldPagesFrame::parse(&frame).unwrap();
        if part.is_end() {
            return held;
        }
        held.extend(part.entries().map(|(page, _)| page));
    }
}

/// One session of a primary.
pub struct Primary {
    pub connection: Connection,
    pub control: SendStream,
    pub data: SendStream,
    pub session: Session,
    vm: VmId,
    reader: FrameReader,
    image: ImageDigest,
    digests: BTreeMap<PageIndex, Digest>,
    epoch: Epoch,
}

impl Primary {
    /// Connects and says hello. `Err` is the agent's refusal.
    pub async fn open(place: &Place, endpoint: &Endpoint, hello: &Hello) -> Result<Primary, Refusal> {
        let connection = endpoint.connect(&peer(place.agent_at)).await.unwrap();
        let mut streams = connection.open_control().await.unwrap();
        streams.sender.send(hello_frame(hello)).await.unwrap();
        let mut reader = FrameReader::for_session(streams.receiver, hello.session);
        let answer = tokio::time::timeout(SOON, reader.next())
            .await
            .expect("an answer");
        match decode_control(&answer.unwrap().unwrap()).unwrap() {
            ToPrimary::Welcome { backup } => assert_eq!(backup.as_str(), "backup"),
            ToPrimary::Refused { reason, .. } => {
                let code = closed(&connection).await.code;
                return Err(Refusal { code, reason });
            }
            ToPrimary::Peer(message) => panic!("{message:?} came before the welcome"),
        }
        let held = tokio::time::timeout(SOON, held_pages(&mut reader)).await;
        let held = held.expect("the list of held pages ends");
        let mut data = connection.open_data().await.unwrap();
        if !held.is_empty() {
            // This guest's memory is all zeros so far.
            let zeros: Vec<_> = held
                .iter()
                .map(|page| (page.0, Kind::Zero.number(), &[][..]))
                .collect();
            let (frame, _) = pages_frame(hello.session, Epoch::NONE, &zeros);
            data.send(frame).await.unwrap();
        }
        Ok(Primary {
            connection,
            control: streams.sender,
            data,
            session: hello.session,
            vm: hello.vm.clone(),
            reader,
            image: ImageDigest::ZERO,
            digests: BTreeMap::new(),
            epoch: Epoch::NONE,
        })
    }

    /// The newest epoch that was sent whole.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// A good checkpoint of one page, as its frames: pages, device state, commit.
    pub fn checkpoint(&mut self, epoch: Epoch) -> [Bytes; 3] {
        let (index, page) = content(epoch);
        let (pages, section) = pages_frame(self.session, epoch, &[(index.0, Kind::Raw.number(), &page)]);
        let new = page_digest(index, &page);
        let old = self.digests.insert(index, new).unwrap_or_default();
        self.image.replace(old, new);
        let state = pack_guest_state(b"[]", b"not a device state that QEMU knows");
        let chunk = device_state_frames(self.session, epoch, &state)
            .unwrap()
            .next()
            .unwrap();
        let record = CommitRecord {
            session: self.session,
            epoch,
            captured_ns: epoch.0,
            image_digest: self.image.digest(),
            pages: section,
            device_state: device_state_section(&state),
        };
        [pages, chunk, record.frame()]
    }

    /// Sends the next checkpoint and waits until the agent says that it is committed.
    pub async fn commit(&mut self) -> Epoch {
        let epoch = self.epoch.next();
        for frame in self.checkpoint(epoch) {
            self.data.send(frame).await.unwrap();
        }
        self.epoch = epoch;
        let heard = tokio::time::timeout(SOON, self.wait_committed(epoch)).await;
        heard.expect("a good checkpoint is committed");
        epoch
    }

    async fn wait_committed(&mut self, epoch: Epoch) {
        loop {
            let frame = self.reader.next().await.unwrap().expect("the session goes on");
            let message = decode_control(&frame).unwrap();
            if let ToPrimary::Peer(BackupMessage::Alive { committed, .. }) = message
                && committed >= epoch
            {
                return;
            }
        }
    }

    /// Sends a heartbeat; the frame is a good one.
    pub async fn heartbeat(&mut self) {
        let message = ToBackup::Peer(PrimaryMessage::Heartbeat {
            sent: Time::from_ns(u64::MAX),
        });
        let frame = encode_control(self.session, &message).unwrap();
        self.control.send(frame).await.unwrap();
    }

    /// Ends the session as a primary does that is done, and waits until the agent has heard it.
    pub async fn leave(self, place: &Place) {
        self.connection.close(CloseCode::DONE, "");
        let began = Instant::now();
        loop {
            let status = place.status("backup-agent");
            let vms = status["vms"].as_array().unwrap();
            let vm = vms.iter().find(|vm| vm["vm"] == self.vm.as_str()).unwrap();
            if vm["session"] != self.session.to_string() {
                return;
            }
            assert!(began.elapsed() < SOON, "the agent keeps the session: {vm}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// One frame of encoded pages, and what it adds to the commit record.
pub fn pages_frame(session: Session, epoch: Epoch, pages: &[(u64, u8, &[u8])]) -> (Bytes, PagesSection) {
    let mut writer = PagesWriter::new(session, epoch, 1 << 20);
    for (index, kind, payload) in pages {
        assert!(
            writer.push(PageIndex(*index), *kind, payload),
            "one frame is enough"
        );
    }
    let frame = writer.finish().unwrap();
    (frame.frame, frame.section)
}

/// The page that an epoch writes.
fn content(epoch: Epoch) -> (PageIndex, Page) {
    let mut page = [0; PAGE_BYTES];
    page[..8].copy_from_slice(&epoch.0.to_le_bytes());
    (PageIndex(epoch.0 % PAGES), page)
}
