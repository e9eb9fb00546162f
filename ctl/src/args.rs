//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};
use romulus_config::PeerAddress;
use romulus_types::VmId;

/// Remus-style fault tolerance for KVM virtual machines: the operator's command.
#[derive(Parser)]
#[command(
    name = "romulus",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not protected (status), 4 daemon unreachable, 5 must not run here (may-run), 6 not known (may-run)."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Is the VM protected, and if not, why?
    Status(AdminOptions),
    /// What happened lately, oldest first.
    Events(AdminOptions),
    /// Stop protecting: the guest runs on here, and nothing of ours is left in its hypervisor.
    Unprotect(AdminOptions),
    /// Planned failover: move the guest to its backup without losing anything. On a backup host: ask the primary for it.
    Failover(FailoverOptions),
    /// May this host start the VM from its disk? Asks the witness; for boot scripts. Exit code 0 only if it may.
    MayRun(MayRunOptions),
    /// Certificates for mutual TLS.
    #[command(subcommand)]
    Pki(PkiCommand),
}

#[derive(ClapArgs)]
pub(crate) struct AdminOptions {
    /// The daemon's admin socket; by default the only one in /run/romulus.
    #[arg(long, env = "ROMULUS_ADMIN", value_name = "SOCKET")]
    pub(crate) admin: Option<PathBuf>,
    /// The VM, where the daemon has several.
    #[arg(long, value_name = "NAME")]
    pub(crate) vm: Option<String>,
    /// Print JSON with a versioned schema.
    #[arg(long)]
    pub(crate) json: bool,
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

#[derive(Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a certificate authority and a folder of certificates for each host.
    Init(PkiInit),
    /// Say whether a host's certificates are complete, matching and in date.
    Check {
        /// The host's certificate folder.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
}

#[derive(ClapArgs)]
pub(crate) struct PkiInit {
    /// Where to make them: DIR/ca and one folder a host.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// A host: its name, then further names or addresses. May be given several times.
    #[arg(long = "host", value_name = "NAME[,NAME|IP]...", required = true)]
    pub(crate) hosts: Vec<String>,
    /// How long the hosts' certificates are valid.
    #[arg(long, default_value_t = 825, value_name = "DAYS")]
    pub(crate) days: u32,
}
