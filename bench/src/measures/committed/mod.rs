//! `wire.committed`: checkpoints through the whole data path, from ready frames to the commit's acknowledgement in another process, against as many
//! bytes on a bare stream of the same connection.
//!
//! What the bytes take besides the network is in the value: frames are taken out of the stream and checked, pages decoded, digested, staged,
//! committed and applied. Encoding them is not: that is another core's work, and `codec.session`.

mod peer;
mod processor;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use romulus_config::Epochs;
use romulus_page_codec::{HeldPages, Kind, Page, SessionEncoder};
use romulus_transport::pki::{self, HostNames, Validity};
use romulus_transport::{
    Connection, Endpoint, Identity, Network, PeerAddress, RecvStream, SendStream, Service, TransportError,
};
use romulus_types::{Epoch, PAGE_BYTES, PageIndex, Session};
use romulus_wire::{
    CommitRecord, PagesFrame, PagesSection, PagesWriter, device_state_frames, device_state_section,
};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{Measure, outside};
use crate::contents::{Content, distinct};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::{Figure, Unit};
pub(crate) use peer::main as peer_main;
use processor::{Cost, Watch};

/// The word that makes this program a peer.
pub(crate) const PEER: &str = "wire-peer";
const SESSION: Session = Session(7);
/// As the replicator makes them.
const FRAME_BYTES: usize = 128 << 10;
/// As many as the replicator hands to the connection at once.
const BATCH_FRAMES: usize = 16;
/// Of a small machine of the test VMM.
const DEVICE_STATE_BYTES: usize = 16 << 10;
/// Where images lie, as the agent's do.
const MEMORY_FOLDER: &str = "/dev/shm";
/// Nothing takes so long, unless something is broken.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two samples nobody looks at the connection, and on a machine that does much else that can take a while.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: f64 = 1024.0 * 1024.0;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Committed {
    /// How pages change; each a row.
    #[serde(default = "contents")]
    contents: Vec<Content>,
    /// Dirty pages of a checkpoint.
    #[serde(default = "pages")]
    pages: u32,
    /// Checkpoints in a sample.
    #[serde(default = "epochs")]
    epochs: u32,
    /// Memory of the guest whose pages they are.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    /// Largest UDP payload; default as the daemons have it.
    #[serde(default = "mtu")]
    mtu: u16,
    #[serde(default = "rounds")]
    rounds: u32,
}

fn contents() -> Vec<Content> {
    vec![Content::Noise]
}

const fn pages() -> u32 {
    1000
}

const fn epochs() -> u32 {
    16
}

const fn memory_mib() -> u32 {
    64
}

fn mtu() -> u16 {
    Network::default().mtu
}

const fn rounds() -> u32 {
    10
}

/// Numbers of eight bytes from a stream.
struct Numbers {
    stream: RecvStream,
    bytes: Vec<u8>,
}

impl Numbers {
    fn of(stream: RecvStream) -> Self {
        Self {
            stream,
            bytes: Vec::new(),
        }
    }

