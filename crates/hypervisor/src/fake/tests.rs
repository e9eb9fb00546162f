//! What the fakes promise.

use std::fs;

use romulus_types::{PAGE_BYTES, PageIndex};

use super::*;
use crate::source::{BarrierError, Checkpoint, GuestEvent, GuestSource};
use crate::standby::{Committed, Standby, StandbyError};

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
        standby.activate(&committed, &mut || Ok(()))?;
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
