//! `peer.*` and `codec.peers`: others that do what we do, on the same guest in the same run.
//!
//! ```text
//!   colo.rs       QEMU's own COLO: a primary and a secondary QEMU, and the primary's pause at each checkpoint
//!   migration.rs  QEMU's plain live migration, once, to another QEMU
//!   ours.rs       our checkpoints of the same QEMU
//!   speed.rs      how fast its guest runs meanwhile
//!   codec.rs      other encodings of the same pages (xbzrle.rs: one of them)
//!   qemu.rs       a QEMU and its monitor
//! ```
//!
//! Pauses are timed by QEMU itself, from its events `STOP` to `RESUME`, for the others and for us alike.

mod codec;
mod colo;
mod migration;
mod ours;
mod qemu;
mod speed;
mod xbzrle;

pub(crate) use codec::CodecPeers;
pub(crate) use colo::Colo;
pub(crate) use migration::Migration;
pub(crate) use speed::Speed;

use crate::run::Unable;
use crate::stats::{Figure, Timings, Unit};

/// In milliseconds, of what was recorded in microseconds.
const MS: Unit = Unit {
    name: "ms",
    size: 1e3,
};

/// What is needed of the machine.
fn needs(kvm: bool) -> Result<(), Unable> {
    if !rustix::process::geteuid().is_root() {
        return Err(Unable::Missing {
            what: "attaching to a QEMU needs rights that this user does not have".to_owned(),
            remedy: "run it as root".to_owned(),
        });
    }
    if kvm && !std::path::Path::new("/dev/kvm").exists() {
        return Err(Unable::Missing {
            what: "there is no /dev/kvm".to_owned(),
            remedy: "run it on a machine with KVM".to_owned(),
        });
    }
    Ok(())
}

fn folder() -> Result<tempfile::TempDir, Unable> {
    tempfile::Builder::new()
        .prefix("romulus-peers-")
        .tempdir()
        .map_err(Unable::failed("making a folder"))
}

/// The given quantile of all pauses, with that of each repetition.
fn figure(repetitions: &[Vec<u64>], percent: u32) -> Result<Figure, Unable> {
    let nothing = || Unable::Wrong("there were no pauses".to_owned());
    let mut timings = Timings::new();
    let mut each = Vec::new();
    for pauses in repetitions {
        timings.begin_repetition();
        pauses.iter().for_each(|us| timings.record(*us));
        let mut one = Timings::new();
        one.begin_repetition();
        pauses.iter().for_each(|us| one.record(*us));
        let figure = one.figure(MS).ok_or_else(nothing)?;
        each.push(if percent == 99 { figure.p99 } else { figure.p50 });
    }
    if percent == 99 {
        return Figure::of(&each).ok_or_else(nothing);
    }
    timings.figure(MS).ok_or_else(nothing)
}
