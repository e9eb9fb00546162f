//! A guest and a standby without a hypervisor, for tests of everything above: deterministic, in memory, and strict.
//!
//! The guest is a counter that writes a few pages a step, chosen by a seed. Its device state holds the step and a digest of all
//! memory at that moment, so [`FakeStandby`] notices any page that a checkpoint lost, mixed or made up, and the
//! activated guest is known to go on from exactly one step.
//!
//! A test keeps a [`FakeGuest`] to run the guest, raise events and make the next capture fail.

mod guest;
mod source;
mod standby;
#[cfg(test)]
mod tests;

use crate::source::SourceError;

pub use guest::FakeGuest;
pub use source::FakeSource;
pub use standby::FakeStandby;

const STATE_MAGIC: &[u8; 8] = b"ROMFAKE1";

/// Why a fake refuses: a rule of the traits was broken, or the test asked for it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Broken(&'static str);

fn source_error(what: &'static str) -> SourceError {
    SourceError::new("the fake guest refuses", Broken(what))
}
