//! The daemon's life: open the store, serve, end on a signal or when the store fails.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use romulus_config::{WITNESS_METRICS_PORT, Witness};
use romulus_daemon::{AllowList, Reload};
use romulus_telemetry::{Pulse, serve_admin, serve_metrics, systemd};
use romulus_transport::{Certificates, Endpoint, Identity, Service};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::info;

use crate::admin::{self, Admin, Watched};
use crate::args::RunOptions;
use crate::desk::Desk;
use crate::server::{Counts, Server};
use crate::store::Store;

/// The loop turns at least this often.
const BEAT: Duration = Duration::from_secs(1);
/// How often the status line is looked at, which waits for the records.
const LINE_EVERY: Duration = Duration::from_secs(15);

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
    let runtime = romulus_daemon::runtime()?;
    runtime.block_on(serve(options, settings, &identity, desk))
}

async fn serve(
    options: &RunOptions,
    settings: Witness,
    identity: &Identity,
    desk: Arc<Desk>,
) -> anyhow::Result<()> {
    let endpoint = Arc::new(Endpoint::server(
        identity,
        &settings.network,
        Service::Witness,
        settings.listen,
        None,
    )?);
    let certificates = Arc::new(Certificates::new(identity, vec![Arc::clone(&endpoint)]));
    let allow = AllowList::new(settings.allow.clone());
    let mut reload = reload(options, &settings, Arc::clone(&certificates), allow.clone());
    let (fatal, mut failures) = mpsc::channel(1);
    let counts = Arc::new(Counts::default());
    let server = Server {
        desk: desk.clone(),
        counts: counts.clone(),
        allow,
        fatal,
    };
    let (records, mut line) = (desk.clone(), systemd::StatusLine::default());
    let admin = Admin {
        desk,
        counts,
        certificates,
    };
    let pulse = Pulse::of_service();
    let watched = admin::watched_router(Watched {
        admin: admin.clone(),
        endpoint: Arc::clone(&endpoint),
        vms_max: settings.vms_max.into(),
        pulse: pulse.clone(),
        stall_limit: settings.metrics.stall_limit,
    });
    let _socket = serve_admin(
        &settings.admin_socket,
        settings.admin_group.as_deref(),
        admin::api(watched.clone()).into_router(admin),
    )?;
    let _metrics = serve_metrics(settings.metrics.listen(WITNESS_METRICS_PORT), 1, watched).await;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let listen = endpoint.local_addr().context("the socket has no address")?;
    info!(event = "ready", %listen, host = %identity.host());
    systemd::ready();
    let mut beat = tokio::time::interval(BEAT);
    let mut look = tokio::time::interval(LINE_EVERY);
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
            _ = hangup.recv() => reload = reload.run().await,
            _ = look.tick() => line.set(format!("{} VMs have a record", records.records().len())),
            _ = beat.tick() => {}
        }
    };
    systemd::stopping();
    info!(event = "stopping");
    endpoint.shutdown("the witness is stopping").await;
    result
}

fn reload(
    options: &RunOptions,
    settings: &Witness,
    certificates: Arc<Certificates>,
    allow: AllowList,
) -> Reload<Witness> {
    let options = options.clone();
    Reload::new(settings.clone(), certificates, move || options.settings()).live("allow", move |settings| {
        allow.replace(settings.allow.clone());
        Ok(())
    })
}
