//! What the replicator needs of a hypervisor: take checkpoints of a running guest.
//!
//! ```text
//!   attach ──► bootstrap ──► arm ──► read_pages (all) ──► precopy (a few rounds) ──► capture, capture, … ──► detach
//!                  ▲                                                                        │
//!                  └──────────── new session, guest reset, device plugged ◄─────────────────┘
//! ```
//!
//! Nothing dirty is forgotten: a page that was written since `arm` is in the next `precopy` or `capture`, and one that
//! an aborted `capture` or `precopy` had taken out of the dirty set is in the one after it.

use std::collections::BTreeSet;
use std::error::Error;

use romulus_host_sys::resident_buffer;
use romulus_types::{PAGE_BYTES, PageIndex, RamLayout};

use crate::spec::MachineSpec;

/// Default limit of a pause, in nanoseconds.
pub const PAUSE_LIMIT_NS: u64 = 1_000_000_000;

/// Default limit of one checkpoint, in pages: 256 MiB.
pub const CHECKPOINT_PAGES_MAX: u64 = (256 << 20) / 4096;

/// What the operator allows although it is neither gated nor replicated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowances {
    /// Ids of network devices, character devices, drives or devices whose output or contents may differ after a
    /// takeover: a console that is only looked at, a scratch disk.
    pub disposable: BTreeSet<String>,
}

impl Allowances {
    /// Whether one of the names of a thing was declared disposable.
    pub fn covers<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> bool {
        names.into_iter().any(|name| self.disposable.contains(name))
    }
}

/// A failure of the hypervisor's side, with what the operator can do.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct SourceError {
    /// What failed and what to do about it.
    pub what: String,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

impl SourceError {
    /// A failure with its cause.
    pub fn new(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            what: what.into(),
            source: Some(source.into()),
        }
    }
}

/// The gate's barrier failed, so the checkpoint must not count.
#[derive(Debug, thiserror::Error)]
#[error("the packet gate's barrier failed")]
pub struct BarrierError(#[source] Box<dyn Error + Send + Sync>);

impl BarrierError {
    /// Wraps the gate's error.
    pub fn new(source: Box<dyn Error + Send + Sync>) -> Self {
        Self(source)
    }
}

/// Pages and device state as they were at one moment. Reused from epoch to epoch.
#[derive(Debug, Default)]
pub struct Checkpoint {
    /// The pages, strictly ascending.
    pub pages: Vec<PageIndex>,
    /// Their contents in the same order, `pages.len()` × [`PAGE_BYTES`] bytes; may be longer, the rest is old.
    pub data: Vec<u8>,
    /// The device state as the hypervisor wrote it; empty for a precopy round.
    pub device_state: Vec<u8>,
}

impl Checkpoint {
    /// Makes room for so many pages now, so that a later pause need not. Page contents that were there are lost.
    pub fn make_room(&mut self, pages: usize) {
        if self.data.len() < pages * PAGE_BYTES {
            self.pages.clear();
            // The old memory first, so that there are never both.
            self.data = Vec::new();
            self.data = resident_buffer(pages * PAGE_BYTES);
        }
        self.pages.reserve(pages.saturating_sub(self.pages.len()));
    }

    /// Forgets the contents and keeps the memory.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.device_state.clear();
    }

    /// The page contents, in the order of `pages`.
    pub fn page_contents(&self) -> impl Iterator<Item = (PageIndex, &[u8; PAGE_BYTES])> {
        let (chunks, _) = self.data.as_chunks::<PAGE_BYTES>();
        self.pages.iter().copied().zip(chunks)
    }
}

/// How long each part of one capture took, in nanoseconds, in the order of time. From `stop_ns` to `resume_ns` they add up to
/// `pause_ns`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureReport {
    /// From the command to the hypervisor's word that the vCPUs are stopped. The guest still runs.
    pub command_ns: u64,
    /// Of that, from the kick of the vCPUs to all of them standing still; 0 where the hypervisor does not say.
    pub kick_ns: u64,
    /// From there on, until we know that the guest is drained.
    pub stop_ns: u64,
    /// The gate's barrier.
    pub barrier_ns: u64,
    /// Finding the dirty pages.
    pub scan_ns: u64,
    /// Copying them.
    pub copy_ns: u64,
    /// From there to the hypervisor's word that the vCPUs run: what is left of the device state.
    pub resume_ns: u64,
    /// From the end of the copy to the end of the device state, as we read it.
    pub device_state_ns: u64,
    /// How long the guest stood still, by the hypervisor's own timestamps.
    pub pause_ns: u64,
    /// Pages copied.
    pub dirty_pages: u64,
}

/// What the hypervisor said about the guest, besides our own pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// Somebody paused it.
    Paused,
    /// It runs again.
    Resumed,
    /// It was reset.
    Reset,
    /// A device was plugged or unplugged.
    DevicesChanged,
    /// It was powered off or shut down on purpose.
    PoweredOff,
    /// The guest's kernel panicked and the hypervisor gave up.
    Crashed,
    /// The hypervisor's process is gone without a power-off.
    Gone,
}

/// A running guest that checkpoints are taken of.
pub trait GuestSource: Send {
    /// (Re)reads what a backup needs to know of the machine: RAM blocks, header, description. Called before `arm` of
    /// every session; the guest pauses for about a millisecond.
    fn bootstrap(&mut self) -> Result<(), SourceError>;

    /// The machine, as the last `bootstrap` saw it.
    fn machine(&self) -> &MachineSpec;

    /// Its memory.
    fn layout(&self) -> &RamLayout;

    /// Starts dirty tracking afresh: every later write is seen. Stops the guest in short slices.
    fn arm(&mut self) -> Result<(), SourceError>;

    /// Reads whole pages while the guest runs; a page that is being written may be torn, and is dirty then.
    fn read_pages(&mut self, first: PageIndex, into: &mut [u8]) -> Result<(), SourceError>;

    /// Takes the dirty pages while the guest runs, to make the first checkpoint small. `device_state` stays empty.
    fn precopy(&mut self, into: &mut Checkpoint) -> Result<(), SourceError>;

    /// Stops the guest, calls `barrier`, takes the dirty pages and the device state, lets the guest run (unless
    /// `stay_stopped`). On an error the guest runs and nothing dirty is forgotten.
    fn capture(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), BarrierError>,
        stay_stopped: bool,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, SourceError>;

    /// What happened since the last call, oldest first. Does not wait.
    fn poll_events(&mut self) -> Vec<GuestEvent>;

    /// Stops the guest for good: another host speaks for it. It stays stopped whatever becomes of us.
    fn stop_guest(&mut self) -> Result<(), SourceError>;

    /// Stops the guest for now. If we die, hang or detach it runs on. `poll_events` says that we live.
    fn suspend(&mut self) -> Result<(), SourceError>;

    /// Lets it run again.
    fn resume(&mut self) -> Result<(), SourceError>;

    /// Removes every trace from the hypervisor. The guest is left running, or stopped by `stop_guest`.
    fn detach(self: Box<Self>) -> Result<(), SourceError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_once_and_kept() {
        let mut checkpoint = Checkpoint::default();
        checkpoint.make_room(10);
        assert_eq!(checkpoint.data.len(), 10 * PAGE_BYTES);
        let place = checkpoint.data.as_ptr();
        checkpoint.clear();
        checkpoint.make_room(3);
        assert_eq!(
            (checkpoint.data.len(), checkpoint.data.as_ptr()),
            (10 * PAGE_BYTES, place)
        );
        assert!(checkpoint.pages.capacity() >= 10);
    }
}
