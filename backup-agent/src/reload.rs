//! SIGHUP: certificates and settings are read again, off the thread of the drivers. Sessions go on.

use std::sync::Arc;

use anyhow::Context;
use romulus_config::{BackupAgent, changed_keys};
use romulus_telemetry::log;
use romulus_transport::{Endpoint, Identity};
use romulus_types::HostId;
use tracing::{error, info, warn};

use crate::args::RunOptions;

/// What changes while the agent runs. The rest is made from the settings once.
const LIVE: &[&str] = &["log.level"];

/// What reading again needs.
pub struct Reload {
    /// The command line, which still wins.
    pub options: RunOptions,
    /// The settings that are in force.
    pub settings: BackupAgent,
    /// This host.
    pub host: HostId,
    /// What shows certificates.
    pub endpoints: Vec<Arc<Endpoint>>,
}

impl Reload {
    /// Reads everything again; what can't be used stays as it was, and the log says so. Blocks on files.
    pub fn run(&mut self) {
        self.certificates();
        self.settings();
    }

    fn certificates(&self) {
        let load = || {
            let identity = Identity::load(&self.settings.pki_dir)?;
            anyhow::ensure!(
                *identity.host() == self.host,
                "they are those of {}",
                identity.host()
            );
            self.endpoints
                .iter()
                .try_for_each(|endpoint| endpoint.reload(&identity))
                .context("they can't be used")
        };
        match load() {
            Ok(()) => info!(event = "certificates_reloaded"),
            Err(error) => {
                let error = format!("{error:#}");
                error!(
                    event = "reload_failed",
                    error, "the certificates were not reloaded, the earlier ones stay"
                );
            }
        }
    }

    fn settings(&mut self) {
        let after = match self.options.settings() {
            Ok(after) => after,
            Err(error) => {
                let error = format!("{error:#}");
                return error!(
                    event = "reload_failed",
                    error, "the settings were not reloaded, the earlier ones stay"
                );
            }
        };
        let (live, waiting): (Vec<String>, Vec<String>) = changed_keys(&self.settings, &after)
            .into_iter()
            .partition(|key| LIVE.contains(&key.as_str()));
        if !waiting.is_empty() {
            warn!(
                event = "restart_needed",
                settings = waiting.join(", "),
                "these settings wait for a restart"
            );
        }
        if let Err(error) = log::set_level(&after.log.level) {
            return error!(event = "reload_failed", %error, "the level of the log stays");
        }
        // The others are named again at the next reload, as they still wait.
        self.settings.log.level = after.log.level;
        info!(event = "settings_reloaded", changed = live.join(", "));
    }
}
