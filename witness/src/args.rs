//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use romulus_config::{LogFormat, MetricsListen, Witness, load};
use romulus_types::VmId;

/// Keeps the record of who may let a VM speak.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answers requests until it is told to stop.
    Run(RunOptions),
    /// Makes a store; refused where there is one.
    Init {
        #[command(flatten)]
        place: Place,
        /// Gives a store that was copied or restored another instance. Each VM must be registered again then.
        #[arg(long)]
        renew: bool,
    },
    /// Prints the records.
    Show {
        #[command(flatten)]
        place: Place,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Removes the record of a VM. Only when at most one host can still run it.
    Forget {
        #[command(flatten)]
        place: Place,
        /// The VM.
        vm: VmId,
        /// The admin socket of a running witness.
        #[arg(long)]
        admin: Option<PathBuf>,
    },
    /// Checks the settings and ends.
    Validate {
        /// The settings file.
        #[arg(long)]
        config: Option<PathBuf>,
    },
}

/// Where the store is.
#[derive(Clone, Debug, Args)]
pub(crate) struct Place {
    /// The settings file.
    #[arg(long)]
    config: Option<PathBuf>,
    /// The store's folder.
    #[arg(long)]
    dir: Option<PathBuf>,
}

impl Place {
    pub(crate) fn settings(&self) -> anyhow::Result<Witness> {
        let mut settings: Witness = load(self.config.as_deref())?;
        if let Some(dir) = &self.dir {
            settings.dir.clone_from(dir);
        }
        Ok(settings)
    }
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RunOptions {
    #[command(flatten)]
    place: Place,
    /// The UDP address to listen on.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// The directory with this host's certificates.
    #[arg(long)]
    pki: Option<PathBuf>,
    /// The admin socket.
    #[arg(long)]
    admin: Option<PathBuf>,
    /// What is logged.
    #[arg(long)]
    log_level: Option<String>,
    /// text or json.
    #[arg(long)]
    log_format: Option<LogFormat>,
    /// TCP address for metrics, or "none". Default 127.0.0.1:7701.
    #[arg(long)]
    metrics_listen: Option<MetricsListen>,
}

impl RunOptions {
    /// The settings file with what the command line says over it.
    pub(crate) fn settings(&self) -> anyhow::Result<Witness> {
        let mut settings = self.place.settings()?;
        settings.listen = self.listen.unwrap_or(settings.listen);
        settings.pki_dir = self.pki.clone().unwrap_or(settings.pki_dir);
        settings.admin_socket = self.admin.clone().unwrap_or(settings.admin_socket);
        settings.log.level = self.log_level.clone().unwrap_or(settings.log.level);
        settings.log.format = self.log_format.unwrap_or(settings.log.format);
        settings.metrics.listen = self.metrics_listen.or(settings.metrics.listen);
        Ok(settings)
    }
}
