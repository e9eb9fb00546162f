//! `epoch.*` and `advise.check`: how long an epoch should be, measured on a guest that is really protected.
//!
//! ```text
//!   stand.rs      one guest of the test VMM in the end-to-end tests' lab, unprotected or protected with some settings: what it gets
//!                 done, what its client sees, what its daemons say and use
//!   sweep.rs      length × what the guest writes × vCPUs, once for all measures that show something of it
//!   shown.rs      these measures
//!   recommend.rs  the length of the sweep that suits a goal
//!   auto.rs       `epochs.length = "auto"` under a load that changes
//!   check.rs      what `bench advise` predicts, beside what then comes
//! ```
//!
//! They need root, /dev/kvm and the release binaries of this checkout.

mod auto;
mod check;
mod recommend;
mod shown;
mod stand;
mod sweep;

pub(crate) use auto::Auto;
pub(crate) use check::Check;
pub(crate) use recommend::Recommend;
pub(crate) use shown::{Cpu, Lag, Latency, OnTime, Pause, Shows, Speed, Wire};

use crate::run::{Effort, Run};
use std::time::Duration;

/// How often the client asks on average: often enough for a median of a short slice.
const ASKS_EVERY: Duration = Duration::from_millis(4);
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
