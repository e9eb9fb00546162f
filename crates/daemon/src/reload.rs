//! SIGHUP: certificates and settings are read again. Sessions go on.

use std::sync::Arc;

use romulus_config::{Settings, changed_keys};
use romulus_telemetry::{log, systemd};
use romulus_transport::Certificates;
use tracing::{error, info, warn};

/// Reads the daemon's settings, the command line on top.
type Read<S> = Box<dyn Fn() -> anyhow::Result<S> + Send>;
/// Puts one key's new value in force.
type Apply<S> = Box<dyn Fn(&S) -> anyhow::Result<()> + Send>;

/// What reading again needs. Only the keys that were given with [`Reload::live`], and `log.level`, change in a process that
/// runs; the rest is made from the settings once, and the log says that it waits for a restart.
pub struct Reload<S> {
    read: Read<S>,
    certificates: Arc<Certificates>,
    /// As the daemon began: what does not change while it runs.
    began_with: S,
    /// As they were read last.
    last: S,
    live: Vec<(&'static str, Apply<S>)>,
}

impl<S: Settings + Clone + Send + 'static> Reload<S> {
    /// For a daemon that began with `settings`.
    pub fn new(
        settings: S,
        certificates: Arc<Certificates>,
        read: impl Fn() -> anyhow::Result<S> + Send + 'static,
    ) -> Self {
        let level = |settings: &S| Ok(log::set_level(&settings.log().level)?);
        Self {
            read: Box::new(read),
            certificates,
            began_with: settings.clone(),
            last: settings,
            live: vec![("log.level", Box::new(level))],
        }
    }

    /// `key` is put in force by `apply`.
    #[must_use]
    pub fn live(
        mut self,
        key: &'static str,
        apply: impl Fn(&S) -> anyhow::Result<()> + Send + 'static,
    ) -> Self {
        self.live.push((key, Box::new(apply)));
        self
    }

    /// Reads everything again, off the runtime's thread, and tells the service manager. What can't be used stays as it was, and
    /// the log says so.
    pub async fn run(mut self) -> Self {
        systemd::reloading();
        let read = tokio::task::spawn_blocking(move || {
            self.certificates();
            self.settings();
            self
        });
        let this = read.await.expect("reading settings does not panic");
        systemd::ready();
        this
    }

    fn certificates(&self) {
        match self.certificates.reload() {
            Ok(_) => info!(event = "certificates_reloaded"),
            Err(error) => {
                error!(event = "reload_failed", %error, "the certificates were not reloaded, the earlier ones stay");
            }
        }
    }

    fn settings(&mut self) {
        let after = match (self.read)() {
            Ok(after) => after,
            Err(error) => {
                let error = format!("{error:#}");
                return error!(
                    event = "reload_failed",
                    error, "the settings were not reloaded, the earlier ones stay"
                );
            }
        };
        let waiting = self.waiting(&after);
        if !waiting.is_empty() {
            let settings = waiting.join(", ");
            warn!(
                event = "restart_needed",
                settings, "these settings wait for a restart"
            );
        }
        let changed = changed_keys(&self.last, &after);
        let mut applied = Vec::new();
        for (key, apply) in self
            .live
            .iter()
            .filter(|(key, _)| changed.iter().any(|k| k == key))
        {
            match apply(&after) {
                Ok(()) => applied.push(*key),
                Err(error) => {
                    let error = format!("{error:#}");
                    return error!(event = "reload_failed", key, error, "the earlier settings stay");
                }
            }
        }
        self.last = after;
        info!(event = "settings_reloaded", changed = applied.join(", "));
    }

    /// Changed since the daemon began, and not in force before its next start.
    fn waiting(&self, after: &S) -> Vec<String> {
        let mut keys = changed_keys(&self.began_with, after);
        keys.retain(|key| !self.live.iter().any(|(live, _)| live == key));
        keys
    }
}
