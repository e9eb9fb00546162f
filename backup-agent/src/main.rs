//! `backup-agent`: receives checkpoints of VMs and takes over when their primary is lost.
#![forbid(unsafe_code)]

mod admin;
mod admission;
mod args;
mod guest;
mod huge;
mod inbox;
mod listener;
mod metrics;
mod pace;
mod place;
mod refusals;
mod registry;
mod service;
mod session;
mod standbys;
mod starts;
mod status;
mod store;
mod store_jobs;
mod supervise;
mod vm_driver;

use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use clap::Parser;
use romulus_backup_agent::{receive, vm_image};
use romulus_config::AGENT_METRICS_PORT;
use romulus_daemon::{AllowList, BadSettings, Reload, exit_code};
use romulus_host_sys::process_clock::Clock;
use romulus_host_sys::{SysError, priority};
use romulus_image::Places;
use romulus_telemetry::{Pulse, Server, serve_metrics};
use romulus_transport::{Bulk, Certificates, Endpoint, Identity, Service, WitnessClient};
use tracing::{error, info, warn};

use crate::admission::Admission;
use crate::args::{Args, Command};
use crate::listener::Listener;
use crate::registry::{Registry, Shared};
use crate::standbys::Standbys;
use crate::starts::Starts;

fn main() -> ExitCode {
    // Before anything else is opened.
    let inherited = romulus_host_sys::take_inherited_files();
    let result = match Args::parse().command {
        Command::Run(options) => start(*options, inherited),
        Command::Validate { config } => {
            romulus_config::load::<romulus_config::BackupAgent>(config.as_deref())
                .map(drop)
                .context(BadSettings)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = format!("{error:#}"), "ended");
            eprintln!("backup-agent: {error:#}");
            exit_code(&error)
        }
    }
}

fn start(
    options: args::RunOptions,
    inherited: Result<Vec<(String, OwnedFd)>, SysError>,
) -> anyhow::Result<()> {
    let settings = options.settings().context(BadSettings)?;
    romulus_telemetry::log::init(&settings.log)?;
    let inherited = inherited.context("what systemd handed over can't be taken")?;
    let places = place::places(&settings, &options.state_dir, inherited)?;
    // Recovering computes much: not yet as a real-time thread.
    priority::raise();
    let runtime = romulus_daemon::runtime()?;
    runtime.block_on(run(options, settings, places))
}

/// Output is held for as long as this thread waits for others.
fn take_priority(realtime: bool) {
    let raised = priority::raise();
    if realtime && priority::raise_to_realtime() {
        return;
    }
    if realtime || !raised {
        let kind = if realtime { "real-time" } else { "higher" };
        warn!(
            event = "priority",
            raised,
            "no {kind} priority is to be had (CAP_SYS_NICE, RestrictRealtime=): acknowledgements wait while the host is busy"
        );
    }
}

async fn run(
    options: args::RunOptions,
    settings: romulus_config::BackupAgent,
    places: Places,
) -> anyhow::Result<()> {
    let state_dir = options.state_dir.clone();
    std::fs::create_dir_all(&state_dir).with_context(|| format!("could not make {}", state_dir.display()))?;
    let identity = Identity::load(&settings.pki_dir)?;
    let host = settings.host.clone().unwrap_or_else(|| identity.host().clone());
    anyhow::ensure!(
        host == *identity.host(),
        "this host is {host}, its certificates are those of {}",
        identity.host()
    );
    let endpoint = Arc::new(Endpoint::server(
        &identity,
        &settings.network,
        Service::Pair,
        settings.listen,
        Some(&Bulk::new(priority::bulk)),
    )?);
    let witness_endpoint = Arc::new(Endpoint::client(
        &identity,
        &settings.network,
        Service::Witness,
        None,
    )?);
    let certificates = Arc::new(Certificates::new(
        &identity,
        vec![Arc::clone(&endpoint), Arc::clone(&witness_endpoint)],
    ));
    let witness = WitnessClient::new(witness_endpoint, settings.witness.clone());
    let allow = AllowList::new(settings.allow.clone());
    let reload = reload(options, &settings, Arc::clone(&certificates), allow.clone());
    let (admin_socket, listen) = (settings.admin_socket.clone(), settings.listen);
    let admin_group = settings.admin_group.clone();
    let admission = Arc::new(Admission {
        image_bytes_max: settings.image_bytes_max.bytes(),
        staging_max: settings.staging_max.bytes(),
        shelf: Arc::clone(&places.shelf),
        image_dir: settings.image_dir.clone(),
        standbys: Standbys {
            vmms: settings.vmm.clone(),
        },
    });
    let watching = settings.metrics.clone();
    let realtime = settings.realtime;
    let (hello_timeout, witness_wait) = (settings.hello_timeout, settings.witness_wait);
    let starts = Starts::new(settings.starts_max.into(), settings.failover.suspicion_timeout);
    let registry = Registry::new(Shared {
        settings,
        host: host.clone(),
        witness,
        clock: Clock::start(),
        state_dir,
        starts,
        places,
    });
    registry.recover()?;
    take_priority(realtime);
    let metrics_listen = Arc::new(OnceLock::new());
    let pulse = Pulse::of_service();
    let watched = metrics::router(&registry, &endpoint, &pulse, watching.stall_limit);
    let state = admin::Admin {
        registry: registry.clone(),
        endpoint: Arc::clone(&endpoint),
        certificates,
        metrics_listen: Arc::clone(&metrics_listen),
    };
    let routes = admin::api(watched.clone()).into_router(state);
    let admin = romulus_telemetry::serve_admin(&admin_socket, admin_group.as_deref(), routes)?;
    let metrics = serve_metrics(watching.listen(AGENT_METRICS_PORT), 1, watched).await;
    if let Some(address) = metrics.as_ref().and_then(Server::local_addr) {
        metrics_listen.get_or_init(|| address.to_string());
    }
    let listener = Arc::new(Listener {
        endpoint: Arc::clone(&endpoint),
        registry: registry.clone(),
        admission,
        host: host.clone(),
        allow,
        hello_timeout,
        witness_wait,
    });
    let listening = tokio::spawn(listener.run());
    info!(event = "ready", host = host.as_str(), %listen);
    service::serve(&registry, &pulse, reload).await?;
    info!(
        event = "terminate",
        "standbys that run a guest go on without the agent"
    );
    // A session that began now would give up a commit that the agent's next start can use.
    listening.abort();
    registry.dismiss_standbys().await;
    endpoint.shutdown("the agent is shutting down").await;
    drop((admin, metrics));
    Ok(())
}

fn reload(
    options: args::RunOptions,
    settings: &romulus_config::BackupAgent,
    certificates: Arc<Certificates>,
    allow: AllowList,
) -> Reload<romulus_config::BackupAgent> {
    Reload::new(settings.clone(), certificates, move || options.settings()).live("allow", move |settings| {
        allow.replace(settings.allow.clone());
        Ok(())
    })
}

/// A seed for a state machine's random numbers.
fn seed() -> anyhow::Result<u128> {
    romulus_host_sys::random::random_u128().context("the kernel gave no random numbers")
}
