//! The agent's admin API on its Unix socket.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Json, Router};
use romulus_protocol::BackupOrder;
use romulus_telemetry::{Api, ApiQuery, refusal};
use romulus_transport::{Certificates, Endpoint};
use romulus_types::VmId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::refusals::Refused;
use crate::registry::{ForgetError, Registry};
use crate::status::{OrderEnd, STATUS_SCHEMA, recent_us};

/// Longest a failover may take before its caller is told that it goes on.
const ORDER_TIMEOUT: Duration = Duration::from_secs(30);

/// Which VM is meant; without one all of them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    vm: Option<VmId>,
}

/// No parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// How to fail over.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FailoverParameters {
    vm: Option<VmId>,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    fenced: bool,
}

/// Which VM to give up.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForgetParameters {
    vm: VmId,
    #[serde(default)]
    force: bool,
}

/// What the handlers need.
#[derive(Clone)]
pub struct Admin {
    /// The VMs.
    pub registry: Registry,
    /// Where primaries connect.
    pub endpoint: Arc<Endpoint>,
    /// This host's certificates.
    pub certificates: Arc<Certificates>,
    /// Where metrics are served by TCP, once they are.
    pub metrics_listen: Arc<OnceLock<String>>,
}

/// The routes; each is in `docs/openapi.json`.
pub fn api(watched: Router) -> Api<Admin> {
    Api::new()
        .get("/v1/status", status)
        .get("/v1/events", events)
        .post("/v1/failover", failover)
        .post("/v1/forget", forget)
        .post("/v1/reload-certificates", reload_certificates)
        .watched(watched)
}

async fn status(State(admin): State<Admin>, ApiQuery(wanted): ApiQuery<Wanted>) -> Json<Value> {
    let handshakes = admin.endpoint.accept_counts();
    let staging = admin.registry.staging();
    Json(json!({
        "schema": STATUS_SCHEMA,
        "role": "backup",
        "handshakes": {
            "accepted": handshakes.accepted,
            "failed": handshakes.failed,
            "refused": handshakes.refused,
            "refused_of_host": handshakes.refused_of_host,
            "retried": handshakes.retried,
        },
        "witness": if admin.registry.witness_connected() { "connected" } else { "unreachable" },
        "refused_connections": admin.registry.refused_count().total(),
        "refused_not_allowed": admin.registry.refused_count().of(Refused::NotAllowed),
        "metrics": admin.metrics_listen.get(),
        "staging": {
            "bytes": staging.used_bytes(),
            "limit_bytes": staging.bytes_max(),
            "spilled_bytes": staging.spilled_bytes(),
            "spilled_ever_bytes": staging.spilled_ever_bytes(),
        },
        "receive_to_ack_recent_us": recent_us(
            admin.registry.statuses().iter().flat_map(|status| status.recent_acks_ns()).collect(),
        ),
        "vms": chosen(&admin.registry, &wanted, |status| status.json()),
    }))
}

async fn events(State(admin): State<Admin>, ApiQuery(wanted): ApiQuery<Wanted>) -> Json<Value> {
    let mut all = Vec::new();
    for answer in chosen(&admin.registry, &wanted, |status| status.events()) {
        for event in answer["events"].as_array().into_iter().flatten() {
            let mut event = event.clone();
            event["vm"] = answer["vm"].clone();
            all.push(event);
        }
    }
    all.sort_by_key(|event| event["unix_ms"].as_u64());
    Json(json!({"schema": STATUS_SCHEMA, "events": all}))
}

fn chosen(
    registry: &Registry,
    wanted: &Wanted,
    view: impl Fn(&crate::status::VmStatus) -> Value,
) -> Vec<Value> {
    let statuses = registry.statuses();
    let keep = |name: &str| wanted.vm.as_ref().is_none_or(|vm| vm.as_str() == name);
    statuses
        .iter()
        .filter(|status| keep(status.vm()))
        .map(|status| view(status))
        .collect()
}

async fn failover(
    State(Admin { registry, .. }): State<Admin>,
    ApiQuery(wanted): ApiQuery<FailoverParameters>,
) -> (StatusCode, Json<Value>) {
    let statuses = registry.statuses();
    let vm = match (wanted.vm, statuses.as_slice()) {
        (Some(vm), _) => vm,
        (None, [only]) => VmId::new(only.vm()).expect("it was a name before"),
        (None, _) => {
            let text = "name the VM with --vm: this agent has none or several";
            return refusal(StatusCode::BAD_REQUEST, text);
        }
    };
    let order = if wanted.force {
        BackupOrder::ForceFailover {
            fenced: wanted.fenced,
        }
    } else {
        BackupOrder::Failover
    };
    let Some(status) = statuses.iter().find(|status| status.vm() == vm.as_str()) else {
        return refusal(StatusCode::NOT_FOUND, &format!("no VM {vm} is backed up here"));
    };
    let mut ends = status.order_ends();
    if !registry.order(&vm, order).await {
        let text = format!("the agent has given {vm} up and begins with it again: try again soon");
        return refusal(StatusCode::GONE, &text);
    }
    let ended = tokio::time::timeout(ORDER_TIMEOUT, ends.changed()).await;
    let end = ended.ok().and_then(|_| ends.borrow_and_update().clone());
    match end {
        Some(OrderEnd::Activated) => (
            StatusCode::OK,
            Json(json!({"done": true, "status": status.json()})),
        ),
        Some(OrderEnd::Refused(why)) => refusal(StatusCode::CONFLICT, &why),
        None => (
            StatusCode::ACCEPTED,
            Json(json!({"done": false, "next": "the order goes on; see `romulus status`"})),
        ),
    }
}

/// Gives a VM up: `vm`, and `force` for one that may be needed here.
async fn forget(
    State(Admin { registry, .. }): State<Admin>,
    ApiQuery(wanted): ApiQuery<ForgetParameters>,
) -> (StatusCode, Json<Value>) {
    match registry.forget(&wanted.vm, wanted.force).await {
        Ok(()) => (StatusCode::OK, Json(json!({"done": true}))),
        Err(error) => {
            let code = match error {
                ForgetError::Unknown(_) => StatusCode::NOT_FOUND,
                ForgetError::Refused(_) => StatusCode::CONFLICT,
            };
            refusal(code, &error.to_string())
        }
    }
}

/// See [`romulus_daemon::reload_certificates`].
async fn reload_certificates(
    State(admin): State<Admin>,
    ApiQuery(Nothing {}): ApiQuery<Nothing>,
) -> (StatusCode, Json<Value>) {
    romulus_daemon::reload_certificates(admin.certificates).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_admin_api_is_what_its_document_says() {
        assert_eq!(
            api(Router::new()).routes(),
            romulus_telemetry::openapi::Document::shipped().routes("backup-agent")
        );
    }
}
