//! Records what a guest writes from checkpoint to checkpoint: one of the test VMM, or a Linux in QEMU.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use romulus_hypervisor::kvm::source::{AttachOptions, KvmSource};
use romulus_hypervisor::source::{Checkpoint, GuestSource};
use romulus_page_codec::Page;
use romulus_types::{PAGE_BYTES, PageIndex};

use super::file::{TRACE_BYTES_MAX, Trace, Written};
use super::redis::{self, Load};
use crate::measures::kvm::default_mode;
use crate::measures::kvm::guest::{Guest, Wanted};
use crate::measures::qemu;
use crate::run::Unable;

/// What a workload is called under which the guest's service is asked by clients.
const REDIS: &str = "redis";
/// The same of a real Redis in a Linux under QEMU's TCG.
const LINUX_REDIS: &str = "linux-redis";
/// Before the name of a program that such a Linux has at work. Any other name of a workload is a word for the guest's dirtier.
const LINUX: &str = "linux-";
const CHUNK_PAGES: usize = 256;
/// Rounds of live copying before the first checkpoint, as the replicator makes them.
const PRECOPIES: u32 = 3;
/// Epochs before those that are recorded: the first has what was written during the first copy.
const SETTLE_EPOCHS: u32 = 20;
/// How long it may take until the guest has written anything.
const WORK_LIMIT: Duration = Duration::from_secs(60);

/// Who does what is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worker<'w> {
    /// The service of the test VMM's guest.
    Service,
    /// Redis in the Linux.
    Redis,
    /// Another program in it.
    Program(&'w str),
    /// The dirtier of the test VMM's guest, with this word.
    Dirtier(&'w str),
}

impl<'w> Worker<'w> {
    /// Of a workload by its name.
    pub(super) fn of(workload: &'w str) -> Self {
        let program = workload.strip_prefix(LINUX);
        match (workload, program) {
            (REDIS, _) => Self::Service,
            (LINUX_REDIS, _) => Self::Redis,
            (_, Some(program)) if qemu::PROGRAMS.contains(&program) => Self::Program(program),
            _ => Self::Dirtier(workload),
        }
    }
}

/// What to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) workload: String,
    pub(super) memory_mib: u32,
    pub(super) epoch_ms: u32,
    pub(super) epochs: u32,
}

impl Wish {
    fn wanted(&self, words: String) -> Wanted {
        Wanted {
            memory_mib: self.memory_mib,
            vcpus: 1,
            mode: default_mode(),
            words,
        }
    }

    /// Runs the guest, and records.
    pub(super) fn record(&self) -> Result<Trace, Unable> {
        match Worker::of(&self.workload) {
            Worker::Dirtier(dirty) => {
                let words = format!("check=off log=off progress=on dirty={dirty}");
                let mut guest = Guest::start(&self.wanted(words))?;
                guest.done()?;
                self.record_kvm(&guest)
            }
            Worker::Program(program) => self.record_program(program),
            Worker::Service => in_network(|| {
                let words = format!("{} check=off log=off", redis::WORDS);
                let guest = Guest::start_with(&self.wanted(words), &["--tap", redis::TAP])?;
                under_load(|| self.record_kvm(&guest))
            }),
            Worker::Redis => in_network(|| {
                let guest = self.boot_linux(Some(redis::TAP), redis::LINUX_WORDS)?;
                under_load(|| self.record_qemu(&guest))
            }),
        }
    }

    fn record_program(&self, program: &str) -> Result<Trace, Unable> {
        let guest = self.boot_linux(None, &format!("wl=redis,work:{program}"))?;
        guest.wait_for_round(program)?;
        let trace = self.record_qemu(&guest)?;
        // It has not gone wrong or stopped while it was recorded.
        guest.wait_for_round(program)?;
        Ok(trace)
    }

    fn boot_linux(&self, tap: Option<&str>, words: &str) -> Result<qemu::Guest, Unable> {
        qemu::Guest::boot(&qemu::Wanted {
            memory_mib: self.memory_mib,
            populated: false,
            programs: tap.is_none(),
            tap,
            kernel_words: format!("no_timer_check {words}"),
        })
    }

    fn record_qemu(&self, guest: &qemu::Guest) -> Result<Trace, Unable> {
        let mut source = guest.attach()?;
        let trace = self.record_source(&mut source)?;
        Box::new(source).detach().map_err(Unable::failed("detaching"))?;
        Ok(trace)
    }

