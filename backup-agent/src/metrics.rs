//! What the agent shows to those who watch it: metrics, and whether it works and could take over.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use romulus_telemetry::{Check, Metrics, Pulse, catalogue, watched_router};
use romulus_transport::Endpoint;

use crate::registry::Registry;

/// The routes `/metrics`, `/healthz` and `/readyz`; `service` beats in the loop that serves the service manager.
pub fn router(
    registry: &Registry,
    endpoint: &Arc<Endpoint>,
    service: &Pulse,
    stall_limit: Duration,
) -> Router {
    let (shown, endpoint) = (registry.clone(), Arc::clone(endpoint));
    let version = env!("CARGO_PKG_VERSION");
    let metrics = Metrics::new(catalogue::BACKUP_AGENT, "backup-agent", version, move |samples| {
        let (settings, statuses) = (shown.settings(), shown.statuses());
        samples.number(&catalogue::VMS, &[], statuses.len() as u64);
        samples.number(&catalogue::VMS_LIMIT, &[], settings.vms_max.into());
        let image_bytes_max = settings.image_bytes_max.bytes();
        samples.number(&catalogue::IMAGE_LIMIT_BYTES, &[], image_bytes_max);
        let staging = shown.staging();
        samples.number(&catalogue::STAGING_BYTES, &[], staging.used_bytes());
        samples.number(&catalogue::STAGING_LIMIT_BYTES, &[], staging.bytes_max());
        samples.number(&catalogue::SPILLED_BYTES, &[], staging.spilled_ever_bytes());
        samples.flag(&catalogue::WITNESS_CONNECTED, &[], shown.witness_connected());
        for (cause, count) in shown.refused_count().each() {
            samples.number(&catalogue::REFUSED_CONNECTIONS, &[cause.name()], count);
        }
        samples.number(
            &catalogue::CERTIFICATE_EXPIRY_TIME_SECONDS,
            &[],
            endpoint.certificate_expiry_s(),
        );
        let connections = endpoint.accept_counts();
        samples.number(&catalogue::CONNECTIONS, &[], connections.open);
        for (result, count) in connections.by_result() {
            samples.number(&catalogue::HANDSHAKES, &[result], count);
        }
        for status in statuses {
            status.sample(samples);
        }
    });
    let (works, able, service) = (registry.clone(), registry.clone(), service.clone());
    let alive: Check = Arc::new(move || {
        service.check("the agent's own loop", stall_limit)?;
        every(&works, |status| {
            status
                .pulse
                .check(&format!("the driver of {}", status.vm()), stall_limit)
        })
    });
    let ready: Check = Arc::new(move || every(&able, crate::status::VmStatus::ready));
    watched_router(&metrics, alive, ready)
}

/// Whether it is so for each VM.
///
/// # Errors
/// What is wrong, of each VM for which it is not.
fn every(
    registry: &Registry,
    check: impl Fn(&crate::status::VmStatus) -> Result<(), String>,
) -> Result<(), String> {
    let wrong: Vec<String> = registry
        .statuses()
        .iter()
        .filter_map(|status| check(status).err())
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    Err(wrong.join("\n"))
}
