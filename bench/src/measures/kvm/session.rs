//! The replicator's end of a session, without a backup: attach, copy all memory once, take checkpoints.

use std::time::{Duration, Instant};

use romulus_host_sys::priority;
use romulus_hypervisor::kvm::source::{AttachOptions, KvmSource};
use romulus_hypervisor::source::{CaptureReport, Checkpoint, GuestSource};
use romulus_types::{PAGE_BYTES, PageIndex};

use super::guest::Guest;
use crate::run::Unable;

const CHUNK_PAGES: usize = 256;
/// Rounds of live copying before the first checkpoint, as the replicator makes them…
const PRECOPIES: u32 = 3;
/// …and more, up to so many, until a round has no more than these pages: the first copy of a large guest takes long on a busy host.
const PRECOPIES_MAX: u32 = 100;
const PRECOPY_PAGES: usize = 32_768;
/// A checkpoint of all of a guest's memory is slow, but no failure of what is measured.
const CHECKPOINT_PAGES_MAX: u64 = 1 << 20;

/// An attached guest. Detached when dropped.
pub(super) struct Session {
    source: Option<KvmSource>,
    pub(super) checkpoint: Checkpoint,
}

impl Session {
    /// Attaches, and hands every page of the first copy to `keep`.
    pub(super) fn begin(guest: &Guest, mut keep: impl FnMut(PageIndex, &[u8])) -> Result<Self, Unable> {
        let mut options = AttachOptions::new(&guest.socket);
        // What is measured must not be cut short for it.
        options.pause_limit_ns = 1_000_000_000;
        options.checkpoint_pages_max = CHECKPOINT_PAGES_MAX;
        let mut source = KvmSource::attach(options).map_err(Unable::failed("attaching"))?;
        source
            .bootstrap()
            .map_err(Unable::failed("reading the machine"))?;
        source.arm().map_err(Unable::failed("starting to track"))?;
        let mut chunk = vec![0; CHUNK_PAGES * PAGE_BYTES];
        let pages = source.layout().page_count();
        for first in (0..pages).step_by(CHUNK_PAGES) {
            let count = usize::try_from(pages - first).map_or(CHUNK_PAGES, |left| left.min(CHUNK_PAGES));
            let bytes = &mut chunk[..count * PAGE_BYTES];
            source
                .read_pages(PageIndex(first), bytes)
                .map_err(Unable::failed("the first copy"))?;
            keep(PageIndex(first), bytes);
        }
        let mut session = Self {
            source: Some(source),
            checkpoint: Checkpoint::default(),
        };
        for round in 1..=PRECOPIES_MAX {
            let (source, checkpoint) = session.parts();
            source
                .precopy(checkpoint)
                .map_err(Unable::failed("copying live"))?;
            for (page, bytes) in session.checkpoint.page_contents() {
                keep(page, bytes);
            }
            if round >= PRECOPIES && session.checkpoint.pages.len() <= PRECOPY_PAGES {
                break;
            }
        }
        Ok(session)
    }

    fn parts(&mut self) -> (&mut KvmSource, &mut Checkpoint) {
        let source = self.source.as_mut().expect("it is there until the end");
        (source, &mut self.checkpoint)
    }

    /// Takes a checkpoint, with the priority of the replicator's capture thread.
    pub(super) fn capture(&mut self) -> Result<CaptureReport, Unable> {
        let (source, checkpoint) = self.parts();
        priority::raise();
        let report = source.capture(&mut || Ok(()), false, checkpoint);
        priority::lower();
        let report = report.map_err(Unable::failed("taking a checkpoint"))?;
        // A pause by somebody else, or a guest that ended, spoils the figures.
        match source.poll_events().as_slice() {
            [] => Ok(report),
            events => Err(Unable::Wrong(format!("the guest did not just run: {events:?}"))),
        }
    }

    /// Takes a checkpoint each `interval` for so long, and hands each to `each` while the guest runs.
    pub(super) fn captures(
        &mut self,
        interval: Duration,
        duration: Duration,
        mut each: impl FnMut(&CaptureReport, &Checkpoint),
    ) -> Result<(), Unable> {
        let end = Instant::now() + duration;
        let mut next = Instant::now();
        while next < end {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            let report = self.capture()?;
            each(&report, &self.checkpoint);
            // One that came late is not made up for: the epoch was longer.
            next = (next + interval).max(Instant::now());
        }
        Ok(())
    }

    /// The guest stands still until [`Session::go_on`]; it runs on if we die.
    pub(super) fn hold(&mut self) -> Result<(), Unable> {
        self.parts()
            .0
            .suspend()
            .map_err(Unable::failed("halting the guest"))
    }

    pub(super) fn go_on(&mut self) -> Result<(), Unable> {
        self.parts()
            .0
            .resume()
            .map_err(Unable::failed("letting the guest run"))
    }

    pub(super) fn source(&self) -> &KvmSource {
        self.source.as_ref().expect("it is there until the end")
    }

    /// Detaches: nothing is tracked any more.
    pub(super) fn end(mut self) -> Result<(), Unable> {
        let source = self.source.take().expect("it is there until the end");
        Box::new(source).detach().map_err(Unable::failed("detaching"))
    }
}
