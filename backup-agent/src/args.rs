//! The command line; what it sets wins over the settings file.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use romulus_config::{BackupAgent, LogFormat, PeerAddress, Settings, StandbyKind, load};
use romulus_types::HostId;

/// Receives checkpoints of VMs and takes over when their primary is lost.
#[derive(Parser)]
#[command(name = "backup-agent", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Subcommand)]
pub enum Command {
    /// Serve primaries until SIGTERM.
    Run(Box<RunOptions>),
    /// Check the settings and end.
    Validate {
        /// Settings file. Default /etc/romulus/backup-agent.toml and its .d folder.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

/// Options of `run`.
#[derive(ClapArgs, Clone)]
pub struct RunOptions {
    /// Settings file. Default /etc/romulus/backup-agent.toml and its .d folder.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// This host's name, as in its certificates.
    #[arg(long, value_name = "NAME")]
    host: Option<HostId>,
    /// UDP address to listen on.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The witness; may be given several times for several addresses of the one witness.
    #[arg(long, value_name = "[NAME@]HOST:PORT")]
    witness: Vec<PeerAddress>,
    /// Folder with this host's certificates.
    #[arg(long, value_name = "DIR")]
    pki: Option<PathBuf>,
    /// Folder for memory images, on a tmpfs.
    #[arg(long, value_name = "DIR")]
    image_dir: Option<PathBuf>,
    /// Folder for what must survive a reboot.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/romulus/backup-agent")]
    pub state_dir: PathBuf,
    /// The bridge that a standby's taps join when it takes over.
    #[arg(long, value_name = "BRIDGE")]
    bridge: Option<String>,
    /// Start standbys only when they are needed.
    #[arg(long)]
    cold: bool,
    /// Let a guest run only after all its memory was compared with the commit. Costs the time to read it.
    #[arg(long)]
    verify_activation: bool,
    /// Silence of the primary after which it is suspected.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    suspicion_timeout: Option<std::time::Duration>,
    /// Admin socket.
    #[arg(long, value_name = "SOCKET")]
    admin: Option<PathBuf>,
    /// text or json.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

impl RunOptions {
    /// The file's settings with these on top.
    ///
    /// # Errors
    /// What is missing or not allowed.
    pub fn settings(&self) -> anyhow::Result<BackupAgent> {
        let mut settings: BackupAgent = load(self.config.as_deref())?;
        settings.host = self.host.clone().or(settings.host);
        settings.listen = self.listen.unwrap_or(settings.listen);
        if !self.witness.is_empty() {
            settings.witness.clone_from(&self.witness);
        }
        let path = |given: &Option<PathBuf>, file: PathBuf| given.clone().unwrap_or(file);
        settings.pki_dir = path(&self.pki, settings.pki_dir);
        settings.image_dir = path(&self.image_dir, settings.image_dir);
        settings.admin_socket = path(&self.admin, settings.admin_socket);
        settings.bridge = self.bridge.clone().or(settings.bridge);
        if self.cold {
            settings.standby = StandbyKind::Cold;
        }
        settings.verify_activation |= self.verify_activation;
        if let Some(timeout) = self.suspicion_timeout {
            settings.failover.suspicion_timeout = timeout;
        }
        settings.log.format = self.log_format.unwrap_or(settings.log.format);
        settings.check()?;
        anyhow::ensure!(
            !settings.witness.is_empty(),
            "name the witness with --witness or in the settings"
        );
        Ok(settings)
    }
}
