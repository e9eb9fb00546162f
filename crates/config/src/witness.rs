//! The witness's settings.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::allow::{self, Allow};
use crate::check::{Checks, Invalid};
use crate::common::{Log, Metrics, Network};
use crate::daemons::{ANY, PKI_DIR, RUN_DIR};
use crate::load::Settings;
use crate::quantity::ByteSize;

/// The witness's settings: `/etc/romulus/witness.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Witness {
    /// UDP address on which requests are awaited. Default `0.0.0.0:7701`.
    pub listen: SocketAddr,
    /// Where the records are kept; on a disk, not on a tmpfs. Default `/var/lib/romulus-witness`.
    pub dir: PathBuf,
    /// The directory with this host's certificates. Default [`PKI_DIR`].
    pub pki_dir: PathBuf,
    /// The admin socket. Default `/run/romulus/witness.sock`.
    pub admin_socket: PathBuf,
    /// The group that may use the admin socket, by name or number. Default: that of the daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_group: Option<String>,
    /// Which host may ask for which VMs: both hosts of a pair. Default: every host of the authority for any VM.
    pub allow: Vec<Allow>,
    /// Most VMs that have a record. Default 4096.
    pub vms_max: u32,
    /// QUIC.
    pub network: Network,
    /// Logs.
    pub log: Log,
    /// Metrics.
    pub metrics: Metrics,
}

impl Default for Witness {
    fn default() -> Self {
        Self {
            listen: SocketAddr::new(ANY, 7701),
            dir: "/var/lib/romulus-witness".into(),
            pki_dir: PKI_DIR.into(),
            admin_socket: format!("{RUN_DIR}/witness.sock").into(),
            admin_group: None,
            allow: Vec::new(),
            vms_max: 4096,
            // Requests are small and hosts many.
            network: Network {
                receive_window: ByteSize::from_mib(1),
                connections_max: 1024,
                connections_per_host_max: 128,
                ..Network::default()
            },
            log: Log::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Settings for Witness {
    const NAME: &'static str = "witness";
    const EXAMPLE: &'static str = include_str!("../examples/witness.toml");

    fn log(&self) -> &Log {
        &self.log
    }

    fn check(&self) -> Result<(), Invalid> {
        Checks::new("")
            .absolute("dir", &self.dir)?
            .absolute("pki_dir", &self.pki_dir)?
            .absolute("admin_socket", &self.admin_socket)?
            .number("vms_max", self.vms_max.into(), 1, 1 << 20)?;
        allow::check_group(self.admin_group.as_deref())?;
        allow::check(&self.allow)?;
        self.network.check()?;
        self.log.check()?;
        self.metrics.check()
    }
}
