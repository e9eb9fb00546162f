//! The agent's settings.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use romulus_types::HostId;
use serde::{Deserialize, Serialize};

use crate::allow::{self, Allow};
use crate::check::{Checks, Invalid};
use crate::common::{Failover, Log, Metrics, Network};
use crate::daemons::{ANY, PKI_DIR, RUN_DIR, check_interface, check_witness};
use crate::load::Settings;
use crate::peer::PeerAddress;
use crate::quantity::{ByteSize, duration};
use crate::vms::Vm;

/// Most kinds of VMM that an agent knows.
const VMM_KINDS_MAX: usize = 16;
/// Longest name of a kind of VMM, in bytes.
const VMM_NAME_BYTES_MAX: usize = 64;

/// How a standby waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StandbyKind {
    /// A hypervisor process is started in advance and waits.
    #[default]
    Warm,
    /// The hypervisor is started at activation.
    Cold,
}

/// Where the agent keeps the files of its images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepImages {
    /// In systemd's fd store when the unit has one, otherwise in the folder.
    #[default]
    Auto,
    /// In `image_dir`.
    Folder,
    /// As memory files in systemd's fd store.
    FdStore,
}

/// What a standby's process belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StandbyUnits {
    /// A scope of its own when systemd started the agent, otherwise nothing.
    #[default]
    Auto,
    /// A systemd scope of its own, so that stopping the agent's unit leaves it alone.
    Scope,
    /// Whatever the agent belongs to.
    None,
}

/// `[[vmm]]` of the backup agent: how a standby of one kind of VMM is started. QEMU needs none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vmm {
    /// The name that VMMs of this kind give themselves.
    pub name: String,
    /// The program, by its absolute path, and its first arguments; `--attach SOCKET` and one `--tap NAME` for each network card
    /// follow.
    pub standby: Vec<String>,
}

/// The backup agent's settings: `/etc/romulus/backup-agent.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackupAgent {
    /// This host's name; it must be the one in the certificates, which is also the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostId>,
    /// UDP address on which replicators are awaited. Default `0.0.0.0:7700`.
    pub listen: SocketAddr,
    /// Where the witness listens: addresses of the one witness, tried in order. No default.
    pub witness: Vec<PeerAddress>,
    /// The directory with this host's certificates. Default [`PKI_DIR`].
    pub pki_dir: PathBuf,
    /// The admin socket. Default `/run/romulus/backup-agent.sock`.
    pub admin_socket: PathBuf,
    /// The group that may use the admin socket, by name or number. Default: that of the daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_group: Option<String>,
    /// Which host may have which VMs backed up here. Default: every host of the authority any VM.
    pub allow: Vec<Allow>,
    /// Where memory images are kept, unless they are in the fd store, and what belongs to them; a tmpfs. Default
    /// `/dev/shm/romulus`.
    pub image_dir: PathBuf,
    /// Whether the images lie in `image_dir` or in systemd's fd store. Default auto.
    pub keep_images: KeepImages,
    /// Whether every standby is a systemd unit of its own. Default auto.
    pub standby_units: StandbyUnits,
    /// Bytes of all memory images together. Default 16 GiB.
    pub image_bytes_max: ByteSize,
    /// Bytes of one VM's checkpoint that is being received. Default 256 MiB.
    pub staging_bytes_max: ByteSize,
    /// Memory of the checkpoints of all VMs while they are staged; past it they are staged in files. Default 1 GiB.
    pub staging_max: ByteSize,
    /// Where checkpoints are staged that have no room in memory. Default `spill` in the folder of the agent's state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill_dir: Option<PathBuf>,
    /// Put the memory of an image onto huge pages, where it has no holes, once a standby has loaded it. Default off.
    pub huge_pages: bool,
    /// Serve connections before everything else on this host, with a real-time priority; where that is not allowed, with a raised
    /// one. Default on.
    pub realtime: bool,
    /// Most VMs that this agent backs up. Default 16.
    pub vms_max: u16,
    /// Most memory that one guest may have, unless `[[vm]]` says otherwise. Default: what fits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_memory_max: Option<ByteSize>,
    /// Bytes a second that are read of one VM's pages, unless `[[vm]]` says otherwise. Default: as fast as they come.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_bandwidth_max: Option<ByteSize>,
    /// Most guests that takeovers start at the same time; the others wait, by priority. Default 4.
    pub starts_max: u16,
    /// A host that has connected says hello within this time. Default 5 s.
    #[serde(with = "duration")]
    pub hello_timeout: Duration,
    /// How long a hello waits for the witness's word, then it is refused and the primary tries again. Default 2 s.
    #[serde(with = "duration")]
    pub witness_wait: Duration,
    /// Warm or cold standbys. Default warm.
    pub standby: StandbyKind,
    /// At a takeover, compare all memory of the standby with the commit before its guest runs, and refuse to run it when it differs.
    /// Takes the time to read the memory. Default off.
    pub verify_activation: bool,
    /// How often a takeover starts a standby afresh when one fails before it has the whole checkpoint. Default 3.
    pub activation_retries_max: u16,
    /// The bridge that the taps of standbys join. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// How standbys of VMMs other than QEMU are started, one entry for each kind. No default.
    pub vmm: Vec<Vmm>,
    /// What is different for one VM. No default.
    pub vm: Vec<Vm>,
    /// When a silent peer counts as lost.
    pub failover: Failover,
    /// QUIC.
    pub network: Network,
    /// Logs.
    pub log: Log,
    /// Metrics and health.
    pub metrics: Metrics,
}

