//! What the replicator shows to those who watch it: metrics, and whether it works and protects.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use romulus_host_sys::process_clock::Clock;
use romulus_telemetry::{Check, Metrics, Pulse, catalogue, watched_router};
use romulus_transport::{Endpoint, WitnessClient};

use crate::gates::GateLimits;
use crate::status::Status;

/// Ports that are tried from the first on, as each VM of a host has a replicator.
pub const PORTS_TRIED: u16 = 32;

/// What is looked at when somebody asks.
pub struct Watched {
    /// Figures.
    pub status: Arc<Status>,
    /// The process's clock.
    pub clock: Clock,
    /// What the gates may hold.
    pub limits: GateLimits,
    /// What connects to the backup.
    pub endpoint: Arc<Endpoint>,
    /// The connection to the witness.
    pub witness: WitnessClient,
    /// The driver's loop.
    pub driver: Pulse,
    /// The capture thread's loop.
    pub capture: Pulse,
    /// When a loop counts as stalled.
    pub stall_limit: Duration,
}

/// The routes `/metrics`, `/healthz` and `/readyz`.
pub fn router(watched: Watched) -> Router {
    let Watched {
        status,
        clock,
        limits,
        endpoint,
        witness,
        driver,
        capture,
        stall_limit,
    } = watched;
    let protects = Arc::clone(&status);
    let version = env!("CARGO_PKG_VERSION");
    let metrics = Metrics::new(catalogue::REPLICATOR, "replicator", version, move |samples| {
        status.sample(samples, clock.now(), &limits);
        samples.flag(&catalogue::WITNESS_CONNECTED, &[], witness.is_connected());
        samples.number(
            &catalogue::CERTIFICATE_EXPIRY_TIME_SECONDS,
            &[],
            endpoint.certificate_expiry_s(),
        );
    });
    let alive: Check = Arc::new(move || {
        driver.check("the driver's loop", stall_limit)?;
        capture.check("the capture thread", stall_limit)
    });
    let ready: Check = Arc::new(move || protects.ready());
    watched_router(&metrics, alive, ready)
}
