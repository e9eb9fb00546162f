//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use romulus_vmm_attach::kvm::{HotPageRule, Tracking};
use romulus_vmm_attach::proto;

use crate::host::SerialTarget;
use crate::mac::Mac;

/// A small VMM over KVM with a guest that serves, writes memory and checks itself.
#[derive(Debug, Parser)]
#[command(
    name = "testbed",
    version,
    after_help = "Exit codes: 0 the guest powered itself off, 1 the VMM could not go on, \
    10 a self-check of the guest failed, 11 the guest panicked, 12 an exception in the guest, 13 a vCPU could not go on."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine until it ends.
    Run(RunOptions),
    /// Wait to be told over the attach socket to go on with a machine of another process or host.
    Standby(StandbyOptions),
}

/// Settings of `testbed run`.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Name of the machine, for logs.
    #[arg(long, default_value = "testbed")]
    pub name: String,
    /// RAM in MiB, an even number, at least 32.
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    pub memory: u64,
    /// vCPUs, 1 to 4.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
    /// A tap for a network card; made, down and on no bridge, when there is none of that name. May be repeated.
    #[arg(long, value_name = "NAME")]
    pub tap: Vec<String>,
    /// Address of the network card of each --tap, in the same order; 02:00:00:00:00:02 and following by default.
    #[arg(long, value_name = "MAC")]
    pub mac: Vec<Mac>,
    /// A file that is a disk. May be repeated.
    #[arg(long, value_name = "FILE")]
    pub disk: Vec<PathBuf>,
    /// Unix socket at which a replicator may attach.
    #[arg(long, value_name = "SOCKET")]
    pub attach: Option<PathBuf>,
    /// How dirty pages are found.
    #[command(flatten)]
    pub tracking: TrackingOptions,
    /// What the guest is told, words separated by blanks.
    #[arg(long, default_value = "", value_name = "WORDS")]
    pub cmdline: String,
    /// Where the guest's console goes: a file (at its end), `stdout` or `none`.
    #[arg(long, default_value = "stdout", value_name = "FILE")]
    pub serial: SerialTarget,
    /// The guest's ELF file, in place of the one that is built in.
    #[arg(long, value_name = "ELF")]
    pub guest: Option<PathBuf>,
}

/// Settings of `testbed standby`.
#[derive(Debug, Args)]
pub struct StandbyOptions {
    /// Unix socket at which the backup's agent attaches.
    #[arg(long, value_name = "SOCKET")]
    pub attach: PathBuf,
    /// A tap for each network card of the machine, in its order; made, down and on no bridge, when there is none.
    #[arg(long, value_name = "NAME")]
    pub tap: Vec<String>,
    /// A file for each disk of the machine, in its order. A disk without one is empty, and lost with this process.
    #[arg(long, value_name = "FILE")]
    pub disk: Vec<PathBuf>,
    /// How dirty pages are found once the machine runs here; by default as where it ran before.
    #[command(flatten)]
    pub tracking: TrackingOptions,
    /// Where the guest's console goes: a file (at its end), `stdout` or `none`.
    #[arg(long, default_value = "none", value_name = "FILE")]
    pub serial: SerialTarget,
    /// The guest's ELF file, in place of the one that is built in: what a reset of the machine loads.
    #[arg(long, value_name = "ELF")]
    pub guest: Option<PathBuf>,
}

/// How dirty pages are found.
#[derive(Debug, Clone, Copy, Args)]
pub struct TrackingOptions {
    /// `manual`: KVM's log with manual protection, where pages that are always dirty stay writable; `log`: the plain
    /// log; `ring`: a ring for each vCPU.
    #[arg(long, value_name = "MODE")]
    pub tracking: Option<TrackingMode>,
    /// With manual: a page dirty in this many epochs in a row stays writable; 0: none does.
    #[arg(long, default_value_t = HotPageRule::default().hot_after, value_name = "EPOCHS")]
    pub hot_after: u8,
    /// With manual: one in this many of those pages is tried again in each epoch.
    #[arg(long, default_value_t = HotPageRule::default().recheck_every, value_name = "PAGES")]
    pub recheck_every: u16,
    /// With ring: entries of each vCPU's ring, a power of two from 1024 to 65536.
    #[arg(long, default_value_t = 65_536, value_name = "ENTRIES")]
    pub ring_entries: u32,
}

/// The ways to find dirty pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrackingMode {
    /// Manual protection.
    Manual,
    /// The plain log.
    Log,
    /// Dirty rings.
    Ring,
}

impl TrackingOptions {
    /// What was asked for, or else the mode `otherwise`.
    #[must_use]
    pub fn resolve(&self, otherwise: proto::Tracking) -> Tracking {
        let otherwise = match otherwise {
            proto::Tracking::Log => TrackingMode::Log,
            proto::Tracking::Manual => TrackingMode::Manual,
            proto::Tracking::Ring => TrackingMode::Ring,
        };
        let (hot_after, recheck_every) = (self.hot_after, self.recheck_every);
        match self.tracking.unwrap_or(otherwise) {
            TrackingMode::Manual => Tracking::Manual(HotPageRule {
                hot_after,
                recheck_every,
            }),
            TrackingMode::Log => Tracking::Log,
            TrackingMode::Ring => Tracking::Ring {
                entries: self.ring_entries,
            },
        }
    }
}
