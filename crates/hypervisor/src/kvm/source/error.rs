//! What can go wrong on the source side, in words for the operator.

use romulus_host_sys::SysError;
use romulus_types::LayoutError;
use romulus_vmm_attach::client::ClientError;

use super::refusal::Refusal;
use crate::source::BarrierError;
use crate::spec::SpecError;

/// Why a guest cannot be protected. After any of these it runs on untouched.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The VMM did not take us.
    #[error("the VMM's attach socket cannot be used: {0}")]
    Client(#[from] ClientError),
    /// The machine has something that cannot be protected as it is.
    #[error("this machine cannot be protected as it is: {}", list(.0))]
    Refused(Vec<Refusal>),
    /// Its memory is laid out as no backup could keep it.
    #[error("this VMM's memory regions cannot be protected: {0}")]
    Layout(#[from] LayoutError),
    /// What the VMM says of its machine is not allowed.
    #[error("this VMM's machine cannot be protected: {0}")]
    Machine(#[from] SpecError),
    /// The memory or the bitmap cannot be shared.
    #[error("the VMM's shared memory cannot be used: {0}")]
    System(#[from] SysError),
}

/// Why one operation on an attached guest failed. The guest runs (or stays stopped, if it was), and nothing dirty is forgotten.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Called before `arm`.
    #[error("dirty tracking is not armed")]
    NotArmed,
    /// The machine changed, so what is known of its memory is void.
    #[error("the machine has changed and is read again in the next session")]
    MachineChanged,
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
    /// The VMM refused or is gone.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The machine could not be read anew.
    #[error(transparent)]
    Learning(Box<AttachError>),
    /// Copying failed.
    #[error(transparent)]
    System(#[from] SysError),
}

fn list<T: std::fmt::Display>(items: &[T]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}
