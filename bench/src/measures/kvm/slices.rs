//! Slices of a guest's life, protected and not, in turn: what it gets done in each.

use std::hint::black_box;
use std::time::{Duration, Instant};

use romulus_guest_core::dirty::Dirtying;
use romulus_hypervisor::source::Checkpoint;
use romulus_page_codec::{HeldPages, SessionEncoder};
use romulus_types::{PAGE_BYTES, PageIndex, Session as SessionNumber};

use super::guest::{Done, Guest, Wanted};
use super::session::Session;
use crate::run::{Run, Unable};
use crate::stats::float;

const PAGES_A_MIB: u64 = 256;
/// As the replicator has it by default.
const PREVIOUS_BYTES_MAX: u64 = 64 << 20;
/// A set that is larger than this allows is measured cold.
const WARM_UP_LIMIT: Duration = Duration::from_secs(3);
const WARM_UP_POLL: Duration = Duration::from_millis(20);

/// Its progress before and after a slice.
#[derive(Clone, Copy, Debug)]
pub(in crate::measures) struct Slice {
    pub(in crate::measures) before: Done,
    pub(in crate::measures) after: Done,
}

/// One slice without protection and one with it.
#[derive(Clone, Debug)]
pub(super) struct Both {
    pub(super) free: Slice,
    pub(super) protected: Slice,
    /// Dirty pages of each checkpoint.
    pub(super) dirty_pages: Vec<u64>,
    pub(super) pauses_ns: Vec<u64>,
}

impl Slice {
    /// Nanoseconds of host time for each unit of work, or for each page written when the guest does nothing but dirty pages.
    pub(in crate::measures) fn ns_a_unit(&self, of: Work) -> Result<f64, Unable> {
        let (before, after) = (self.before.progress, self.after.progress);
        let done = match of {
            Work::Units => after.work_units - before.work_units,
            Work::Pages => after.pages_written - before.pages_written,
        };
        match done {
            0 => Err(Unable::Wrong(
                "the guest got nothing done besides dirtying pages".to_owned(),
            )),
            done => Ok(float(self.ns()) / float(done)),
        }
    }

    /// Length of the slice on the host's clock.
    pub(super) fn ns(&self) -> u64 {
        self.after.at_ns - self.before.at_ns
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::measures) enum Work {
    /// What is left over is spent on arithmetic.
    Units,
    /// It dirties pages as fast as it can.
    Pages,
}

impl Work {
    /// What a guest with this dirtier has to be judged by.
    pub(in crate::measures) fn of(dirty: &str) -> Self {
        match Dirtying::parse(dirty) {
            Ok(Some(dirtying)) if dirtying.period_ms == 0 => Self::Pages,
            _ => Self::Units,
        }
    }
}

/// The command line of a guest that works while it dirties.
pub(super) fn words(dirty: &str) -> String {
    format!("progress=on work=on check=off log=off dirty={dirty}")
}

/// What the replicator does to the pages of a checkpoint before it sends them. Here nobody gets them.
struct Encoder(SessionEncoder);

impl Encoder {
    fn new(memory_mib: u32) -> Self {
        let held = HeldPages::new(SessionNumber(1), u64::from(memory_mib) * PAGES_A_MIB);
        Self(SessionEncoder::new(held, PREVIOUS_BYTES_MAX))
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        for (index, page) in checkpoint.page_contents() {
            black_box(self.0.encode(index, page));
        }
    }

    /// Pages that follow each other.
    fn run_of(&mut self, first: PageIndex, bytes: &[u8]) {
        let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
        for (index, page) in (first.0..).map(PageIndex).zip(pages) {
            black_box(self.0.encode(index, page));
        }
    }
}

/// Lets a new guest work for a slice alone and one under protection.
pub(super) fn both(wanted: &Wanted, slice: Duration, interval: Duration) -> Result<Both, Unable> {
    let mut guest = Guest::start(wanted)?;
    warm_up(&mut guest, &wanted.words)?;
    let before = guest.done()?;
    std::thread::sleep(slice);
    let free = Slice {
        before,
        after: guest.done()?,
    };
    let mut encoder = Encoder::new(wanted.memory_mib);
    let mut session = Session::begin(&guest, |first, bytes| encoder.run_of(first, bytes))?;
    // Until the pace is even: hot pages have become hot.
    session.captures(interval, slice / 4, |_, checkpoint| {
        encoder.checkpoint(checkpoint)
    })?;
    let before = guest.done()?;
    let (mut dirty_pages, mut pauses_ns) = (Vec::new(), Vec::new());
    session.captures(interval, slice, |report, checkpoint| {
        dirty_pages.push(report.dirty_pages);
        pauses_ns.push(report.pause_ns);
        encoder.checkpoint(checkpoint);
    })?;
    let protected = Slice {
        before,
        after: guest.done()?,
    };
    session.end()?;
    Ok(Both {
        free,
        protected,
        dirty_pages,
        pauses_ns,
    })
}

/// Lets the guest touch the pages of its set, which costs it more the first time.
fn warm_up(guest: &mut Guest, words: &str) -> Result<(), Unable> {
    let dirty = words.split(' ').find_map(|word| word.strip_prefix("dirty="));
    let dirtying = dirty.and_then(|dirty| Dirtying::parse(dirty).ok().flatten());
    let set_mib = dirtying.and_then(|dirtying| dirtying.set_mib).unwrap_or(0);
    // Twice around: a random order misses some pages the first time.
    let enough = u64::from(set_mib) * PAGES_A_MIB * 2;
    let begun = Instant::now();
    while guest.done()?.progress.pages_written < enough && begun.elapsed() < WARM_UP_LIMIT {
        std::thread::sleep(WARM_UP_POLL);
    }
    Ok(())
}

/// So long a slice is in this run.
pub(super) fn slice(run: &Run, slice_ms: u32) -> Duration {
    Duration::from_millis(run.rounds(slice_ms).max(100).into())
}

/// Checkpoints, dirty pages in each and their pauses, in words.
pub(super) fn describe(all: &[Both]) -> String {
    let middle = |mut values: Vec<u64>| {
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    };
    let pages: Vec<u64> = all.iter().flat_map(|both| both.dirty_pages.clone()).collect();
    let pauses: Vec<u64> = all.iter().flat_map(|both| both.pauses_ns.clone()).collect();
    format!(
        "{} checkpoints of {} pages, pause {:.2} ms",
        pages.len(),
        middle(pages),
        float(middle(pauses)) / 1e6
    )
}
