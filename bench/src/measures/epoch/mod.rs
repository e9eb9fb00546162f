//! `epoch.*` and `advise.check`: how long an epoch should be, measured on a guest that is really protected.
//!
//! ```text
//!   task.rs       which guest, and what it does: one of the test VMM that writes pages, or a Linux with a program at work
//!   stand.rs      the guest in the end-to-end tests' lab, unprotected or protected with some settings: what its client sees, what its
//!                 daemons say and use
//!   counter.rs    what it gets done
//!   sweep.rs      length × what the guest does × vCPUs × memory for deltas, once for all measures that show something of it
//!   load.rs       one case of it
//!   shown.rs      these measures
//!   recommend.rs  the length of the sweep that suits a goal
//!   auto.rs       `epochs.length = "auto"` under a load that changes
//!   check.rs      what `bench advise` predicts, beside what then comes
//! ```
//!
//! They need root and the release binaries of this checkout; a guest of the test VMM needs /dev/kvm, the Linux QEMU and what `cargo xtask setup` makes.

mod auto;
mod check;
mod counter;
mod load;
mod recommend;
mod shown;
mod stand;
mod sweep;
mod task;

pub(crate) use auto::Auto;
pub(crate) use check::Check;
pub(crate) use recommend::Recommend;
pub(crate) use shown::{Cpu, Lag, Latency, OnTime, Pause, Shows, Speed, Wire};

use crate::run::{Effort, Run};
use std::time::Duration;

/// After a change of the load, or after protection began: hot pages become hot.
const SETTLE: Duration = Duration::from_millis(500);

/// A time of a plan, in this run.
fn scaled(run: &Run, ms: u32) -> Duration {
    let ms = match run.effort() {
        Effort::Full => ms,
        Effort::Quick => ms / 6,
        Effort::Shortest => ms / 15,
    };
    Duration::from_millis(ms.max(100).into())
}

/// These measures take long, and a quick run is for a look.
fn repetitions(run: &Run) -> u32 {
    match run.effort() {
        Effort::Full => run.repetitions(),
        Effort::Quick | Effort::Shortest => 1,
    }
}
