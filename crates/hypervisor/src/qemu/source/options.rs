//! What an attachment is told.

use std::path::PathBuf;

use crate::source::{Allowances, CHECKPOINT_PAGES_MAX, PAUSE_LIMIT_NS};

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
