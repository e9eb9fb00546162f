//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use romulus_config::PeerAddress;
use romulus_types::VmId;

/// Remus-style fault tolerance for KVM virtual machines: the operator's command.
#[derive(Parser)]
#[command(name = "romulus", version, after_help = crate::exit::help())]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Is the VM protected, and if not, why?
    Status(AdminOptions),
    /// A live view of all VMs of all daemons on this host.
    Top(TopOptions),
    /// What happened lately, oldest first.
    Events(EventsOptions),
    /// Start the protection of a VM, and wait until it is protected.
    Protect(ProtectOptions),
    /// Wait until a VM is protected; shows how far the copy of its memory is.
    Wait(WaitOptions),
    /// Stop protecting: the guest runs on here, and nothing of ours is left in its hypervisor.
    Unprotect(AdminOptions),
    /// Planned failover: move the guest to its backup without losing anything. On a backup host: ask the primary for it.
    Failover(FailoverOptions),
    /// On a backup host: remove what is kept of a VM that is not protected to here.
    Forget(ForgetOptions),
    /// May this host start the VM from its disk? Asks the witness; for boot scripts. Exit code 0 only if it may.
    MayRun(MayRunOptions),
    /// Look at everything on this host that protection needs, and say what to do about what is missing.
    Doctor(DoctorOptions),
    /// Check settings files; names the line and what is wrong with it.
    Validate(ValidateOptions),
    /// Certificates for mutual TLS.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Print a completion script: `romulus completions bash > /etc/bash_completion.d/romulus`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder.
    #[command(hide = true)]
    Man {
        /// The folder.
        dir: PathBuf,
    },
}

#[derive(ClapArgs, Clone)]
pub(crate) struct AdminOptions {
    /// The VM; needed where several are here.
    #[arg(value_name = "VM")]
    pub(crate) name: Option<VmId>,
    /// A daemon's admin socket; by default all in /run/romulus and /run/romulus-witness.
    #[arg(long, env = "ROMULUS_ADMIN", value_name = "SOCKET")]
    pub(crate) admin: Option<PathBuf>,
    /// The VM, as above.
    #[arg(long, value_name = "NAME", conflicts_with = "name")]
    vm: Option<VmId>,
    /// Print JSON with a versioned schema.
    #[arg(long)]
    pub(crate) json: bool,
}

impl AdminOptions {
    /// The VM that is meant, however it was said.
    pub(crate) fn vm(&self) -> Option<&VmId> {
        self.name.as_ref().or(self.vm.as_ref())
    }
}

#[derive(ClapArgs)]
pub(crate) struct TopOptions {
    #[command(flatten)]
    pub(crate) admin: AdminOptions,
    /// Time from one look to the next.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    pub(crate) interval: Duration,
    /// Print the table once and end; this is also what happens when the output is no terminal.
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(ClapArgs)]
pub(crate) struct EventsOptions {
    #[command(flatten)]
    pub(crate) admin: AdminOptions,
    /// Go on printing what happens, until interrupted. With --json an object a line.
    #[arg(long, short)]
    pub(crate) follow: bool,
}

