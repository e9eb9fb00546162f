//! `kvm.*`: what checkpoints cost a KVM guest, measured with the test VMM and its guest.
//!
//! ```text
//!   guest.rs       `testbed run`, as a process of its own: this program started anew; what its guest has done so far
//!   session.rs     the replicator's end: attach, first copy, checkpoints
//!   alone.rs       the same machine inside of this process: kick, harvest, save and copy, each alone
//!   harvest.rs     finding dirty pages in a large memory
//!   trace/         what a guest wrote, epoch by epoch: recorded, kept in files, encoded
//!   pause.rs, speed.rs, tracking.rs, clock.rs, activation.rs     the measures
//! ```
//!
//! What the guest has done is read from its memory, so that no network and no privilege but /dev/kvm is needed. At any time only one guest
//! works: the others stand still or sleep.

mod activation;
mod alone;
mod clock;
pub(super) mod guest;
mod harvest;
mod pause;
mod session;
pub(super) mod slices;
mod speed;
mod trace;
mod tracking;

use serde::Deserialize;

pub(crate) use activation::Activation;
pub(crate) use clock::Clock;
pub(crate) use harvest::Large;
pub(super) use harvest::affordable_mib;
pub(crate) use pause::Pause;
pub(crate) use speed::Speed;
pub(crate) use trace::{Deltas, Shrink, Speed as TraceSpeed};
pub(crate) use tracking::Modes;

/// How KVM is asked for dirty pages, as `testbed run --tracking` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    Log,
    Manual,
    Ring,
}

impl Mode {
    const ALL: [Self; 3] = [Self::Log, Self::Manual, Self::Ring];

    fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Manual => "manual",
            Self::Ring => "ring",
        }
    }
}

/// The test VMM's default, which `kvm.tracking` puts to the test.
const fn default_mode() -> Mode {
    Mode::Manual
}

/// Of a guest whose work is measured: most of its memory only takes the time of its first copy.
const fn memory_mib() -> u32 {
    256
}

const fn interval_ms() -> u32 {
    25
}

/// What is wrong with a machine's settings.
fn machine_problem(memory_mib: u32, vcpus: u32) -> Option<String> {
    super::outside("memory_mib", memory_mib.into(), 64, 65536)
        .or_else(|| super::outside("vcpus", vcpus.into(), 1, 4))
        .or_else(|| (!memory_mib.is_multiple_of(2)).then(|| "memory_mib must be even".to_owned()))
}

/// What is wrong with what a guest is to dirty.
pub(super) fn dirty_problem(dirty: &str) -> Option<String> {
    let parsed = romulus_guest_core::dirty::Dirtying::parse(dirty);
    parsed.err().map(|why| format!("dirty = {dirty:?}: {why}"))
}
