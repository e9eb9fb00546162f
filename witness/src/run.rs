//! The daemon's life: open the store, serve, end on a signal or when the store fails.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use romulus_config::{WITNESS_METRICS_PORT, Witness};
use romulus_telemetry::{Pulse, serve_admin, serve_metrics, systemd};
use romulus_transport::{Endpoint, Identity, Service};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{error, info};

use crate::admin::{self, Admin, Watched};
use crate::desk::Desk;
use crate::server::{Counts, Server};
use crate::store::Store;

/// The loop turns at least this often.
const BEAT: Duration = Duration::from_secs(1);
/// Without a watchdog the tick does nothing.
const IDLE_TICK: Duration = Duration::from_secs(3600);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, or the failure of the store.
pub(crate) fn run(settings: &Witness) -> anyhow::Result<()> {
    romulus_telemetry::log::init(&settings.log)?;
    let identity = Identity::load(&settings.pki_dir)?;
    let (store, records) = Store::open(&settings.dir)?;
    info!(event = "store_opened", dir = %settings.dir.display(), instance = %store.instance(), vms = records.len());
    let vms_max = usize::try_from(settings.vms_max).unwrap_or(usize::MAX);
    let desk = Arc::new(Desk::new(store, records, vms_max));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(settings, &identity, desk))
}

async fn serve(settings: &Witness, identity: &Identity, desk: Arc<Desk>) -> anyhow::Result<()> {
    let endpoint = Endpoint::server(identity, &settings.network, Service::Witness, settings.listen)?;
    let endpoint = Arc::new(endpoint);
    let (fatal, mut failures) = mpsc::channel(1);
    let counts = Arc::new(Counts::default());
    let server = Server {
        desk: desk.clone(),
        counts: counts.clone(),
        fatal,
    };
    let admin = Admin { desk, counts };
    let pulse = Pulse::new();
    let watched = admin::watched_router(Watched {
        admin: admin.clone(),
        endpoint: Arc::clone(&endpoint),
        vms_max: settings.vms_max.into(),
        pulse: pulse.clone(),
        stall_limit: settings.metrics.stall_limit,
    });
    let _socket = serve_admin(
        &settings.admin_socket,
        admin::router(admin).merge(watched.clone()),
    )?;
    let _metrics = serve_metrics(settings.metrics.listen(WITNESS_METRICS_PORT), 1, watched).await;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut tick = tokio::time::interval(systemd::watchdog_interval().unwrap_or(IDLE_TICK));
    let listen = endpoint.local_addr().context("the socket has no address")?;
    info!(event = "ready", %listen, host = %identity.host());
    systemd::ready();
    let mut beat = tokio::time::interval(BEAT);
    let result = loop {
        pulse.beat();
        tokio::select! {
            connection = endpoint.accept() => {
                tokio::spawn(server.clone().serve(connection?));
            }
            Some(failure) = failures.recv() => {
                break Err(failure).context("the record could not be made durable, so nothing was answered");
            }
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            _ = hangup.recv() => reload(settings, &endpoint),
            _ = tick.tick() => systemd::watchdog(),
            _ = beat.tick() => {}
        }
    };
    systemd::stopping();
    info!(event = "stopping");
    endpoint.shutdown("the witness is stopping").await;
    result
}

/// New certificates; settings need a restart.
fn reload(settings: &Witness, endpoint: &Endpoint) {
    systemd::reloading();
    match Identity::load(&settings.pki_dir)
        .map_err(Into::into)
        .and_then(|identity| endpoint.reload(&identity))
    {
        Ok(()) => info!(event = "reloaded"),
        Err(error) => error!(%error, "the certificates were not reloaded, the earlier ones stay"),
    }
    systemd::ready();
}