#[derive(ClapArgs)]
pub(crate) struct ProtectOptions {
    /// The VM: its settings are in /etc/romulus/vms/VM.toml, its unit is romulus-replicator@VM.
    pub(crate) vm: VmId,
    /// How its guest is reached, for a VM that has no settings yet.
    #[command(flatten)]
    pub(crate) guest: GuestOptions,
    /// End when the unit has started, without waiting for the protection.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// How long to wait for the protection.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    /// Print JSON with a versioned schema.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `protect` writes to /etc/romulus/vms/VM.toml when it is given. Without any of it the file has to be there.
#[derive(ClapArgs)]
pub(crate) struct GuestOptions {
    /// QEMU's QMP socket.
    #[arg(long, value_name = "SOCKET", conflicts_with = "attach")]
    pub(crate) qmp: Option<PathBuf>,
    /// The attach socket of a VMM that embeds the attach library.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) attach: Option<PathBuf>,
    /// A tap of the guest; may be given several times.
    #[arg(long = "tap", value_name = "TAP")]
    pub(crate) taps: Vec<String>,
    /// The id of a device whose output or content need not survive; may be given several times.
    #[arg(long = "disposable", value_name = "ID")]
    pub(crate) disposable: Vec<String>,
    /// Register the VM as running here when the witness does not know it.
    #[arg(long)]
    pub(crate) register: bool,
}

#[derive(ClapArgs)]
pub(crate) struct WaitOptions {
    #[command(flatten)]
    pub(crate) admin: AdminOptions,
    /// How long to wait.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
}

#[derive(ClapArgs)]
pub(crate) struct FailoverOptions {
    #[command(flatten)]
    pub(crate) admin: AdminOptions,
    /// On a backup host: take over though the witness can't be reached. Waits out the mute limit, after which the
    /// primary has suspended its guest.
    #[arg(long)]
    pub(crate) force: bool,
    /// With --force: the primary was fenced (switched off, cut from the network), so there is nothing to wait for.
    #[arg(long, requires = "force")]
    pub(crate) fenced: bool,
}

#[derive(ClapArgs)]
pub(crate) struct ForgetOptions {
    #[command(flatten)]
    pub(crate) admin: AdminOptions,
    /// Also one that may be needed here.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(ClapArgs)]
pub(crate) struct MayRunOptions {
    /// The VM's name at the witness.
    pub(crate) vm: VmId,
    /// The replicator's settings, for the witness and the certificates. Default /etc/romulus/replicator.toml.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The witness; may be given several times for several addresses of the one witness.
    #[arg(long, value_name = "[NAME@]HOST:PORT")]
    pub(crate) witness: Vec<PeerAddress>,
    /// Folder with this host's certificates.
    #[arg(long, value_name = "DIR")]
    pub(crate) pki: Option<PathBuf>,
    /// The folder above the daemons' state folders: a witness that forgot what they remember is not believed.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/romulus")]
    pub(crate) state_dir: PathBuf,
    /// How long the witness may take.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    /// Print JSON with a versioned schema.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a host is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// It runs guests that are protected.
    Primary,
    /// It is a backup for them.
    Backup,
    /// It runs the witness.
    Witness,
}

#[derive(ClapArgs)]
pub(crate) struct DoctorOptions {
    /// What this host is for; may be repeated. By default each daemon that has a settings file, or else primary and backup.
    #[arg(long = "role", value_name = "ROLE")]
    pub(crate) roles: Vec<Role>,
    /// The folder with the daemons' settings.
    #[arg(long, value_name = "DIR", default_value = "/etc/romulus")]
    pub(crate) config_dir: PathBuf,
    /// Folder with this host's certificates. Default: as the settings have it.
    #[arg(long, value_name = "DIR")]
    pub(crate) pki: Option<PathBuf>,
    /// The backup's agent, to measure the way there. Default: as the replicator's settings have it.
    #[arg(long, value_name = "[NAME@]HOST:PORT")]
    pub(crate) backup: Option<PeerAddress>,
    /// The witness. Default: as the settings have it.
    #[arg(long, value_name = "[NAME@]HOST:PORT")]
    pub(crate) witness: Option<PeerAddress>,
    /// Print JSON with a versioned schema.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Whose settings a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Daemon {
    /// The replicator.
    Replicator,
    /// The backup agent.
    BackupAgent,
    /// The witness.
    Witness,
}

#[derive(ClapArgs)]
pub(crate) struct ValidateOptions {
    /// Settings files, each with its .d folder; those of a VM, in a folder vms, are checked on top of their host's. Default: those
    /// in /etc/romulus.
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Whose settings the files hold, where their names do not say so.
    #[arg(long)]
    pub(crate) daemon: Option<Daemon>,
    /// Print JSON with a versioned schema.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a certificate authority and a folder of certificates for each host.
    Init(PkiInit),
    /// Make the folder of a further host with the authority that is there.
    Issue(PkiInit),
    /// Say whether hosts' certificates are complete, matching and in date. Exit code 7 when one is not, or ends soon.
    Check {
        /// A host's certificate folder. Default /etc/romulus/pki.
        #[arg(long = "dir", value_name = "DIR")]
        dirs: Vec<PathBuf>,
        /// Print JSON with a versioned schema.
        #[arg(long)]
        json: bool,
    },
    /// Replace hosts' certificates by new ones with new keys, the same names and a later end.
    Renew(PkiRenew),
    /// Have the daemons on this host read their certificates again. Their sessions go on.
    Reload(AdminOptions),
}

#[derive(ClapArgs)]
pub(crate) struct PkiInit {
    /// Where they are: DIR/ca and one folder a host.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// A host: its name, then further names or addresses. May be given several times.
    #[arg(long = "host", value_name = "NAME[,NAME|IP]...", required = true)]
    pub(crate) hosts: Vec<String>,
    /// How long the hosts' certificates are valid.
    #[arg(long, default_value_t = 825, value_name = "DAYS")]
    pub(crate) days: u32,
}

#[derive(ClapArgs)]
pub(crate) struct PkiRenew {
    /// Where they are: DIR/ca and one folder a host.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// A host. May be given several times. Default: all in DIR.
    #[arg(long = "host", value_name = "NAME")]
    pub(crate) hosts: Vec<String>,
    /// How long the new certificates are valid.
    #[arg(long, default_value_t = 825, value_name = "DAYS")]
    pub(crate) days: u32,
}
