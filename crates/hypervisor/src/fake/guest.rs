//! The guest: a counter that writes pages, and a test's hand on it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use romulus_types::{PAGE_BYTES, PageIndex};
use xxhash_rust::xxh3::xxh3_128;

use super::{STATE_MAGIC, source_error};
use crate::source::{Checkpoint, GuestEvent, SourceError};

/// Pages written a step.
const PAGES_A_STEP: usize = 4;

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) memory: Vec<u8>,
    pub(super) random: u64,
    pub(super) step: u64,
    /// Written since the last harvest; `None` before `arm`.
    pub(super) dirty: Option<BTreeSet<u64>>,
    pub(super) running: bool,
    pub(super) stopped_for_good: bool,
    pub(super) fail_next: bool,
    pub(super) events: Vec<GuestEvent>,
}

impl Inner {
    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn run(&mut self) {
        self.step += 1;
        let pages = (self.memory.len() / PAGE_BYTES) as u64;
        for _ in 0..PAGES_A_STEP {
            let page = self.draw() % pages;
            let word = self.draw();
            let word_offset = usize::try_from(self.step % 512 * 8).expect("it is within a page");
            let at = usize::try_from(page).expect("it is in memory") * PAGE_BYTES + word_offset;
            self.memory[at..at + 8].copy_from_slice(&word.to_le_bytes());
            if let Some(dirty) = &mut self.dirty {
                dirty.insert(page);
            }
        }
    }

    pub(super) fn state(&self) -> Vec<u8> {
        [
            STATE_MAGIC.as_slice(),
            &self.step.to_le_bytes(),
            &xxh3_128(&self.memory).to_le_bytes(),
        ]
        .concat()
    }

    pub(super) fn harvest(&mut self, into: &mut Checkpoint) -> Result<(), SourceError> {
        let dirty = self
            .dirty
            .as_ref()
            .ok_or_else(|| source_error("pages were taken before dirty tracking was armed"))?;
        into.clear();
        into.data.clear();
        for page in dirty {
            let at = usize::try_from(*page).expect("it is in memory") * PAGE_BYTES;
            into.pages.push(PageIndex(*page));
            into.data.extend_from_slice(&self.memory[at..at + PAGE_BYTES]);
        }
        Ok(())
    }
}

/// A test's hand on the guest.
#[derive(Clone, Debug)]
pub struct FakeGuest(pub(super) Arc<Mutex<Inner>>);

impl FakeGuest {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the guest for some steps, if it runs.
    pub fn run(&self, steps: u64) {
        let mut inner = self.lock();
        if inner.running {
            (0..steps).for_each(|_| inner.run());
        }
    }

    /// Steps so far.
    pub fn step(&self) -> u64 {
        self.lock().step
    }

    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        self.lock().running
    }

    /// Has the hypervisor say that something happened.
    pub fn raise(&self, event: GuestEvent) {
        self.lock().events.push(event);
    }

    /// Makes the next capture or precopy fail after it has taken the dirty pages.
    pub fn fail_next(&self) {
        self.lock().fail_next = true;
    }

    /// All of its memory.
    pub fn memory(&self) -> Vec<u8> {
        self.lock().memory.clone()
    }
}
