//! SIGHUP: certificates and settings are read again, off the driver's thread. Sessions go on.

use std::sync::Arc;

use anyhow::Context;
use romulus_config::{Replicator, changed_keys};
use romulus_telemetry::{log, systemd};
use romulus_transport::{Endpoint, Identity};
use romulus_types::HostId;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::args::ProtectOptions;

/// What changes while the replicator runs. The rest is made from the settings once.
const LIVE: &[&str] = &["log.level"];

/// What reading again needs.
pub struct Reload {
    /// The command line, which still wins.
    pub options: ProtectOptions,
    /// The settings that are in force.
    pub settings: Replicator,
    /// This host.
    pub host: HostId,
    /// What shows certificates.
    pub endpoints: Vec<Arc<Endpoint>>,
}

/// Reads again at each SIGHUP, for as long as the runtime lives.
///
/// # Errors
/// When the signal can't be waited for.
pub fn on_hangup(mut reload: Reload) -> anyhow::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            systemd::reloading();
            let read = tokio::task::spawn_blocking(move || {
                reload.certificates();
                reload.settings();
                reload
            });
            reload = read.await.expect("reading settings does not panic");
            systemd::ready();
        }
    });
    Ok(())
}

impl Reload {
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
