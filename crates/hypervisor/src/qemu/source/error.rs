//! What can go wrong on the source side, in words for the operator.

use std::io;
use std::path::PathBuf;

use romulus_host_sys::{KernelFeature, SysError};

use super::refusal::Refusal;
use crate::qemu::bootstrap::BootstrapError;
use crate::qemu::cmdline::CmdlineError;
use crate::qemu::qmp::QmpError;
use crate::source::BarrierError;

/// Why a QEMU cannot be protected. After any of these it runs on untouched.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel lacks what dirty tracking needs.
    #[error("this kernel cannot track a guest's writes from outside, it lacks {}; run Linux 6.7 or later with CONFIG_USERFAULTFD", list(.0))]
    Kernel(Vec<KernelFeature>),
    /// The machine has something that cannot be protected as it is.
    #[error("this machine cannot be protected as it is: {}", list(.0))]
    Refused(Vec<Refusal>),
    /// Which process QEMU is could not be found out.
    #[error(
        "process {pid}, which listens on the QMP socket, is no QEMU ({name}): name the socket that QEMU itself listens on"
    )]
    NotQemu {
        /// The process.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// Someone else protects it.
    #[error("this QEMU (process {pid}) is protected by another replicator, or one is just being cleaned up: stop that one first ({})", .lock.display())]
    ProtectedByAnother {
        /// QEMU's process.
        pid: u32,
        /// The lock file that is held.
        lock: PathBuf,
    },
    /// Somebody's userfaultfd covers the guest's memory.
    #[error(
        "another userfaultfd covers RAM block {block} (another replicator with another FIFO folder, or a postcopy migration): end that first"
    )]
    TrackedByAnother {
        /// The block.
        block: String,
    },
    /// A RAM block was not found in QEMU's address space.
    #[error(
        "RAM block {block} of {bytes} bytes was not found in the memory of process {pid}; this QEMU version or memory backend is not supported"
    )]
    BlockNotFound {
        /// The block.
        block: String,
        /// Its length.
        bytes: u64,
        /// QEMU's process.
        pid: u32,
    },
    /// No standby could be derived from its command line.
    #[error("no standby of this machine could be started: {0}")]
    Standby(#[source] CmdlineError),
    /// A file that a standby needs is not there any more, or no file.
    #[error(
        "QEMU's command line names {path}, which a standby needs, too, and it cannot be read (put it back if it was removed, name it by its full path): {source}"
    )]
    File {
        /// The file, as QEMU sees it.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The FIFO is not where QEMU can open it.
    #[error(
        "QEMU cannot reach {path}: it runs in another file system; choose a FIFO folder that it can reach"
    )]
    FifoUnreachable {
        /// The FIFO.
        path: PathBuf,
    },
    /// The folder of FIFOs and locks cannot be used.
    #[error("the FIFO folder cannot be used: {path}: {source}")]
    Folder {
        /// Folder or file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The guardian process did not come up.
    #[error("the guardian process did not start ({exe}): {source}")]
    Guardian {
        /// What was to be run.
        exe: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// QEMU did not let the replicator read its machine.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] QmpError),
    /// The kernel refused a call.
    #[error(transparent)]
    System(#[from] SysError),
}

/// Why one operation on an attached guest failed. The guest runs (or stays stopped, if it was), and nothing dirty is
/// forgotten.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// QEMU ended or closed its monitor.
    #[error("QEMU is gone")]
    Gone,
    /// QEMU did not stop the guest.
    #[error("QEMU did not stop the guest and write its state: {0}")]
    NotHeld(String),
    /// The guest may not have stood still to the end of what was done.
    #[error(
        "QEMU let the guest go too early: its device state has only {state_bytes} bytes (if this comes again and again, nothing can be protected: report it with QEMU's version)"
    )]
    LetGoEarly {
        /// Length of the device state.
        state_bytes: usize,
    },
    /// The device state is larger than the limit.
    #[error("the device state is over the limit of {limit_bytes} bytes")]
    StateTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// The guest wrote more in one epoch than can be copied while it stands still.
    #[error(
        "the guest wrote {} MiB since the last checkpoint, and the limit is {} MiB (setting memory.checkpoint_bytes_max; \
         epochs stretch when the link or the backup is slower than the guest writes)", pages >> 8, limit_pages >> 8
    )]
    TooManyPages {
        /// Pages that were written.
        pages: u64,
        /// The limit.
        limit_pages: u64,
    },
    /// The packet gate refused.
    #[error(transparent)]
    Barrier(#[from] BarrierError),
    /// A page of a block whose place is not certain was written.
    #[error("RAM block {block} has twins of the same content and was written; attach again")]
    TwinWritten {
        /// The block.
        block: String,
    },
    /// Called before `arm`.
    #[error("dirty tracking is not armed")]
    NotArmed,
    /// The machine could not be read anew.
    #[error(transparent)]
    Learning(Box<AttachError>),
    /// The guardian process ended and could not be started again.
    #[error("the guardian process is gone and does not start again: {0}")]
    Guardian(#[source] io::Error),
    /// The monitor failed.
    #[error(transparent)]
    Monitor(QmpError),
    /// The kernel refused a call.
    #[error(transparent)]
    System(#[from] SysError),
}

impl From<QmpError> for CaptureError {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Closed => Self::Gone,
            other => Self::Monitor(other),
        }
    }
}

fn list<T: std::fmt::Display>(items: &[T]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}
