//! The backup's end, in a process of its own, which is `bench` started again: it counts what comes on the bare stream, and commits what comes
//! in frames with the agent's own receiver.
//!
//! ```text
//!   runtime's thread   QUIC ─► bare stream: count ──────────────► answer: bytes
//!                           └► frames ─► (32 at most) ─┐
//!   store's thread                                     └► decode, stage, verify, commit ─► answer: epoch; apply
//! ```

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use romulus_backup_agent::receive::{Received, Receiver};
use romulus_backup_agent::vm_image::VmImage;
use romulus_host_sys::priority;
use romulus_hypervisor::fake::FakeSource;
use romulus_hypervisor::source::GuestSource;
use romulus_image::{FolderShelf, Limits, Places, StagingShare};
use romulus_transport::{Connection, Endpoint, FrameReader, Identity, RecvStream, SendStream, Service};
use romulus_types::{Term, VmId};
use romulus_wire::Frame;
use tokio::sync::mpsc;

use super::processor::STORE;
use super::{Numbers, SESSION, network};

/// As the agent has it.
const FRAMES_WAITING_MAX: usize = 32;
const ANSWERS_MAX: usize = 64;

/// What it is told on its command line, in this order.
pub(super) struct Arguments<'a> {
    /// Certificates of this end.
    pub(super) identity: &'a Path,
    /// Where its image goes.
    pub(super) image: &'a Path,
    /// Pages of the guest.
    pub(super) guest_pages: u64,
    /// Of the network's settings.
    pub(super) mtu: u16,
}

impl Arguments<'_> {
    pub(super) fn words(&self) -> [String; 4] {
        [
            self.identity.display().to_string(),
            self.image.display().to_string(),
            self.guest_pages.to_string(),
            self.mtu.to_string(),
        ]
    }
}

/// Serves one connection until it ends. Says on stdout where it listens.
pub(crate) fn main(words: &[String]) -> Result<()> {
    let [identity, image, guest_pages, mtu] = words else {
        anyhow::bail!("only bench itself starts its peers");
    };
    let arguments = Arguments {
        identity: Path::new(identity),
        image: Path::new(image),
        guest_pages: guest_pages.parse()?,
        mtu: mtu.parse()?,
    };
    let (answer, answers) = mpsc::channel(ANSWERS_MAX);
    let (frames, waiting) = mpsc::channel(FRAMES_WAITING_MAX);
    let image = image_of(&arguments)?;
    let committed = answer.clone();
    let storing = move || {
        if let Err(error) = store(image, waiting, &committed) {
            eprintln!("error: {error:#}");
            std::process::exit(1);
        }
    };
    std::thread::Builder::new().name(STORE.into()).spawn(storing)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(&arguments, frames, answer, answers))
}

fn image_of(arguments: &Arguments<'_>) -> Result<VmImage> {
    let places = Places {
        shelf: Arc::new(FolderShelf::new(arguments.image)),
        spill: Arc::new(FolderShelf::new(arguments.image.join("spill"))),
        share: StagingShare::new(u64::MAX),
    };
    let vm = VmId::new("bench").context("a name")?;
    let mut image = VmImage::open(&places, arguments.image, &vm, Limits::default())?;
    // Any machine with so much memory.
    let machine = FakeSource::new(arguments.guest_pages, 1).machine().clone();
    image.begin(SESSION, Arc::new(machine), |_, _| {})?;
    Ok(image)
}

fn store(mut image: VmImage, mut frames: mpsc::Receiver<Frame>, answer: &mpsc::Sender<u64>) -> Result<()> {
    priority::lower();
    let mut receiver = Receiver::new(SESSION, Term(1));
    while let Some(frame) = frames.blocking_recv() {
        if let Received::Committed { epoch, .. } = receiver.frame(&frame, &mut image)? {
            answer.blocking_send(epoch.0).context("nobody is told")?;
            image.apply()?;
        }
    }
    Ok(())
}

async fn serve(
    arguments: &Arguments<'_>,
    frames: mpsc::Sender<Frame>,
    answer: mpsc::Sender<u64>,
    answers: mpsc::Receiver<u64>,
) -> Result<()> {
    let identity = Identity::load(arguments.identity)?;
    let network = network(arguments.mtu);
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::server(&identity, &network, Service::Pair, listen, None)?;
    println!("{}", endpoint.local_addr()?);
    let connection = endpoint.accept().await?;
    let control = connection.accept_control().await?;
    let bare = connection.accept_data().await?;
    tokio::select! {
        done = count(Numbers::of(control.receiver), bare, &answer) => done,
        done = pass_on(&connection, frames) => done,
        done = tell(control.sender, answers) => done,
    }
}

/// Is told how many bytes come, and says so when they are there.
async fn count(mut told: Numbers, mut bare: RecvStream, answer: &mpsc::Sender<u64>) -> Result<()> {
    while let Some(expected) = told.next().await? {
        let mut left = expected;
        while left > 0 {
            let chunk = bare.recv().await?.context("the bare stream ended")?;
            ensure!(chunk.len() as u64 <= left, "more came than was said");
            left -= chunk.len() as u64;
        }
        answer.send(expected).await?;
    }
    Ok(())
}

async fn pass_on(connection: &Connection, frames: mpsc::Sender<Frame>) -> Result<()> {
    let mut reader = FrameReader::for_session(connection.accept_data().await?, SESSION);
    while let Some(frame) = reader.next().await? {
        frames.send(frame).await.context("the store is gone")?;
    }
    std::future::pending().await
}

async fn tell(mut stream: SendStream, mut answers: mpsc::Receiver<u64>) -> Result<()> {
    while let Some(number) = answers.recv().await {
        stream.send(Bytes::copy_from_slice(&number.to_le_bytes())).await?;
    }
    Ok(())
}
