//! What an attachment is told.

use std::collections::BTreeSet;
use std::path::PathBuf;

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

/// How to start the guardian process: a program that calls [`guardian::run`](super::guardian::run) with what follows these arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardianProgram {
    /// The program, usually our own executable.
    pub exe: PathBuf,
    /// Arguments in front of the guardian's own, such as a hidden subcommand.
    pub args: Vec<String>,
}

/// Which QEMU, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// QEMU's QMP socket.
    pub qmp: PathBuf,
    /// QEMU's process, when it is not the one that made the socket.
    pub pid: Option<u32>,
    /// Taps that a packet gate holds.
    pub taps: Vec<String>,
    /// What is allowed.
    pub allow: Allowances,
    /// A folder for FIFOs and locks that QEMU can reach by the same path. It is made when missing.
    pub fifo_dir: PathBuf,
    /// The guardian.
    pub guardian: GuardianProgram,
    /// How long the guest may be made to wait before this process is killed, in nanoseconds.
    pub pause_limit_ns: u64,
    /// Pages that one checkpoint may have: they are copied while the guest stands still.
    pub checkpoint_pages_max: u64,
}

impl AttachOptions {
    /// Options with defaults for everything but the socket and the guardian.
    pub fn new(qmp: impl Into<PathBuf>, guardian: GuardianProgram) -> Self {
        Self {
            qmp: qmp.into(),
            pid: None,
            taps: Vec::new(),
            allow: Allowances::default(),
            fifo_dir: PathBuf::from("/run/romulus"),
            guardian,
            pause_limit_ns: PAUSE_LIMIT_NS,
            checkpoint_pages_max: CHECKPOINT_PAGES_MAX,
        }
    }
}
