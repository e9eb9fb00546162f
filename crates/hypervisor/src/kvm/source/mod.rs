//! The source side: attach to a running VMM, take checkpoints of its guest, leave no trace.
//!
//! ```text
//!   us:   Pause ─────►            barrier ─ take bits ─ copy pages ─► Resume ─►
//!   VMM:         kick, harvest ─► Paused    protect pages, save state          ─► Captured, Resumed
//!   guest: ██████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░██████
//! ```
//!
//! The barrier comes after `Paused`: vCPUs and device threads stand still then, so every frame of the epoch has passed the gate and
//! none of the next one has. `Resume` is sent ahead, before we know that the state was saved: if it was not, the guest runs all the same.
//!
//! The VMM's deadline lets the guest run when we are late: then `Resume` is answered by `PauseExpired`, what was copied is void, and
//! its pages stay taken (see `memory`). Our death or a lost connection lets it run, too, so there is neither guardian nor kill timer here.
//!
//! | file | owns |
//! |---|---|
//! | `attach` | connecting, and what a machine must be like |
//! | `refusal` | what cannot be protected |
//! | `memory` | shared memory, the dirty bitmap, copying |
//! | `capture` | the epochs, halts, events |

mod attach;
mod capture;
mod error;
mod memory;
mod refusal;

pub use attach::{AttachOptions, KvmSource};
pub use error::{AttachError, CaptureError};
pub use refusal::Refusal;
