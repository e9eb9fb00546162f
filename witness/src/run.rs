//! The daemon's life: open the store, serve, end on a signal or when the store fails.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use romulus_config::{Witness, changed_keys};
use romulus_telemetry::{serve_admin, serve_metrics, systemd};
use romulus_transport::{Endpoint, Identity, Service};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use crate::admin::{self, Admin};
use crate::args::RunOptions;
use crate::desk::Desk;
use crate::server::{Counts, Server};
use crate::store::Store;

/// What changes while the witness runs. The rest is made from the settings once.
const LIVE: &[&str] = &["log.level"];
/// Without a watchdog the tick does nothing.
const IDLE_TICK: Duration = Duration::from_secs(3600);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, or the failure of the store.
pub(crate) fn run(options: &RunOptions) -> anyhow::Result<()> {
    let settings = options.settings()?;
    romulus_telemetry::log::init(&settings.log)?;
    let identity = Identity::load(&settings.pki_dir)?;
    let (store, records) = Store::open(&settings.dir)?;
    info!(event = "store_opened", dir = %settings.dir.display(), instance = %store.instance(), vms = records.len());
    let vms_max = usize::try_from(settings.vms_max).unwrap_or(usize::MAX);
    let desk = Arc::new(Desk::new(store, records, vms_max));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(options, settings, &identity, desk))
}

async fn serve(
    options: &RunOptions,
    mut settings: Witness,
    identity: &Identity,
    desk: Arc<Desk>,
) -> anyhow::Result<()> {
    let endpoint = Endpoint::server(identity, &settings.network, Service::Witness, settings.listen)?;
    let (fatal, mut failures) = mpsc::channel(1);
    let counts = Arc::new(Counts::default());
    let server = Server {
        desk: desk.clone(),
        counts: counts.clone(),
        fatal,
    };
    let (records, mut line) = (desk.clone(), systemd::StatusLine::default());
    let admin = Admin { desk, counts };
    let metrics = admin::metrics(&admin);
    let _socket = serve_admin(
        &settings.admin_socket,
        admin::router(admin).merge(metrics.router()),
    )?;
    let _metrics = match settings.metrics.listen {
        Some(address) => Some(serve_metrics(address, metrics.router()).await?),
        None => None,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut tick = tokio::time::interval(systemd::watchdog_interval().unwrap_or(IDLE_TICK));
    let listen = endpoint.local_addr().context("the socket has no address")?;
    info!(event = "ready", %listen, host = %identity.host());
    systemd::ready();
    line.set(format!("{} VMs have a record", records.records().len()));
    let result = loop {
        tokio::select! {
            connection = endpoint.accept() => {
                tokio::spawn(server.clone().serve(connection?));
            }
            Some(failure) = failures.recv() => {
                break Err(failure).context("the record could not be made durable, so nothing was answered");
            }
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            _ = hangup.recv() => reload(options, &mut settings, &endpoint),
            _ = tick.tick() => {
                systemd::watchdog();
                line.set(format!("{} VMs have a record", records.records().len()));
            }
        }
    };
    systemd::stopping();
    info!(event = "stopping");
    endpoint.shutdown("the witness is stopping").await;
    result
}

/// New certificates and settings, as far as they can change in a process that runs.
fn reload(options: &RunOptions, settings: &mut Witness, endpoint: &Endpoint) {
    systemd::reloading();
    match Identity::load(&settings.pki_dir)
        .map_err(Into::into)
        .and_then(|identity| endpoint.reload(&identity))
    {
        Ok(()) => info!(event = "reloaded"),
        Err(error) => error!(%error, "the certificates were not reloaded, the earlier ones stay"),
    }
    match options.settings() {
        Ok(after) => apply(settings, after),
        Err(error) => {
            let error = format!("{error:#}");
            error!(
                event = "reload_failed",
                error, "the settings were not reloaded, the earlier ones stay"
            );
        }
    }
    systemd::ready();
}

fn apply(settings: &mut Witness, after: Witness) {
    let (live, waiting): (Vec<String>, Vec<String>) = changed_keys(settings, &after)
        .into_iter()
        .partition(|key| LIVE.contains(&key.as_str()));
    if !waiting.is_empty() {
        let settings = waiting.join(", ");
        warn!(
            event = "restart_needed",
            settings, "these settings wait for a restart"
        );
    }
    if let Err(error) = romulus_telemetry::log::set_level(&after.log.level) {
        return error!(event = "reload_failed", %error, "the level of the log stays");
    }
    // The others are named again at the next reload, as they still wait.
    settings.log.level = after.log.level;
    info!(event = "settings_reloaded", changed = live.join(", "));
}
