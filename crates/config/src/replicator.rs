//! The replicator's settings.

use std::path::{Path, PathBuf};

use romulus_types::{HostId, VmId};
use serde::{Deserialize, Serialize};

use crate::allow;
use crate::check::{Checks, Invalid};
use crate::common::{Failover, Log, Metrics, Network};
use crate::daemons::{PKI_DIR, RUN_DIR, check_interface, check_witness};
use crate::epochs::Epochs;
use crate::load::Settings;
use crate::peer::PeerAddress;
use crate::quantity::ByteSize;

/// The replicator's settings: `/etc/romulus/replicator.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Replicator {
    /// This host's name; it must be the one in the certificates, which is also the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostId>,
    /// Where the backup's agent listens. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<PeerAddress>,
    /// Where the witness listens: addresses of the one witness, tried in order. No default.
    pub witness: Vec<PeerAddress>,
    /// The directory with this host's certificates. Default [`PKI_DIR`].
    pub pki_dir: PathBuf,
    /// The admin socket. Default `/run/romulus/replicator-VM.sock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_socket: Option<PathBuf>,
    /// The group that may use the admin socket, by name or number. Default: that of the daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_group: Option<String>,
    /// The guest.
    pub vm: Guest,
    /// Length and pace of epochs.
    pub epochs: Epochs,
    /// What replication may hold in memory.
    pub memory: Memory,
    /// When a silent peer counts as lost.
    pub failover: Failover,
    /// QUIC.
    pub network: Network,
    /// Logs.
    pub log: Log,
    /// Metrics and health.
    pub metrics: Metrics,
}

/// `[vm]` of the replicator: what one guest is reached by. Belongs into that VM's own file; the command line can say the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guest {
    /// QEMU's QMP socket. No default; either this or `attach`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// The attach socket of a VMM that embeds the attach library. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attach: Option<PathBuf>,
    /// The guest's taps. Every network device of the guest must be on one. Default none.
    pub taps: Vec<String>,
    /// Ids of devices whose output or content need not survive. Default none.
    pub disposable: Vec<String>,
    /// Register the VM as running here when the witness does not know it and nothing is remembered of it here, or when its
    /// record says that it was powered off. Default off.
    pub register: bool,
}

impl Guest {
    fn check(&self) -> Result<(), Invalid> {
        let (most, none) = (64, Path::new("/"));
        Checks::new("vm")
            .number("taps", self.taps.len() as u64, 0, most)?
            .number("disposable", self.disposable.len() as u64, 0, most)?
            .absolute("qmp", self.qmp.as_deref().unwrap_or(none))?
            .absolute("attach", self.attach.as_deref().unwrap_or(none))?;
        for tap in &self.taps {
            check_interface("vm.taps", tap)?;
        }
        if self.qmp.is_some() && self.attach.is_some() {
            return Err(Invalid::new(
                "vm.attach",
                "vm.qmp is set as well: a guest has one hypervisor",
            ));
        }
        Ok(())
    }
}

/// `[memory]` of the replicator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// Bytes of previous page versions kept for deltas. Default 64 MiB.
    pub delta_memory: ByteSize,
    /// Bytes of the pages of one checkpoint, which are copied while the guest stands still. Default 256 MiB.
    pub checkpoint_bytes_max: ByteSize,
    /// Bytes of guest output held back. Default 64 MiB.
    pub held_bytes_max: ByteSize,
    /// Frames of guest output held back. Default 65536.
    pub held_frames_max: u32,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            delta_memory: ByteSize::from_mib(64),
            checkpoint_bytes_max: ByteSize::from_mib(256),
            held_bytes_max: ByteSize::from_mib(64),
            held_frames_max: 65_536,
        }
    }
}

impl Default for Replicator {
    fn default() -> Self {
        Self {
            host: None,
            backup: None,
            witness: Vec::new(),
            pki_dir: PKI_DIR.into(),
            admin_socket: None,
            admin_group: None,
            vm: Guest::default(),
            epochs: Epochs::default(),
            memory: Memory::default(),
            failover: Failover::default(),
            network: Network::default(),
            log: Log::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Replicator {
    /// The admin socket of the replicator of `vm`.
    pub fn admin_socket(&self, vm: &VmId) -> PathBuf {
        let default = || format!("{RUN_DIR}/replicator-{vm}.sock").into();
        self.admin_socket.clone().unwrap_or_else(default)
    }
}

impl Settings for Replicator {
    const NAME: &'static str = "replicator";
    const EXAMPLE: &'static str = include_str!("../examples/replicator.toml");

    fn log(&self) -> &Log {
        &self.log
    }

    fn check(&self) -> Result<(), Invalid> {
        let (page, most) = (ByteSize::from_mib(1), ByteSize::from_gib(1024));
        check_witness(&self.witness)?;
        Checks::new("").absolute("pki_dir", &self.pki_dir)?;
        allow::check_group(self.admin_group.as_deref())?;
        self.vm.check()?;
        self.epochs.check()?;
        Checks::new("memory")
            .size(
                "delta_memory",
                self.memory.delta_memory,
                ByteSize::from_bytes(0),
                most,
            )?
            .size(
                "checkpoint_bytes_max",
                self.memory.checkpoint_bytes_max,
                page,
                most,
            )?
            .size("held_bytes_max", self.memory.held_bytes_max, page, most)?
            .number("held_frames_max", self.memory.held_frames_max.into(), 64, 1 << 24)?;
        self.failover.check()?;
        self.network.check()?;
        self.log.check()?;
        self.metrics.check()
    }
}
