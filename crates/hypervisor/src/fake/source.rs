//! The source side of the fake.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use romulus_types::{BlockId, PAGE_BYTES, PageIndex, RamBlock, RamLayout};

use super::guest::{FakeGuest, Inner};
use super::source_error;
use crate::source::{BarrierError, CaptureReport, Checkpoint, GuestEvent, GuestSource, SourceError};
use crate::spec::{Hypervisor, MachineSpec, SPEC_FORMAT};

/// A fake guest as a source of checkpoints.
#[derive(Debug)]
pub struct FakeSource {
    guest: FakeGuest,
    spec: MachineSpec,
}

impl FakeSource {
    /// A guest of two blocks, with `pages` pages of main memory and 4 more; `seed` decides what it writes.
    pub fn new(pages: u64, seed: u64) -> Self {
        let spec = spec(pages);
        let bytes = usize::try_from(spec.layout.bytes()).expect("a fake guest is small");
        let inner = Inner {
            memory: vec![0; bytes],
            random: seed,
            step: 0,
            dirty: None,
            running: true,
            stopped_for_good: false,
            fail_next: false,
            events: Vec::new(),
        };
        Self {
            guest: FakeGuest(Arc::new(Mutex::new(inner))),
            spec,
        }
    }

    /// A hand on the guest.
    pub fn guest(&self) -> FakeGuest {
        self.guest.clone()
    }

    /// Ends a capture or precopy that took the dirty pages: they are forgotten only if it went well.
    fn settle(inner: &mut Inner, outcome: Result<(), SourceError>) -> Result<(), SourceError> {
        let failed = std::mem::take(&mut inner.fail_next);
        let outcome = outcome.and_then(|()| {
            if failed {
                Err(source_error("the test wants it"))
            } else {
                Ok(())
            }
        });
        if outcome.is_ok() {
            inner.dirty = Some(BTreeSet::new());
        }
        outcome
    }
}

fn spec(pages: u64) -> MachineSpec {
    let blocks = [("fake.ram", pages), ("fake.vram", 4)];
    let blocks = blocks.map(|(name, pages)| RamBlock {
        name: name.into(),
        bytes: pages * PAGE_BYTES as u64,
    });
    MachineSpec {
        format: SPEC_FORMAT,
        version: "0".into(),
        host_cpu: "none".into(),
        vcpus: 1,
        layout: RamLayout::new(blocks.to_vec()).expect("a fake guest has at least one page"),
        main: BlockId(0),
        nics: vec![],
        disks: vec![],
        disposable: vec![],
        hypervisor: Hypervisor::Fake,
    }
}

impl GuestSource for FakeSource {
    fn bootstrap(&mut self) -> Result<(), SourceError> {
        Ok(())
    }

    fn machine(&self) -> &MachineSpec {
        &self.spec
    }

    fn layout(&self) -> &RamLayout {
        &self.spec.layout
    }

    fn arm(&mut self) -> Result<(), SourceError> {
        self.guest.lock().dirty = Some(BTreeSet::new());
        Ok(())
    }

    fn read_pages(&mut self, first: PageIndex, into: &mut [u8]) -> Result<(), SourceError> {
        let inner = self.guest.lock();
        let from = usize::try_from(first.0)
            .ok()
            .and_then(|page| page.checked_mul(PAGE_BYTES));
        let pages = from.and_then(|from| inner.memory.get(from..)?.get(..into.len()));
        into.copy_from_slice(pages.ok_or_else(|| source_error("pages past the end were asked for"))?);
        Ok(())
    }

    fn precopy(&mut self, into: &mut Checkpoint) -> Result<(), SourceError> {
        let inner = &mut *self.guest.lock();
        let taken = inner.harvest(into);
        Self::settle(inner, taken)
    }

    fn capture(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), BarrierError>,
        stay_stopped: bool,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, SourceError> {
        let inner = &mut *self.guest.lock();
        if !inner.running {
            return Err(source_error("the guest does not run"));
        }
        let taken = barrier().map_err(|error| SourceError::new("the checkpoint does not count", error));
        let taken = taken.and_then(|()| inner.harvest(into));
        Self::settle(inner, taken)?;
        into.device_state = inner.state();
        inner.running = !stay_stopped;
        Ok(CaptureReport {
            dirty_pages: into.pages.len() as u64,
            ..CaptureReport::default()
        })
    }

    fn poll_events(&mut self) -> Vec<GuestEvent> {
        std::mem::take(&mut self.guest.lock().events)
    }

    fn stop_guest(&mut self) -> Result<(), SourceError> {
        let mut inner = self.guest.lock();
        (inner.running, inner.stopped_for_good) = (false, true);
        Ok(())
    }

    fn suspend(&mut self) -> Result<(), SourceError> {
        self.guest.lock().running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), SourceError> {
        let mut inner = self.guest.lock();
        if inner.stopped_for_good {
            return Err(source_error("it was stopped for good"));
        }
        inner.running = true;
        Ok(())
    }

    fn detach(self: Box<Self>) -> Result<(), SourceError> {
        self.guest.lock().dirty = None;
        Ok(())
    }
}
