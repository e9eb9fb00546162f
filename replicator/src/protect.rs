//! `replicator protect`: puts the parts together and runs the driver.
//!
//! ```text
//!   driver (this thread, tokio)   capture thread   encoder thread   a relay thread a tap   guardian (a process)
//! ```

use std::collections::VecDeque;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use anyhow::Context;
use romulus_config::{PeerAddress, REPLICATOR_METRICS_PORT, Replicator};
use romulus_daemon::{BadSettings, RecordFile, Reload};
use romulus_host_sys::process_clock::Clock;
use romulus_host_sys::{priority, random};
use romulus_hypervisor::kvm::{self, source::KvmSource};
use romulus_hypervisor::qemu::source::{AttachOptions, GuardianProgram, QemuSource};
use romulus_hypervisor::source::{Allowances, GuestSource};
use romulus_protocol::{Primary, PrimaryConfig, Remembered};
use romulus_telemetry::{Pulse, Server, serve_metrics};
use romulus_transport::{Bulk, Certificates, Endpoint, Identity, Service, WitnessClient};
use romulus_types::{HostId, PAGE_BYTES};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::admin::{Admin, api};
use crate::args::{ProtectOptions, describe};
use crate::buffers::buffer_pool;
use crate::capture::CaptureThread;
use crate::driver::Driver;
use crate::encode::Encoder;
use crate::events::{EventSink, INBOX_MAX, Input};
use crate::gate_watch;
use crate::gates::{GateLimits, Gates};
use crate::idle::IdleWait;
use crate::link::{Link, LinkConfig};
use crate::metrics::{self, Watched};
use crate::session_cell::SessionCell;
use crate::status::Status;
use crate::tuner::Tuner;
use crate::witness_task;

/// Jobs that wait for the capture thread, at most.
const JOBS_MAX: usize = 64;
/// Jobs that wait for the encoder, at most.
const ENCODE_JOBS_MAX: usize = 4;
/// Between two tries to reach the backup or the witness.
const RETRY: Duration = Duration::from_millis(100);
/// How long the admin socket goes on answering after the driver ended.
const LAST_ANSWERS: Duration = Duration::from_millis(100);

