//! What the server needs of a VMM.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use crate::proto::{ErrorCode, MachineInfo};

/// A failure of the VMM's side, with what the operator can do.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct MachineError {
    /// What failed and what to do about it.
    pub what: String,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
    pub(crate) code: ErrorCode,
}

impl MachineError {
    /// A failure without a deeper cause.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            source: None,
            code: ErrorCode::MachineFailed,
        }
    }

    /// A failure with its cause.
    pub fn because(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            source: Some(source.into()),
            ..Self::new(what)
        }
    }

    /// This VMM can't do that at all.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self {
            code: ErrorCode::Unsupported,
            ..Self::new(what)
        }
    }

    /// The failure and its causes, in one line.
    pub fn chain(&self) -> String {
        let mut text = self.what.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// A machine with what a client needs to see of it.
#[derive(Debug)]
pub struct Description {
    /// The machine. Its limits are checked before it is sent.
    pub info: MachineInfo,
    /// The regions' files, in the order of `info.regions`: duplicates, which are closed after they were sent.
    pub regions: Vec<OwnedFd>,
    /// The dirty bitmap's file, [`MachineInfo::bitmap_bytes`] long and sealed against shrinking. A machine that never ran may have none.
    pub bitmap: Option<OwnedFd>,
}

/// What became of a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Since when vCPUs and devices stand still, on CLOCK_MONOTONIC.
    pub stopped_at_ns: u64,
    /// From the call until then.
    pub kick_ns: u64,
}

/// Where a machine's state is saved to: a file of limited length that the client reads.
#[derive(Debug)]
pub struct StateWriter<'a> {
    file: &'a File,
    bytes: u64,
    bytes_max: u64,
}

impl<'a> StateWriter<'a> {
    /// Writes from the beginning of `file`, at most `bytes_max` bytes.
    pub fn new(file: &'a File, bytes_max: u64) -> Self {
        Self {
            file,
            bytes: 0,
            bytes_max,
        }
    }

    /// Appends. Best called once: each call is a system call.
    ///
    /// # Errors
    /// When the limit is passed, or the file can't be written.
    pub fn put(&mut self, part: &[u8]) -> Result<(), MachineError> {
        let bytes = self.bytes.saturating_add(part.len() as u64);
        if bytes > self.bytes_max {
            return Err(MachineError::new(format!(
                "the machine's state is longer than {} bytes: raise the VMM's state_bytes_max",
                self.bytes_max
            )));
        }
        self.file
            .write_all_at(part, self.bytes)
            .map_err(|source| MachineError::because("the state's memory file can't be written", source))?;
        self.bytes = bytes;
        Ok(())
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl io::Write for StateWriter<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.put(part).map_err(io::Error::other)?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A VMM that can be attached to. The server never makes two of these calls at a time, and each in the order that the comments
/// say, whatever a client does. They come from threads of the server's own.
pub trait Machine: Send + Sync {
    /// The machine as it is now. Called at each `Hello`, unless there is none yet.
    ///
    /// # Errors
    /// A client is told, and refused.
    fn describe(&self) -> Result<Description, MachineError>;

    /// Starts dirty tracking afresh, while the guest runs: every write from here on, by vCPUs and by devices, is in the bitmap after
    /// the next `harvest`. Bits from before are cleared. May be called again without `disarm`.
    ///
    /// # Errors
    /// Tracking is as it was before, or off.
    fn arm(&self) -> Result<(), MachineError>;

    /// Ends dirty tracking and leaves nothing behind. Called when a client that had armed is gone. The guest runs.
    fn disarm(&self);

    /// Brings what the hypervisor knows into the shared bitmap, and says how many pages it reported. After `arm`; while the guest
    /// runs, or after `pause`: then the bitmap is complete.
    ///
    /// # Errors
    /// Nothing was forgotten: the next harvest has it.
    fn harvest(&self) -> Result<u64, MachineError>;

    /// Stops vCPUs and devices. On return none of them writes guest memory or sends anything. It must end by itself within a second or
    /// so, and does not harvest. Never called twice without `resume` in between.
    ///
    /// # Errors
    /// The guest runs.
    fn pause(&self) -> Result<Stopped, MachineError>;

    /// Saves everything but the memory, after `pause`. A memory write that saving causes must be in the bitmap of this checkpoint's
    /// harvest: there is none after it, so it must not cause any.
    ///
    /// # Errors
    /// The server lets the guest run and tells the client.
    fn save(&self, into: &mut StateWriter<'_>) -> Result<(), MachineError>;

    /// Lets the guest run, once after each `pause` (but one for good), and says when, on CLOCK_MONOTONIC. It can't fail and does not wait: it is what frees
    /// the guest from a client that hangs.
    fn resume(&self) -> u64;

    /// Builds the machine `info` on the memory in `regions`, whose number and sizes were checked; `private` maps it so that the
    /// files stay as they are. Nothing writes the memory before `activate`. Called at most once with success.
    ///
    /// # Errors
    /// There still is no machine, and it may be tried again.
    fn prepare(&self, info: &MachineInfo, regions: Vec<OwnedFd>, private: bool) -> Result<(), MachineError> {
        let _ = (info, regions, private);
        Err(MachineError::unsupported("this VMM can't be a standby"))
    }

    /// Loads a state that `save` wrote, into a prepared machine; the guest does not run. It may come again, after a success or a failure.
    /// It writes no memory, unless that is private: a client that dies between this and `activate` leaves a checkpoint that is whole.
    ///
    /// # Errors
    /// The machine does not run.
    fn restore(&self, state: &[u8]) -> Result<(), MachineError> {
        let _ = state;
        Err(MachineError::unsupported("this VMM can't be a standby"))
    }

    /// Lets a restored machine run, and says when its first vCPU entered the guest, on CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// The machine does not run. It is not activated again before another `restore`.
    fn activate(&self) -> Result<u64, MachineError> {
        Err(MachineError::unsupported("this VMM can't be a standby"))
    }
}
