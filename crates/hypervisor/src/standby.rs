//! What the backup needs of a hypervisor: show that it can load a checkpoint, keep a machine waiting, wake it.
//!
//! ```text
//!                  trial_load                  start_waiting             activate
//!   prepared ──► (throwaway machine, ──► ... ─► waiting (warm) ────────► active: the guest runs here
//!                 private memory)         └──────────────────────────────┘ cold: started first
//!                                                   dismiss: the waiting machine is ended
//! ```
//!
//! Invariants: a trial never writes to the image and never runs a guest instruction. Machines are processes of their own that
//! outlive this one. `dismiss` and a drop end what waits; nothing but `kill` ends what is active.

use std::error::Error;
use std::path::PathBuf;

use romulus_types::Digest;
use serde::Serialize;

/// A failure of the standby, with what the operator can do.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct StandbyError {
    /// What failed and what to do about it.
    pub what: String,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
    /// Of an activation: the machine is gone and has not read the whole checkpoint, so that no instruction of the guest
    /// ran and the image is as it was. Another try from it is safe.
    pub untouched: bool,
}

impl StandbyError {
    /// A failure with its cause.
    pub fn new(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            what: what.into(),
            source: Some(source.into()),
            untouched: false,
        }
    }

    /// A failure that says everything itself.
    pub fn plain(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            source: None,
            untouched: false,
        }
    }

    /// The same, of a machine that is gone and left the image as it was.
    #[must_use]
    pub fn untouched(self) -> Self {
        Self {
            untouched: true,
            ..self
        }
    }
}

/// A committed and applied checkpoint as it lies on the backup.
#[derive(Clone, Debug)]
pub struct Committed<'a> {
    /// The file of each RAM block, in the layout's order. The main one is mapped by the machine, the others are read.
    pub ram: &'a [PathBuf],
    /// The device state as the hypervisor wrote it.
    pub device_state: &'a [u8],
    /// The digest of all memory in the commit. When it is given, [`Standby::activate`] compares the machine's own memory with it
    /// before the guest runs.
    pub memory: Option<Digest>,
}

/// How a trial went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TrialReport {
    /// From the start of the process to its monitor, in microseconds.
    pub start_us: u64,
    /// From there to the checkpoint loaded, in microseconds.
    pub load_us: u64,
    /// Bytes of the stream.
    pub stream_bytes: u64,
}

/// How an activation went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ActivationReport {
    /// Whether the machine had been waiting.
    pub warm: bool,
    /// Starting the machine, in microseconds; 0 when it had been waiting.
    pub start_us: u64,
    /// Preparing and writing the stream, in microseconds.
    pub stream_us: u64,
    /// Comparing all memory with the commit, in microseconds, when that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify_us: Option<u64>,
    /// From the call to the guest running, in microseconds.
    pub total_us: u64,
    /// Bytes of the stream.
    pub stream_bytes: u64,
}

/// A machine on the backup that can take a guest over.
pub trait Standby: Send {
    /// Starts a throwaway machine with this very configuration, its memory mapped privately, has it load the checkpoint without
    /// running it, and ends it. Success is what allows "Protected". The image must not change meanwhile.
    ///
    /// # Errors
    /// What the machine said when it did not load.
    fn trial_load(&mut self, checkpoint: &Committed<'_>) -> Result<TrialReport, StandbyError>;

    /// Starts the machine and leaves it waiting, its main memory being the image's file itself. The image may go on changing:
    /// what is written there is in the machine's memory at once. Does nothing when one waits already.
    ///
    /// # Errors
    /// What the machine said when it did not start.
    fn start_waiting(&mut self, ram: &[PathBuf]) -> Result<(), StandbyError>;

    /// Lets the guest run from the checkpoint, in the waiting machine or in one started now. `consume` is called at most once, right
    /// before the machine may begin to read: from there on the image belongs to the guest and is no checkpoint any more.
    ///
    /// # Errors
    /// What the machine or `consume` said, or that its memory is not what was committed; no guest runs then, and the machine is
    /// gone. [`StandbyError::untouched`] says whether the image still is the checkpoint.
    fn activate(
        &mut self,
        checkpoint: &Committed<'_>,
        consume: &mut dyn FnMut() -> Result<(), StandbyError>,
    ) -> Result<ActivationReport, StandbyError>;

    /// Whether a machine waits and is healthy.
    fn is_waiting(&mut self) -> bool;

    /// Whether the guest runs here and its process is alive.
    fn is_active(&mut self) -> bool;

    /// How the guest that was activated here ended, in words. `None` while it runs, and when none was.
    fn guest_end(&mut self) -> Option<String>;

    /// The process of the waiting or active machine.
    fn pid(&self) -> Option<u32>;

    /// The taps of the waiting or active machine, which makes them itself, in the order of the machine's network cards.
    fn taps(&self) -> &[String];

    /// Where the running machine can be attached to again (for QEMU its monitor's socket, for a VMM its attach
    /// socket).
    fn control_path(&self) -> Option<PathBuf>;

    /// What differs from the primary's configuration, in words, for the status and the log.
    fn differences(&self) -> &[String];

    /// Ends the waiting machine, if there is one. Leaves an active one alone.
    fn dismiss(&mut self);

    /// Ends the machine, waiting or active.
    fn kill(&mut self);
}