    async fn next(&mut self) -> Result<Option<u64>, TransportError> {
        loop {
            if let Some(number) = self.bytes.first_chunk() {
                let number = u64::from_le_bytes(*number);
                self.bytes.drain(..8);
                return Ok(Some(number));
            }
            match self.stream.recv().await? {
                Some(chunk) => self.bytes.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}

/// The other process; ended when dropped.
struct Peer {
    process: Child,
    _folder: TempDir,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// This end of the connection.
struct Primary {
    numbers: Numbers,
    tell: SendStream,
    bare: SendStream,
    frames: SendStream,
    chunk: Bytes,
    _connection: Connection,
    _endpoint: Endpoint,
    runtime: Runtime,
    peer: Peer,
}

/// What is sent: the guest's pages, and what the backup has of them.
struct Guest {
    encoder: SessionEncoder,
    /// Each page in two versions.
    versions: [Vec<Page>; 2],
    places: Vec<u64>,
    epoch: Epoch,
}

/// A checkpoint, ready to be sent.
struct Ready {
    epoch: Epoch,
    frames: Vec<Bytes>,
}

impl Ready {
    fn bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }
}

impl Guest {
    fn new(content: Content, pages: u32, guest_pages: u64, run: &Run) -> Self {
        let mut random = run.random();
        // The fake machine has a few pages more than were asked for.
        let held = HeldPages::new(SESSION, guest_pages + EXTRA_PAGES);
        let versions = content.pages(pages as usize, &mut random);
        Self {
            encoder: SessionEncoder::new(held, u64::from(pages) * 2 * PAGE_BYTES as u64),
            versions: versions.into(),
            places: distinct(&mut random, pages.into(), guest_pages),
            epoch: Epoch::NONE,
        }
    }

    /// Encodes the next checkpoint: every page of the set has its other version.
    fn checkpoint(&mut self) -> Result<Ready, Unable> {
        self.epoch = Epoch(self.epoch.0 + 1);
        let contents = &self.versions[usize::from(self.epoch.0.is_multiple_of(2))];
        let (mut frames, mut section) = (Vec::new(), PagesSection::default());
        let mut add = |frame: Option<PagesFrame>| {
            if let Some(frame) = frame {
                section.add(frame.section);
                frames.push(frame.frame);
            }
        };
        let writer = || PagesWriter::new(SESSION, self.epoch, FRAME_BYTES);
        let mut writing = writer();
        for (place, page) in self.places.iter().zip(contents) {
            let place = PageIndex(*place);
            let Some((kind, payload)) = self.encoder.encode(place, page) else {
                continue;
            };
            while !writing.push(place, Kind::number(kind), payload) {
                add(std::mem::replace(&mut writing, writer()).finish());
            }
        }
        add(writing.finish());
        let state = vec![0x5a; DEVICE_STATE_BYTES];
        let state_frames = device_state_frames(SESSION, self.epoch, &state)
            .map_err(Unable::failed("making frames of a device state"))?;
        frames.extend(state_frames);
        let record = CommitRecord {
            session: SESSION,
            epoch: self.epoch,
            captured_ns: 0,
            image_digest: self.encoder.image_digest(),
            pages: section,
            device_state: device_state_section(&state),
        };
        frames.push(record.frame());
        Ok(Ready {
            epoch: self.epoch,
            frames,
        })
    }
}

/// Of the fake machine, besides its main memory.
const EXTRA_PAGES: u64 = 4;

/// As the daemons have them, but for how long a connection may be silent, or take to be made.
fn network(mtu: u16) -> Network {
    Network {
        mtu,
        idle_timeout: PATIENCE,
        handshake_timeout: PATIENCE,
        ..Network::default()
    }
}

fn issue(pki_dir: &Path, host: &str) -> Result<std::path::PathBuf, Unable> {
    let names: HostNames = format!("{host},127.0.0.1")
        .parse()
        .map_err(Unable::failed("naming a host"))?;
    let validity = Validity::days(1).map_err(Unable::failed("making certificates"))?;
    pki::issue(pki_dir, &names, validity).map_err(Unable::failed("making certificates"))
}

impl Peer {
    /// Starts the other process; where it listens.
    fn start(identity: &Path, guest_pages: u64, mtu: u16) -> Result<(Self, PeerAddress), Unable> {
        let folder = tempfile::Builder::new()
            .prefix("romulus-bench-")
            .tempdir_in(MEMORY_FOLDER)
            .map_err(Unable::failed("making a folder in /dev/shm"))?;
        let exe = std::env::current_exe().map_err(Unable::failed("finding this program"))?;
        let arguments = peer::Arguments {
            identity,
            image: folder.path(),
            guest_pages,
            mtu,
        };
        let mut process = Command::new(exe)
            .arg(PEER)
            .args(arguments.words())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Unable::failed("starting the other process"))?;
        let stdout = process.stdout.take().expect("it is piped");
        let mut peer = Self {
            process,
            _folder: folder,
            stdout: BufReader::new(stdout),
        };
        let mut line = String::new();
        peer.stdout
            .read_line(&mut line)
            .map_err(Unable::failed("reading where the other process listens"))?;
        let address = line
            .trim()
            .parse()
            .map_err(Unable::failed("reading where the other process listens"))?;
        Ok((peer, address))
    }
}

impl Primary {
    fn connect(guest_pages: u64, mtu: u16) -> Result<Self, Unable> {
        let pki_dir = tempfile::tempdir().map_err(Unable::failed("making a folder"))?;
        let validity = Validity::days(1).map_err(Unable::failed("making certificates"))?;
        pki::init(pki_dir.path(), "bench", validity).map_err(Unable::failed("making certificates"))?;
        let (server, client) = (issue(pki_dir.path(), "server")?, issue(pki_dir.path(), "client")?);
        let identity = Identity::load(&client).map_err(Unable::failed("reading certificates"))?;
        let (peer, address) = Peer::start(&server, guest_pages, mtu)?;
        let network = network(mtu);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Unable::failed("starting a runtime"))?;
        let opened = runtime.block_on(async {
            let endpoint = Endpoint::client(&identity, &network, Service::Pair, None)?;
            let connection = endpoint.connect(&address).await?;
            let control = connection.open_control().await?;
            let bare = connection.open_data().await?;
            let frames = connection.open_data().await?;
            Ok::<_, TransportError>((endpoint, connection, control, bare, frames))
        });
        let (endpoint, connection, control, bare, frames) =
            opened.map_err(Unable::failed("connecting to the other process"))?;
        let mut primary = Self {
            numbers: Numbers::of(control.receiver),
            tell: control.sender,
            bare,
            frames,
            chunk: Bytes::from(vec![0x5a; FRAME_BYTES]),
            _connection: connection,
            _endpoint: endpoint,
            runtime,
            peer,
        };
        // The other end learns of streams, in their order, with the first bytes on them.
        primary.bare(1)?;
        Ok(primary)
    }

    /// Sends so many bytes, and waits until the other end says that it has them.
    fn bare(&mut self, bytes: u64) -> Result<u64, Unable> {
        let work = async {
            let told = Bytes::copy_from_slice(&bytes.to_le_bytes());
            self.tell.send(told).await?;
            let mut left = bytes;
            while left > 0 {
                let mut batch = Vec::with_capacity(BATCH_FRAMES);
                while left > 0 && batch.len() < BATCH_FRAMES {
                    let next = left.min(FRAME_BYTES as u64);
                    batch.push(self.chunk.slice(..usize::try_from(next).unwrap_or(FRAME_BYTES)));
                    left -= next;
                }
                self.bare.send_all(&mut batch).await?;
            }
            self.numbers.next().await
        };
        let limited = async { tokio::time::timeout(LIMIT, work).await };
        let mut done = Ok(Ok(None));
        let time_ns = timed(|| done = self.runtime.block_on(limited));
        let got = done
            .map_err(Unable::failed("sending bare bytes in time"))?
            .map_err(Unable::failed("sending bare bytes"))?;
        if got != Some(bytes) {
            return Err(Unable::Wrong(format!("of {bytes} bytes, {got:?} arrived")));
        }
        Ok(time_ns)
    }

    /// Sends checkpoints, a few at a time under way, and waits for the last one's commit.
    fn commit(&mut self, checkpoints: Vec<Ready>) -> Result<u64, Unable> {
        let in_flight_max = u64::from(Epochs::default().in_flight_max);
        let first = checkpoints.first().map_or(0, |ready| ready.epoch.0);
        let last = checkpoints.last().map_or(0, |ready| ready.epoch.0);
        let work = async {
            let mut expected = first;
            for ready in checkpoints {
                while ready.epoch.0 >= expected + in_flight_max {
                    ensure_next(self.numbers.next().await, &mut expected)?;
                }
                for batch in ready.frames.chunks(BATCH_FRAMES) {
                    let sent = self.frames.send_all(&mut batch.to_vec()).await;
                    sent.map_err(Unable::failed("sending frames"))?;
                }
            }
            while expected <= last {
                ensure_next(self.numbers.next().await, &mut expected)?;
            }
            Ok::<(), Unable>(())
        };
        let limited = async { tokio::time::timeout(LIMIT, work).await };
        let mut done = Ok(Ok(()));
        let time_ns = timed(|| done = self.runtime.block_on(limited));
        done.map_err(Unable::failed("committing in time"))??;
        Ok(time_ns)
    }
}

fn ensure_next(got: Result<Option<u64>, TransportError>, expected: &mut u64) -> Result<(), Unable> {
    let got = got.map_err(Unable::failed("waiting for a commit"))?;
    if got != Some(*expected) {
        return Err(Unable::Wrong(format!(
            "epoch {expected} should have been committed next, not {got:?}: the other process may have refused it"
        )));
    }
    *expected += 1;
    Ok(())
}

/// Nanoseconds for a MiB.
fn a_mib(time_ns: u64, bytes: u64) -> u64 {
    let nanoseconds = u128::from(time_ns) << 20;
    u64::try_from(nanoseconds / u128::from(bytes.max(1))).unwrap_or(u64::MAX)
}

impl Committed {
    fn row(&self, run: &mut Run, content: Content) -> Result<(), Unable> {
        let guest_pages = u64::from(self.memory_mib) * 256;
        let mut guest = Guest::new(content, self.pages, guest_pages, run);
        let mut primary = Primary::connect(guest_pages, self.mtu)?;
        let watch = Watch::new(primary.peer.process.id());
        let mut costs = [Cost::default(); 2];
        let (mut bytes, mut page_bytes) = (u64::from(self.pages) * PAGE_BYTES as u64, 0);
        let [reference, value] = run.in_turn(content.name(), self.rounds, |one| {
            if one == 0 {
                let time_ns = watch.during(&mut costs[0], bytes, || primary.bare(bytes))?;
                return Ok(a_mib(time_ns, bytes));
            }
            let ready = (0..self.epochs).map(|_| guest.checkpoint());
            let ready: Vec<Ready> = ready.collect::<Result<_, _>>()?;
            bytes = ready.iter().map(Ready::bytes).sum();
            page_bytes = bytes / (u64::from(self.pages) * u64::from(self.epochs));
            let time_ns = watch.during(&mut costs[1], bytes, || primary.commit(ready))?;
            Ok(a_mib(time_ns, bytes))
        })?;
        let unit = Unit {
            name: "ns/MiB",
            size: 1.0,
        };
        if let Some((value, reference)) = value.figure(unit).zip(reference.figure(unit)) {
            let speed = |figure: &Figure| 1e9 / figure.p50 * MIB / 1e6;
            let note = format!(
                "{:.0} MB/s committed, {:.0} MB/s bare; {page_bytes} bytes a page, {} commits of {} pages; \
                 processor, us/MiB: {} committed, {} bare",
                speed(&value),
                speed(&reference),
                guest.epoch.0,
                self.pages,
                costs[1],
                costs[0]
            );
            let at: [(&str, Parameter); 3] = [
                ("content", content.name().into()),
                ("pages", self.pages.into()),
                ("mtu", self.mtu.into()),
            ];
            let finding = Finding {
                case: format!("{}/mtu-{}", content.name(), self.mtu),
                unit: unit.name,
                value,
                reference: Some(("bare QUIC stream of the same connection".to_owned(), reference)),
                note: Some(note),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }
}

impl Measure for Committed {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        self.contents
            .iter()
            .try_for_each(|content| self.row(run, *content))
    }

    fn problem(&self) -> Option<String> {
        let network = network(self.mtu);
        let guest_pages = u64::from(self.memory_mib) * 256;
        outside("memory_mib", self.memory_mib.into(), 1, 1024)
            .or_else(|| outside("pages", self.pages.into(), 1, guest_pages.min(1 << 16)))
            .or_else(|| outside("epochs", self.epochs.into(), 1, 1000))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 100_000))
            .or_else(|| network.check().err().map(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_is_told_for_each_mebibyte() {
        assert_eq!(a_mib(3_000, 3 << 20), 1_000);
        assert_eq!(a_mib(1, 0), 1 << 20);
    }
}
