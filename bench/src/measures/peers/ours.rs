//! Our own checkpoints of a stock QEMU, taken by the code that the replicator takes them with, while another thread encodes them.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use romulus_host_sys::priority;
use romulus_hypervisor::qemu::source::{AttachOptions, GuardianProgram, QemuSource};
use romulus_hypervisor::source::{Checkpoint, GuestSource};
use romulus_page_codec::{HeldPages, SessionEncoder};
use romulus_types::{PAGE_BYTES, PageIndex, Session};

use super::qemu::{LIMIT, Qemu};
use crate::run::Unable;
use crate::stats::float;

const CHUNK_PAGES: usize = 256;
/// Rounds of live copying before the first checkpoint, as the replicator makes them.
const PRECOPIES: u32 = 3;
/// Checkpoints that wait for the encoder, as many as the replicator has in flight.
const WAITING_MAX: usize = 4;
/// A guest that ends spoils the figures.
const ENDS: &str = "SHUTDOWN";
/// What a replicator keeps of last versions of pages.
const PREVIOUS_BYTES: u64 = 256 << 20;

/// What checkpoints of a guest were like.
pub(super) struct Checkpoints {
    pub(super) pauses_us: Vec<u64>,
    /// Dirty pages of a checkpoint.
    pub(super) pages: f64,
    /// Until all memory was copied and encoded, and how large that is.
    pub(super) first_copy_ms: f64,
    pub(super) first_copy_bytes: u64,
    /// What a guest of firmware took for a round while they were taken, in microseconds.
    pub(super) round_us: f64,
}

/// Pages to encode.
enum Job {
    Memory(PageIndex, Vec<u8>),
    Checkpoint(Checkpoint),
}

/// Encodes, and gives used checkpoints back. Ends with the bytes that it made.
fn encoder(pages: u64, jobs: Receiver<Job>, used: SyncSender<Checkpoint>) -> JoinHandle<u64> {
    thread::spawn(move || {
        priority::lower();
        let mut encoder = SessionEncoder::new(HeldPages::new(Session(1), pages), PREVIOUS_BYTES);
        let mut bytes = 0;
        while let Ok(job) = jobs.recv() {
            let mut encode = |page, contents| {
                bytes += encoder
                    .encode(page, contents)
                    .map_or(0, |(_, payload)| payload.len() as u64);
            };
            match job {
                Job::Memory(first, data) => {
                    let pages = (first.0..).map(PageIndex).zip(data.as_chunks::<PAGE_BYTES>().0);
                    pages.for_each(|(page, contents)| encode(page, contents));
                }
                Job::Checkpoint(checkpoint) => {
                    checkpoint
                        .page_contents()
                        .for_each(|(page, contents)| encode(page, contents));
                    // Nobody may wait for it any more.
                    let _ = used.try_send(checkpoint);
                }
            }
        }
        bytes
    })
}

/// Takes so many checkpoints, one each interval.
pub(super) fn checkpoints(
    qemu: &mut Qemu,
    dir: &Path,
    interval: Duration,
    count: usize,
) -> Result<Checkpoints, Unable> {
    let exe = std::env::current_exe().map_err(Unable::failed("finding this program"))?;
    let guardian = GuardianProgram {
        exe,
        args: vec!["guardian".to_owned()],
    };
    let mut options = AttachOptions::new(&qemu.socket, guardian);
    options.fifo_dir = dir.join("fifo");
    options.allow.disposable.insert("serial0".to_owned());
    // What is measured must not be killed for it.
    options.pause_limit_ns = 10_000_000_000;
    let begun = Instant::now();
    let mut source = QemuSource::attach(options).map_err(Unable::failed("attaching"))?;
    source
        .bootstrap()
        .map_err(Unable::failed("reading the machine"))?;
    source.arm().map_err(Unable::failed("starting to track"))?;
    let first_copy_bytes = first_copy(&mut source)?;
    let first_copy_ms = begun.elapsed().as_secs_f64() * 1e3;
    // What attaching made QEMU say.
    qemu.pauses_us(usize::MAX, Duration::ZERO, ENDS)?;
    let pages = source.layout().page_count();
    let (jobs, to_encode) = sync_channel(WAITING_MAX);
    let (used, free) = sync_channel(WAITING_MAX + 1);
    let encoding = encoder(pages, to_encode, used);
    let (before, began) = (qemu.count()?, Instant::now());
    let taken = take(&mut source, interval, count, &jobs, &free);
    let round_us = qemu.round_us(before, began)?;
    drop(jobs);
    let encoded = encoding.join();
    let detached = Box::new(source).detach();
    let dirty = taken?;
    encoded.map_err(|_| Unable::Wrong("the encoder panicked".to_owned()))?;
    let pauses_us = qemu.pauses_us(count, LIMIT, ENDS)?;
    detached.map_err(Unable::failed("detaching"))?;
    if pauses_us.len() != count {
        let what = format!("QEMU told of {} pauses, not of {count}", pauses_us.len());
        return Err(Unable::Wrong(what));
    }
    Ok(Checkpoints {
        pauses_us,
        pages: float(dirty) / float(count as u64),
        first_copy_ms,
        first_copy_bytes,
        round_us,
    })
}

/// Copies all memory while the guest runs, and encodes it: bytes.
fn first_copy(source: &mut QemuSource) -> Result<u64, Unable> {
    let pages = source.layout().page_count();
    let (jobs, to_encode) = sync_channel(WAITING_MAX);
    let (used, _free) = sync_channel(1);
    let encoding = encoder(pages, to_encode, used);
    for first in (0..pages).step_by(CHUNK_PAGES) {
        let count = usize::try_from(pages - first).map_or(CHUNK_PAGES, |left| left.min(CHUNK_PAGES));
        let mut data = vec![0; count * PAGE_BYTES];
        source
            .read_pages(PageIndex(first), &mut data)
            .map_err(Unable::failed("the first copy"))?;
        let sent = jobs.send(Job::Memory(PageIndex(first), data));
        sent.map_err(|_| Unable::Wrong("the encoder ended".to_owned()))?;
    }
    for _ in 0..PRECOPIES {
        let mut checkpoint = Checkpoint::default();
        source
            .precopy(&mut checkpoint)
            .map_err(Unable::failed("copying live"))?;
        let sent = jobs.send(Job::Checkpoint(checkpoint));
        sent.map_err(|_| Unable::Wrong("the encoder ended".to_owned()))?;
    }
    drop(jobs);
    encoding
        .join()
        .map_err(|_| Unable::Wrong("the encoder panicked".to_owned()))
}

/// The checkpoints themselves, with the priority of the replicator's capture thread: pages of all of them.
fn take(
    source: &mut QemuSource,
    interval: Duration,
    count: usize,
    jobs: &SyncSender<Job>,
    free: &Receiver<Checkpoint>,
) -> Result<u64, Unable> {
    let mut dirty = 0;
    let mut next = Instant::now();
    for _ in 0..count {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let mut checkpoint = free.try_recv().unwrap_or_default();
        priority::raise();
        let report = source.capture(&mut || Ok(()), false, &mut checkpoint);
        priority::lower();
        report.map_err(Unable::failed("taking a checkpoint"))?;
        dirty += checkpoint.pages.len() as u64;
        let sent = jobs.send(Job::Checkpoint(checkpoint));
        sent.map_err(|_| Unable::Wrong("the encoder ended".to_owned()))?;
        next = (next + interval).max(Instant::now());
    }
    match source.poll_events().as_slice() {
        [] => Ok(dirty),
        events => Err(Unable::Wrong(format!("the guest did not just run: {events:?}"))),
    }
}
