//! The command line; what it sets wins over the settings file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};
use romulus_config::{EpochLength, Guest, LogFormat, PeerAddress, Replicator, Settings, load_over, vm_path};
use romulus_types::{HostId, VmId};
use serde_json::{Value, json};

/// Protects a running VM by checkpointing it to a backup host many times a second.
#[derive(Parser)]
#[command(name = "replicator", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Subcommand)]
pub enum Command {
    /// Attach to a running QEMU, or to a VMM that has an attach socket, and protect its guest until told to stop.
    Protect(Box<ProtectOptions>),
    /// Check the settings, or those of one VM, and end.
    Validate {
        /// The VM whose own settings are read, too.
        #[arg(long, value_name = "NAME")]
        vm: Option<VmId>,
        /// Settings file. Default /etc/romulus/replicator.toml and its .d folder, then /etc/romulus/vms/VM.toml and its.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Started by `protect`: frees the guest when the replicator dies.
    #[command(hide = true)]
    Guardian {
        /// What `protect` tells it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

/// The socket of QEMU or of another VMM: exactly one, unless the VM's settings name it.
#[derive(ClapArgs, Clone)]
#[group(multiple = false)]
pub struct HypervisorSocket {
    /// QEMU's QMP socket.
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// The attach socket of a VMM that embeds the attach library.
    #[arg(long, value_name = "SOCKET")]
    attach: Option<PathBuf>,
}

/// Options of `protect`.
#[derive(ClapArgs, Clone)]
pub struct ProtectOptions {
    /// The VM's name at the witness.
    #[arg(long, value_name = "NAME")]
    pub vm: VmId,
    /// How the guest is reached.
    #[command(flatten)]
    hypervisor: HypervisorSocket,
    /// A tap of the guest; may be given several times. Every network device of the guest must be on one.
    #[arg(long = "tap", value_name = "TAP")]
    taps: Vec<String>,
    /// Output or content that need not survive: the id of a network, character or block device, or of another output. May be
    /// repeated.
    #[arg(long = "disposable", value_name = "ID")]
    disposable: Vec<String>,
    /// The VM is new to the witness (or was ended): register it as running here.
    #[arg(long)]
    register: bool,
    /// Settings file. Default /etc/romulus/replicator.toml and its .d folder, then /etc/romulus/vms/VM.toml and its.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// This host's name, as in its certificates.
    #[arg(long, value_name = "NAME")]
    host: Option<HostId>,
    /// The backup's agent.
    #[arg(long, value_name = "[NAME@]HOST:PORT")]
    backup: Option<PeerAddress>,
    /// The backup's host name at the witness. Default: the name in its certificate that --backup asks for.
    #[arg(long, value_name = "NAME")]
    pub backup_host: Option<HostId>,
    /// The witness; may be given several times for several addresses of the one witness.
    #[arg(long, value_name = "[NAME@]HOST:PORT")]
    witness: Vec<PeerAddress>,
    /// Folder with this host's certificates.
    #[arg(long, value_name = "DIR")]
    pki: Option<PathBuf>,
    /// Length of an epoch, or auto: steered to the goal of [epochs.auto].
    #[arg(long, value_name = "TIME")]
    epoch: Option<EpochLength>,
    /// Silence of the backup after which it is suspected. Use the same on both hosts.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    suspicion_timeout: Option<Duration>,
    /// Folder for what must survive a crash.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/romulus/replicator")]
    pub state_dir: PathBuf,
    /// With --qmp: folder for FIFOs that QEMU can reach by the same path.
    #[arg(long, value_name = "DIR", default_value = "/run/romulus")]
    pub fifo_dir: PathBuf,
    /// Admin socket. Default /run/romulus/replicator-VM.sock.
    #[arg(long, value_name = "SOCKET")]
    admin: Option<PathBuf>,
    /// text or json.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

/// How a guest is reached, as it stands in the event of the attachment.
pub fn describe(guest: &Guest) -> Value {
    match (&guest.qmp, &guest.attach) {
        (Some(qmp), _) => json!({ "qmp": qmp }),
        (None, attach) => json!({ "attach": attach }),
    }
}

/// The settings of a host and, unless a file was named, of one VM.
///
/// # Errors
/// What can't be read or is not allowed.
pub fn read_settings(vm: Option<&VmId>, config: Option<&Path>) -> anyhow::Result<Replicator> {
    let own = vm.filter(|_| config.is_none()).map(vm_path);
    Ok(load_over(config, own.as_deref())?)
}

impl ProtectOptions {
    /// The files' settings with these on top.
    ///
    /// # Errors
    /// What is missing or not allowed.
    pub fn settings(&self) -> anyhow::Result<Replicator> {
        let mut settings = read_settings(Some(&self.vm), self.config.as_deref())?;
        self.set_guest(&mut settings.vm);
        settings.host = self.host.clone().or(settings.host);
        settings.backup = self.backup.clone().or(settings.backup);
        if !self.witness.is_empty() {
            settings.witness.clone_from(&self.witness);
        }
        settings.pki_dir = self.pki.clone().unwrap_or(settings.pki_dir);
        settings.admin_socket = self.admin.clone().or(settings.admin_socket);
        settings.epochs.length = self.epoch.unwrap_or(settings.epochs.length);
        if let Some(timeout) = self.suspicion_timeout {
            settings.failover.suspicion_timeout = timeout;
        }
        settings.log.format = self.log_format.unwrap_or(settings.log.format);
        settings.check()?;
        anyhow::ensure!(
            settings.vm.qmp.is_some() || settings.vm.attach.is_some(),
            "name the guest's hypervisor: --qmp or --attach, or [vm] in {}",
            vm_path(&self.vm).display()
        );
        anyhow::ensure!(
            settings.backup.is_some(),
            "name the backup with --backup or in the settings"
        );
        anyhow::ensure!(
            !settings.witness.is_empty(),
            "name the witness with --witness or in the settings"
        );
        Ok(settings)
    }
    fn set_guest(&self, guest: &mut Guest) {
        let HypervisorSocket { qmp, attach } = &self.hypervisor;
        if qmp.is_some() || attach.is_some() {
            (guest.qmp, guest.attach) = (qmp.clone(), attach.clone());
        }
        if !self.taps.is_empty() {
            guest.taps.clone_from(&self.taps);
        }
        if !self.disposable.is_empty() {
            guest.disposable.clone_from(&self.disposable);
        }
        guest.register |= self.register;
    }
}
