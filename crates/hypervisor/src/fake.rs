//! A guest and a standby without a hypervisor, for tests of everything above: deterministic, in memory, and strict.
//!
//! The guest is a counter that writes a few pages a step, chosen by a seed. Its device state holds the step and a digest of all
//! memory at that moment, so [`FakeStandby`] notices any page that a checkpoint lost, mixed or made up, and the
//! activated guest is known to go on from exactly one step.
//!
//! A test keeps a [`FakeGuest`] to run the guest, raise events and make the next capture fail.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{BlockId, Digest, PAGE_BYTES, PageIndex, RamBlock, RamLayout};
use xxhash_rust::xxh3::xxh3_128;

use crate::qemu::stream::{StreamBlock, Template};
use crate::source::{BarrierError, CaptureReport, Checkpoint, GuestEvent, GuestSource, SourceError};
use crate::spec::{Hypervisor, MachineSpec, SPEC_FORMAT};
use crate::standby::{ActivationReport, Committed, Standby, StandbyError, TrialReport};

const STATE_MAGIC: &[u8; 8] = b"ROMFAKE1";
/// Pages written a step.
const PAGES_A_STEP: usize = 4;

/// Why a fake refuses: a rule of the traits was broken, or the test asked for it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Broken(&'static str);

fn source_error(what: &'static str) -> SourceError {
    SourceError::new("the fake guest refuses", Broken(what))
}

#[derive(Debug)]
struct Inner {
    memory: Vec<u8>,
    random: u64,
    step: u64,
    /// Written since the last harvest; `None` before `arm`.
    dirty: Option<BTreeSet<u64>>,
    running: bool,
    stopped_for_good: bool,
    fail_next: bool,
    events: Vec<GuestEvent>,
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