/// Protects until told to stop.
///
/// # Errors
/// Whatever keeps the guest from being protected, with the cause and what to do.
pub fn run(options: &ProtectOptions) -> anyhow::Result<()> {
    let settings = options.settings().context(BadSettings)?;
    romulus_telemetry::log::init(&settings.log)?;
    if !priority::raise() {
        warn!("no permission for a higher scheduling priority: epochs may start late on a busy host");
    }
    let identity = Identity::load(&settings.pki_dir)?;
    let host = settings.host.clone().unwrap_or_else(|| identity.host().clone());
    anyhow::ensure!(
        host == *identity.host(),
        "this host is {host}, its certificates in {} are those of {}",
        settings.pki_dir.display(),
        identity.host()
    );
    let source = attach(options, &settings)?;
    let runtime = romulus_daemon::runtime()?;
    let result = runtime.block_on(drive(options, &settings, &identity, host, source));
    // The capture thread detaches from the hypervisor; nothing else is worth waiting for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

fn attach(options: &ProtectOptions, settings: &Replicator) -> anyhow::Result<Box<dyn GuestSource>> {
    let source = match (&settings.vm.qmp, &settings.vm.attach) {
        (Some(qmp), _) => attach_qemu(qmp, options, settings)?,
        (None, Some(socket)) => attach_vmm(socket, settings)?,
        (None, None) => anyhow::bail!("the settings name no hypervisor"),
    };
    let hypervisor = describe(&settings.vm);
    info!(event = "attach", vm = options.vm.as_str(), detail = %hypervisor);
    Ok(source)
}

fn attach_qemu(
    qmp: &Path,
    options: &ProtectOptions,
    settings: &Replicator,
) -> anyhow::Result<Box<dyn GuestSource>> {
    let guardian = GuardianProgram {
        // Not by its name, which leads elsewhere after an upgrade of the package.
        exe: "/proc/self/exe".into(),
        args: vec!["guardian".into()],
    };
    let mut attach = AttachOptions::new(qmp, guardian);
    attach.taps.clone_from(&settings.vm.taps);
    attach.allow = allowances(settings);
    attach.fifo_dir.clone_from(&options.fifo_dir);
    attach.checkpoint_pages_max = checkpoint_pages_max(settings);
    attach.pause_limit_ns = nanoseconds(settings.epochs.pause_kill_limit);
    let source = QemuSource::attach(attach).context("this guest can't be protected")?;
    Ok(Box::new(source))
}

fn attach_vmm(socket: &Path, settings: &Replicator) -> anyhow::Result<Box<dyn GuestSource>> {
    let mut attach = kvm::source::AttachOptions::new(socket);
    attach.taps.clone_from(&settings.vm.taps);
    attach.allow = allowances(settings);
    attach.checkpoint_pages_max = checkpoint_pages_max(settings);
    attach.pause_limit_ns = nanoseconds(settings.epochs.pause_kill_limit);
    let source = KvmSource::attach(attach).context("this guest can't be protected")?;
    Ok(Box::new(source))
}

fn allowances(settings: &Replicator) -> Allowances {
    Allowances {
        disposable: settings.vm.disposable.iter().cloned().collect(),
    }
}

fn checkpoint_pages_max(settings: &Replicator) -> u64 {
    settings.memory.checkpoint_bytes_max.bytes() / PAGE_BYTES as u64
}

fn protocol(options: &ProtectOptions, settings: &Replicator, host: HostId, backup: HostId) -> PrimaryConfig {
    let suspicion_ns = nanoseconds(settings.failover.suspicion_timeout);
    PrimaryConfig {
        vm: options.vm.clone(),
        host,
        backup,
        register: settings.vm.register,
        epoch_ns: nanoseconds(settings.epochs.first_length()),
        heartbeat_interval_ns: nanoseconds(settings.failover.heartbeat_interval),
        // Earlier than the backup, so that a mere link failure leaves the VM where it is.
        suspicion_ns: suspicion_ns / 4 * 3,
        release_age_ns_max: suspicion_ns,
        retry_ns: nanoseconds(RETRY),
        epochs_in_flight_max: settings.epochs.in_flight_max.into(),
        hold_ns_max: nanoseconds(settings.epochs.hold_max),
        mute_ns_max: nanoseconds(settings.failover.mute_limit),
    }
}

async fn drive(
    options: &ProtectOptions,
    settings: &Replicator,
    identity: &Identity,
    host: HostId,
    source: Box<dyn GuestSource>,
) -> anyhow::Result<()> {
    let backup_address = settings.backup.clone().context("no backup")?;
    let backup = backup_host(options, &backup_address)?;
    let clock = Clock::start();
    let epoch_ns = nanoseconds(settings.epochs.first_length());
    let status = Arc::new(Status::new(
        options.vm.as_str(),
        host.as_str(),
        backup.as_str(),
        epoch_ns,
    ));
    status.add_event("attach", &describe(&settings.vm));
    let (inbox_sender, inbox) = mpsc::channel(INBOX_MAX);
    let events = EventSink(inbox_sender.clone());
    let limits = GateLimits {
        taps: settings.vm.taps.clone(),
        held_bytes_max: usize::try_from(settings.memory.held_bytes_max.bytes())?,
        held_frames_max: usize::try_from(settings.memory.held_frames_max)?,
    };
    let gates = Gates::new(limits.clone());
    gates.check_taps().context("this guest's output can't be gated")?;
    let current = SessionCell::default();
    let (jobs, job_receiver) = sync_channel(JOBS_MAX);
    let (encoder, encode_jobs) = sync_channel(ENCODE_JOBS_MAX);
    let (buffers, buffer_return) = buffer_pool(usize::from(settings.epochs.in_flight_max) + 2);
    let delta_bytes = settings.memory.delta_memory.bytes();
    let encode = Encoder::new(delta_bytes, buffer_return, events.clone(), Arc::clone(&status));
    std::thread::Builder::new()
        .name("encoder".into())
        .spawn(move || encode.run(&encode_jobs))?;
    let (driver_pulse, capture_pulse) = (Pulse::of_service(), Pulse::new());
    let capture = CaptureThread {
        source,
        jobs: job_receiver,
        events: events.clone(),
        encoder: encoder.clone(),
        buffers,
        gates: gates.clone(),
        idle: IdleWait::new(nanoseconds(idle_length(settings))),
        current: current.clone(),
        status: Arc::clone(&status),
        pulse: capture_pulse.clone(),
        clock,
    };
    let capture = std::thread::Builder::new()
        .name("capture".into())
        .spawn(move || capture.run())?;

    let witness_endpoint = Arc::new(Endpoint::client(
        identity,
        &settings.network,
        Service::Witness,
        None,
    )?);
    let endpoint = Arc::new(Endpoint::client(
        identity,
        &settings.network,
        Service::Pair,
        Some(&Bulk::new(priority::bulk)),
    )?);
    let certificates = Arc::new(Certificates::new(
        identity,
        vec![Arc::clone(&witness_endpoint), Arc::clone(&endpoint)],
    ));
    let witness = WitnessClient::new(witness_endpoint, settings.witness.clone());
    let (asks, requests) = mpsc::channel(witness_task::REQUESTS_MAX);
    tokio::spawn(witness_task::run(witness.clone(), requests, events.clone()));
    let link_config = LinkConfig {
        vm: options.vm.clone(),
        host: host.clone(),
        backup: backup_address,
        backup_host: backup.clone(),
        epoch_ns,
        jobs: jobs.clone(),
    };
    let again = options.clone();
    let reload = Reload::new(settings.clone(), Arc::clone(&certificates), move || {
        again.settings()
    });
    reload_at_hangup(reload)?;
    let link = Link::new(
        link_config,
        Arc::clone(&endpoint),
        encoder,
        events,
        Arc::clone(&status),
    );
    let state_file = options.state_dir.join(format!("{}.json", options.vm));
    let (record_file, remembered) = remembered(&options.state_dir, &state_file)?;
    let config = protocol(options, settings, host, backup);
    let primary = Primary::new(config, remembered, random::random_u128()?, clock.now());
    let admin_socket = settings.admin_socket(&options.vm);
    let watched = metrics::router(Watched {
        status: Arc::clone(&status),
        clock,
        limits,
        endpoint,
        witness,
        driver: driver_pulse.clone(),
        capture: capture_pulse,
        stall_limit: settings.metrics.stall_limit,
    });
    let routes = api(watched.clone()).into_router(Admin {
        status: Arc::clone(&status),
        inbox: inbox_sender.clone(),
        certificates,
    });
    let admin = romulus_telemetry::serve_admin(&admin_socket, settings.admin_group.as_deref(), routes)?;
    let metrics_address = settings.metrics.listen(REPLICATOR_METRICS_PORT);
    let metrics = serve_metrics(metrics_address, metrics::PORTS_TRIED, watched).await;
    if let Some(address) = metrics.as_ref().and_then(Server::local_addr) {
        status.set_metrics_listen(address.to_string());
    }
    forward_signals(inbox_sender.clone())?;
    let (watched, seen, lost) = (gates.clone(), Arc::clone(&status), inbox_sender.clone());
    std::thread::Builder::new()
        .name("gate-watch".into())
        .spawn(move || gate_watch::run(&watched, &seen, &lost))?;
    let driver = Driver {
        primary,
        inbox,
        inbox_sender,
        jobs,
        link,
        witness: asks,
        gates,
        current,
        status,
        clock,
        remembered: record_file,
        captured: VecDeque::new(),
        tuner: Tuner::new(&settings.epochs),
        waiting: Vec::new(),
        terminating: false,
        handed_over: false,
        pulse: driver_pulse,
        reopen_at: None,
    };
    let result = driver.run().await;
    // Whoever ordered the end still waits for the answer.
    tokio::time::sleep(LAST_ANSWERS).await;
    tokio::task::spawn_blocking(move || capture.join())
        .await?
        .map_err(|_| anyhow::anyhow!("the capture thread panicked"))?;
    drop((admin, metrics));
    result
}

/// Reads settings and certificates again at each SIGHUP, for as long as the runtime lives.
fn reload_at_hangup(mut reload: Reload<Replicator>) -> anyhow::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            reload = reload.run().await;
        }
    });
    Ok(())
}

/// The backup's name in the record: what its certificate is asked for, which must be a name then.
fn backup_host(options: &ProtectOptions, address: &PeerAddress) -> anyhow::Result<HostId> {
    if let Some(backup) = &options.backup_host {
        return Ok(backup.clone());
    }
    let name = address.certificate_name();
    anyhow::ensure!(
        name.parse::<IpAddr>().is_err(),
        "name the backup's host: --backup NAME@{name}:{} or --backup-host NAME",
        address.port()
    );
    Ok(HostId::new(name)?)
}

fn remembered(dir: &Path, file: &Path) -> anyhow::Result<(RecordFile<Remembered>, Option<Remembered>)> {
    std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
    RecordFile::open(file).context("what is remembered of the VM can't be used; without it, say --register")
}

fn forward_signals(inbox: mpsc::Sender<Input>) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if inbox.send(Input::Terminate).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Of an idle guest's epoch. Output counts as held since the last release, also when there is none: that must come in time.
fn idle_length(settings: &Replicator) -> Duration {
    let held_at_most = settings.epochs.hold_max.min(settings.failover.mute_limit);
    settings.epochs.idle_length.min(held_at_most / 2)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