impl Default for BackupAgent {
    fn default() -> Self {
        Self {
            host: None,
            listen: SocketAddr::new(ANY, 7700),
            witness: Vec::new(),
            pki_dir: PKI_DIR.into(),
            admin_socket: format!("{RUN_DIR}/backup-agent.sock").into(),
            admin_group: None,
            allow: Vec::new(),
            image_dir: "/dev/shm/romulus".into(),
            keep_images: KeepImages::default(),
            standby_units: StandbyUnits::default(),
            image_bytes_max: ByteSize::from_gib(16),
            staging_bytes_max: ByteSize::from_mib(256),
            staging_max: ByteSize::from_gib(1),
            spill_dir: None,
            huge_pages: false,
            realtime: true,
            vms_max: 16,
            vm_memory_max: None,
            vm_bandwidth_max: None,
            starts_max: 4,
            hello_timeout: Duration::from_secs(5),
            witness_wait: Duration::from_secs(2),
            standby: StandbyKind::default(),
            verify_activation: false,
            activation_retries_max: 3,
            bridge: None,
            vmm: Vec::new(),
            vm: Vec::new(),
            failover: Failover::default(),
            network: Network::default(),
            log: Log::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Settings for BackupAgent {
    const NAME: &'static str = "backup-agent";
    const EXAMPLE: &'static str = include_str!("../examples/backup-agent.toml");

    fn log(&self) -> &Log {
        &self.log
    }

    fn check(&self) -> Result<(), Invalid> {
        let (mib, most) = (ByteSize::from_mib(1), ByteSize::from_gib(64 * 1024));
        check_witness(&self.witness)?;
        Checks::new("")
            .absolute("pki_dir", &self.pki_dir)?
            .absolute("admin_socket", &self.admin_socket)?
            .absolute("image_dir", &self.image_dir)?
            .size("image_bytes_max", self.image_bytes_max, mib, most)?
            .size("staging_bytes_max", self.staging_bytes_max, mib, most)?
            .size("staging_max", self.staging_max, mib, most)?
            .absolute("spill_dir", self.spill_dir.as_deref().unwrap_or(Path::new("/")))?
            .number("vms_max", self.vms_max.into(), 1, 1024)?
            .number("starts_max", self.starts_max.into(), 1, 1024)?
            .duration(
                "hello_timeout",
                self.hello_timeout,
                Duration::from_millis(100),
                Duration::from_secs(300),
            )?
            .duration(
                "witness_wait",
                self.witness_wait,
                Duration::from_millis(100),
                Duration::from_secs(20),
            )?
            .number(
                "activation_retries_max",
                self.activation_retries_max.into(),
                0,
                100,
            )?;
        if let Some(bridge) = &self.bridge {
            check_interface("bridge", bridge)?;
        }
        check_vmms(&self.vmm)?;
        self.check_vms()?;
        allow::check_group(self.admin_group.as_deref())?;
        allow::check(&self.allow)?;
        self.failover.check()?;
        self.network.check()?;
        self.check_connections()?;
        self.log.check()?;
        self.metrics.check()
    }
}

impl BackupAgent {
    /// Each VM that is protected to here holds a connection.
    fn check_connections(&self) -> Result<(), Invalid> {
        let (vms_max, connections_max) = (self.vms_max, self.network.connections_max);
        if connections_max < vms_max {
            let problem = format!(
                "{vms_max} VMs need as many connections, and network.connections_max is {connections_max}: raise that, too"
            );
            return Err(Invalid::new("vms_max", problem));
        }
        Ok(())
    }
}

fn check_vmms(vmms: &[Vmm]) -> Result<(), Invalid> {
    let refuse = |problem: String| Err(Invalid::new("vmm", problem));
    if vmms.len() > VMM_KINDS_MAX {
        return refuse(format!(
            "{} kinds of VMM are over the limit of {VMM_KINDS_MAX}",
            vmms.len()
        ));
    }
    for (position, vmm) in vmms.iter().enumerate() {
        let name = &vmm.name;
        if name.is_empty() || name.len() > VMM_NAME_BYTES_MAX {
            return refuse(format!(
                "the name {name:?} does not have 1 to {VMM_NAME_BYTES_MAX} bytes"
            ));
        }
        if vmms[..position].iter().any(|other| other.name == *name) {
            return refuse(format!("{name:?} is there twice"));
        }
        if !vmm
            .standby
            .first()
            .is_some_and(|program| program.starts_with('/'))
        {
            return refuse(format!(
                "the standby of {name:?} must begin with the absolute path of a program"
            ));
        }
        if vmm.standby.iter().any(|word| word.contains('\0')) {
            return refuse(format!("the standby of {name:?} holds a zero byte"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_vms_than_connections_are_refused_with_the_setting_to_raise() {
        let agent = |vms_max, connections_max| {
            let text = format!("vms_max = {vms_max}\n[network]\nconnections_max = {connections_max}\n");
            toml::from_str::<BackupAgent>(&text).expect("settings").check()
        };
        agent(64, 64).expect("each VM has its connection");
        let refused = agent(65, 64).unwrap_err().to_string();
        assert!(refused.contains("network.connections_max is 64"), "{refused}");
    }
}
