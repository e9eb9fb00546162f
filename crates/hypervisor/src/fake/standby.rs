//! The standby side of the fake.

use std::fs;
use std::path::{Path, PathBuf};

use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{Digest, PAGE_BYTES, PageIndex};
use xxhash_rust::xxh3::xxh3_128;

use super::STATE_MAGIC;
use crate::standby::{ActivationReport, Committed, Standby, StandbyError, TrialReport};

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

    fn activate(
        &mut self,
        checkpoint: &Committed<'_>,
        consume: &mut dyn FnMut() -> Result<(), StandbyError>,
    ) -> Result<ActivationReport, StandbyError> {
        let warm = self.waiting;
        self.start_waiting(checkpoint.ram)?;
        self.waiting = false;
        consume().map_err(StandbyError::untouched)?;
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

    fn guest_end(&mut self) -> Option<String> {
        None
    }

    fn pid(&self) -> Option<u32> {
        None
    }

    fn taps(&self) -> &[String] {
        &[]
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