    fn record_kvm(&self, guest: &Guest) -> Result<Trace, Unable> {
        let mut options = AttachOptions::new(&guest.socket);
        // Nobody gates what it sends: it is never taken over.
        options.allow.disposable.insert("net0".to_owned());
        let mut source = KvmSource::attach(options).map_err(Unable::failed("attaching"))?;
        source
            .bootstrap()
            .map_err(Unable::failed("reading the machine"))?;
        source.arm().map_err(Unable::failed("starting to track"))?;
        let trace = self.record_source(&mut source)?;
        Box::new(source).detach().map_err(Unable::failed("detaching"))?;
        Ok(trace)
    }

    /// Of a guest that is tracked from now on.
    fn record_source(&self, source: &mut dyn GuestSource) -> Result<Trace, Unable> {
        let mut before: BTreeMap<u64, Page> = BTreeMap::new();
        let guest_pages = source.layout().page_count();
        let mut chunk = vec![0; CHUNK_PAGES * PAGE_BYTES];
        for first in (0..guest_pages).step_by(CHUNK_PAGES) {
            let count =
                usize::try_from(guest_pages - first).map_or(CHUNK_PAGES, |left| left.min(CHUNK_PAGES));
            let bytes = &mut chunk[..count * PAGE_BYTES];
            source
                .read_pages(PageIndex(first), bytes)
                .map_err(Unable::failed("the first copy"))?;
            let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
            (first..)
                .zip(pages)
                .for_each(|(place, page)| keep(&mut before, place, page));
        }
        let mut checkpoint = Checkpoint::default();
        for _ in 0..PRECOPIES {
            source
                .precopy(&mut checkpoint)
                .map_err(Unable::failed("copying live"))?;
            let pages = checkpoint.page_contents();
            pages.for_each(|(place, page)| keep(&mut before, place.0, page));
        }
        let interval = Duration::from_millis(self.epoch_ms.into());
        for _ in 0..SETTLE_EPOCHS {
            let pages = next_epoch(source, interval, &mut checkpoint)?;
            pages
                .iter()
                .for_each(|(place, page)| keep(&mut before, *place, page));
        }
        let mut trace = Trace {
            name: self.workload.clone(),
            guest_pages,
            epoch_ms: self.epoch_ms,
            before: Written::of(before),
            epochs: Vec::new(),
        };
        let mut room = TRACE_BYTES_MAX / PAGE_BYTES as u64 - trace.before.pages.len() as u64;
        let begun = Instant::now();
        // On a machine that does much else a guest may not have been on a core in a few epochs.
        while trace.epochs.len() < self.epochs as usize
            || (trace.page_count() == 0 && begun.elapsed() < WORK_LIMIT)
        {
            let pages = Written::of(next_epoch(source, interval, &mut checkpoint)?);
            room = room
                .checked_sub(pages.pages.len() as u64)
                .ok_or_else(|| Unable::Wrong(format!("the trace is over {TRACE_BYTES_MAX} bytes")))?;
            trace.epochs.push(pages);
        }
        // A guest that somebody else stopped, or that ended, has not worked.
        match source.poll_events().as_slice() {
            [] if trace.page_count() > 0 => Ok(trace),
            [] => Err(Unable::Wrong(
                "the guest wrote nothing while it was recorded".to_owned(),
            )),
            events => Err(Unable::Wrong(format!("the guest did not just run: {events:?}"))),
        }
    }
}

/// Does it on a thread of its own, which the network goes away with.
fn in_network(record: impl FnOnce() -> Result<Trace, Unable> + Send) -> Result<Trace, Unable> {
    std::thread::scope(|scope| {
        let recorder = scope.spawn(|| {
            redis::enter_network()?;
            record()
        });
        let joined = recorder.join();
        joined.unwrap_or_else(|_| Err(Unable::Wrong("the recorder panicked".to_owned())))
    })
}

/// While clients keep the guest's service busy.
fn under_load(record: impl FnOnce() -> Result<Trace, Unable>) -> Result<Trace, Unable> {
    match Load::during(record)? {
        (_, 0) => Err(Unable::Wrong(
            "the guest answered nothing while it was recorded".to_owned(),
        )),
        (trace, _) => Ok(trace),
    }
}

/// Lets the guest run for an epoch, and takes what it wrote.
fn next_epoch(
    source: &mut dyn GuestSource,
    length: Duration,
    checkpoint: &mut Checkpoint,
) -> Result<BTreeMap<u64, Page>, Unable> {
    std::thread::sleep(length);
    source
        .capture(&mut || Ok(()), false, checkpoint)
        .map_err(Unable::failed("taking a checkpoint"))?;
    let pages = checkpoint.page_contents();
    Ok(pages.map(|(place, page)| (place.0, *page)).collect())
}

/// What was zeros and is zeros needs no place.
fn keep(all: &mut BTreeMap<u64, Page>, place: u64, page: &Page) {
    if *page == [0; PAGE_BYTES] {
        all.remove(&place);
    } else {
        all.insert(place, *page);
    }
}
