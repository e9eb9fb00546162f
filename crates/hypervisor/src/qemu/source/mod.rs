//! The source side for QEMU: attach to a running process, take checkpoints of it, leave no trace.
//!
//! ```text
//!  attach ─┬─ kernel probe, QEMU's process, lock, leftovers freed
//!          ├─ refusals                      what cannot be protected, all at once
//!          ├─ FIFO, guardian                from here on our death frees the guest
//!          ├─ bootstrap, placement          RAM blocks by name, and where QEMU keeps them
//!          └─ userfaultfd in QEMU, ranges registered
//!  arm       protect all memory, slice by slice, each in a short pause
//!  capture   pause ─ barrier ─ harvest ─ copy ─ resume          (see `pause`)
//!  detach    ranges given back, FIFO, guardian and lock gone
//! ```
//!
//! | file | owns |
//! |---|---|
//! | `attach` | the steps above |
//! | `refusal` | what cannot be protected |
//! | `placement` | from RAM blocks to addresses |
//! | `tracker` | dirty pages, and copying them |
//! | `pause` | stopping the guest and letting it go |
//! | `purpose` | what a pause is for, as fault points |
//! | `lair` | lock and FIFO |
//! | `notes` | what the next attachment has to know if this one dies |
//! | `guardian` | the process that frees the guest when we cannot |
//! | `events` | what QEMU's events mean |

mod attach;
mod capture;
mod describe;
mod error;
mod events;
pub mod guardian;
mod halt;
mod lair;
mod notes;
mod options;
mod pause;
pub(super) mod placement;
mod purpose;
mod refusal;
mod tracker;

pub use attach::QemuSource;
pub use error::{AttachError, CaptureError};
pub use guardian::{GuardianArgs, GuardianError};
pub use notes::StoppedBy;
pub use options::{AttachOptions, GuardianProgram};
pub use refusal::Refusal;