    fn run(&mut self) {
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

    fn state(&self) -> Vec<u8> {
        [
            STATE_MAGIC.as_slice(),
            &self.step.to_le_bytes(),
            &xxh3_128(&self.memory).to_le_bytes(),
        ]
        .concat()
    }

    fn harvest(&mut self, into: &mut Checkpoint) -> Result<(), SourceError> {
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
pub struct FakeGuest(Arc<Mutex<Inner>>);

impl FakeGuest {
    fn lock(&self) -> MutexGuard<'_, Inner> {
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
    let listed = blocks
        .iter()
        .map(|b| StreamBlock {
            name: b.name.clone(),
            bytes: b.bytes,
            gpa: None,
        })
        .collect();
    MachineSpec {
        format: SPEC_FORMAT,
        hypervisor: Hypervisor::Fake,
        version: "0".into(),
        accelerator: "none".into(),
        cpu_model: "none".into(),
        host_cpu: "none".into(),
        vcpus: 1,
        layout: RamLayout::new(blocks.to_vec()).expect("a fake guest has at least one page"),
        main: BlockId(0),
        argv: vec![],
        cwd: "/".into(),
        nics: vec![],
        files: vec![],
        disks: vec![],
        disposable: vec![],
        template: Template {
            machine: "fake".into(),
            subsections: vec![],
            ram_section: 0,
            blocks: listed,
            vmdesc: "{}".into(),
        },
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

/// A fake standby: it checks the checkpoint instead of running it.
#[derive(Debug, Default)]
pub struct FakeStandby {
    waiting: bool,
    active: Option<u64>,
}

impl FakeStandby {
    /// The step from which the activated guest goes on.
    pub fn step(&self) -> Option<u64> {
        self.active
    }
}

/// The step of a checkpoint, if its memory is exactly that of the step.
fn verify(checkpoint: &Committed<'_>) -> Result<u64, StandbyError> {
    let state = checkpoint.device_state.strip_prefix(STATE_MAGIC);
    let (step, digest) = state
        .and_then(<[u8]>::split_first_chunk::<8>)
        .ok_or_else(|| StandbyError::plain("the device state is not a fake guest's"))?;
    let mut memory = Vec::new();
    for path in checkpoint.ram {
        let read = |path: &Path| fs::read(path);
        memory.extend(
            read(path)
                .map_err(|error| StandbyError::new(format!("could not read {}", path.display()), error))?,
        );
    }
    let image = || {
        let mut image = ImageDigest::ZERO;
        for (index, page) in (0..).map(PageIndex).zip(memory.as_chunks::<PAGE_BYTES>().0) {
            image.replace(Digest(0), page_digest(index, page));
        }
        image.digest()
    };
    if checkpoint.memory.is_some_and(|expected| expected != image()) {
        return Err(StandbyError::plain("the memory is not what was committed"));
    }
    if digest != xxh3_128(&memory).to_le_bytes() {
        return Err(StandbyError::plain("the memory is not that of the device state"));
    }
    Ok(u64::from_le_bytes(*step))
}

impl Standby for FakeStandby {
    fn trial_load(&mut self, checkpoint: &Committed<'_>) -> Result<TrialReport, StandbyError> {
        verify(checkpoint).map(|_| TrialReport::default())
    }

    fn start_waiting(&mut self, _ram: &[PathBuf]) -> Result<(), StandbyError> {
        if self.active.is_some() {
            return Err(StandbyError::plain("the guest runs here already"));
        }
        self.waiting = true;
        Ok(())
    }

    fn activate(&mut self, checkpoint: &Committed<'_>) -> Result<ActivationReport, StandbyError> {
        let warm = self.waiting;
        self.start_waiting(checkpoint.ram)?;
        self.waiting = false;
        self.active = Some(verify(checkpoint)?);
        Ok(ActivationReport {
            warm,
            ..ActivationReport::default()
        })
    }

    fn is_waiting(&mut self) -> bool {
        self.waiting
    }

    fn is_active(&mut self) -> bool {
        self.active.is_some()
    }

    fn pid(&self) -> Option<u32> {
        None
    }

    fn control_path(&self) -> Option<PathBuf> {
        None
    }

    fn differences(&self) -> &[String] {
        &[]
    }

    fn dismiss(&mut self) {
        self.waiting = false;
    }

    fn kill(&mut self) {
        (self.waiting, self.active) = (false, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A backup without a backup: files that checkpoints are applied to.
    struct Image {
        dir: tempfile::TempDir,
        memory: Vec<u8>,
        main_bytes: usize,
        device_state: Vec<u8>,
    }

    impl Image {
        fn copy_of(source: &mut FakeSource) -> Self {
            let mut memory = vec![0; usize::try_from(source.layout().bytes()).unwrap()];
            source.read_pages(PageIndex(0), &mut memory).unwrap();
            let main_bytes = usize::try_from(source.machine().main_bytes()).unwrap();
            Self {
                dir: tempfile::tempdir().unwrap(),
                memory,
                main_bytes,
                device_state: Vec::new(),
            }
        }

        fn apply(&mut self, checkpoint: &Checkpoint) {
            for (page, content) in checkpoint.page_contents() {
                let at = usize::try_from(page.0).unwrap() * PAGE_BYTES;
                self.memory[at..at + PAGE_BYTES].copy_from_slice(content);
            }
            self.device_state.clone_from(&checkpoint.device_state);
        }

        fn activate(&self) -> Result<u64, StandbyError> {
            let (main, rest) = self.memory.split_at(self.main_bytes);
            let ram = ["0", "1"].map(|name| self.dir.path().join(name));
            fs::write(&ram[0], main).unwrap();
            fs::write(&ram[1], rest).unwrap();
            let mut standby = FakeStandby::default();
            let committed = Committed {
                ram: &ram,
                device_state: &self.device_state,
                memory: None,
            };
            standby.trial_load(&committed)?;
            standby.activate(&committed)?;
            Ok(standby.step().unwrap())
        }
    }

    fn pass() -> Result<(), BarrierError> {
        Ok(())
    }

    #[test]
    fn a_guest_goes_on_from_its_last_checkpoint_and_no_failed_capture_forgets_a_page() {
        let mut source = FakeSource::new(64, 7);
        let guest = source.guest();
        guest.run(100);
        source.arm().unwrap();
        let mut image = Image::copy_of(&mut source);
        let mut checkpoint = Checkpoint::default();
        for round in 0..20 {
            guest.run(3);
            if round % 5 == 1 {
                guest.fail_next();
                assert!(source.capture(&mut pass, false, &mut checkpoint).is_err());
                guest.run(1);
            }
            if round % 7 == 2 {
                let mut refused = || Err(BarrierError::new(Box::new(Broken("no barrier"))));
                assert!(source.capture(&mut refused, false, &mut checkpoint).is_err());
                assert!(guest.is_running());
            }
            source.capture(&mut pass, false, &mut checkpoint).unwrap();
            image.apply(&checkpoint);
            assert_eq!(image.activate().unwrap(), guest.step());
        }
        assert_eq!(guest.memory(), image.memory);
    }

    #[test]
    fn the_standby_notices_a_page_that_was_left_out() {
        let mut source = FakeSource::new(16, 1);
        source.arm().unwrap();
        let mut image = Image::copy_of(&mut source);
        source.guest().run(2);
        let mut checkpoint = Checkpoint::default();
        source.capture(&mut pass, true, &mut checkpoint).unwrap();
        assert!(!source.guest().is_running());
        checkpoint.pages.pop();
        image.apply(&checkpoint);
        assert!(image.activate().is_err());
    }

    #[test]
    fn the_same_seed_makes_the_same_guest() {
        let memory = |seed| {
            let source = FakeSource::new(32, seed);
            source.guest().run(50);
            source.guest().memory()
        };
        assert_eq!(memory(3), memory(3));
        assert_ne!(memory(3), memory(4));
    }

    #[test]
    fn the_rules_of_the_traits_are_held() {
        let mut source = FakeSource::new(16, 1);
        let mut checkpoint = Checkpoint::default();
        assert!(
            source.capture(&mut pass, false, &mut checkpoint).is_err(),
            "not armed"
        );
        assert!(
            source.read_pages(PageIndex(20), &mut [0; PAGE_BYTES]).is_err(),
            "past the end"
        );
        source.guest().raise(GuestEvent::Reset);
        assert_eq!(source.poll_events(), [GuestEvent::Reset]);
        source.stop_guest().unwrap();
        assert!(source.resume().is_err(), "stopped for good");
        source.machine().check().unwrap();
    }
}
