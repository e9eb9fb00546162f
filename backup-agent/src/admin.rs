//! The agent's admin API on its Unix socket.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use romulus_protocol::BackupOrder;
use romulus_transport::Endpoint;
use romulus_types::VmId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::registry::{ForgetError, Registry};
use crate::status::{OrderEnd, STATUS_SCHEMA};

/// Longest a failover may take before its caller is told that it goes on.
const ORDER_TIMEOUT: Duration = Duration::from_secs(30);

/// What may be asked with a request.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    vm: Option<VmId>,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    fenced: bool,
}

/// What the handlers need.
#[derive(Clone)]
pub struct Admin {
    /// The VMs.
    pub registry: Registry,
    /// Where primaries connect.
    pub endpoint: Arc<Endpoint>,
    /// Where metrics are served by TCP, once they are.
    pub metrics_listen: Arc<OnceLock<String>>,
}

/// The routes.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .route("/v1/failover", post(failover))
        .route("/v1/forget", post(forget))
        .with_state(admin)
}

async fn status(State(admin): State<Admin>, Query(wanted): Query<Parameters>) -> Json<Value> {
    let handshakes = admin.endpoint.accept_counts();
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
        "metrics": admin.metrics_listen.get(),
        "vms": chosen(&admin.registry, &wanted, |status| status.json()),
    }))
}

async fn events(State(admin): State<Admin>, Query(wanted): Query<Parameters>) -> Json<Value> {
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
    wanted: &Parameters,
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
    Query(wanted): Query<Parameters>,
) -> (StatusCode, Json<Value>) {
    let statuses = registry.statuses();
    let vm = match (wanted.vm, statuses.as_slice()) {
        (Some(vm), _) => vm,
        (None, [only]) => VmId::new(only.vm()).expect("it was a name before"),
        (None, _) => {
            let text = "name the VM with --vm: this agent has none or several";
            return (StatusCode::BAD_REQUEST, Json(json!({"error": text})));
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
        return (
            StatusCode::NOT_FOUND,
            Json(json!({"error": format!("no VM {vm} is backed up here")})),
        );
    };
    let mut ends = status.order_ends();
    if !registry.order(&vm, order).await {
        let text = format!("the agent has given {vm} up: restart it");
        return (StatusCode::GONE, Json(json!({"error": text})));
    }
    let ended = tokio::time::timeout(ORDER_TIMEOUT, ends.changed()).await;
    let end = ended.ok().and_then(|_| ends.borrow_and_update().clone());
    match end {
        Some(OrderEnd::Activated) => (
            StatusCode::OK,
            Json(json!({"done": true, "status": status.json()})),
        ),
        Some(OrderEnd::Refused(why)) => (StatusCode::CONFLICT, Json(json!({"error": why}))),
        None => (
            StatusCode::ACCEPTED,
            Json(json!({"done": false, "next": "the order goes on; see `romulus status`"})),
        ),
    }
}

/// Gives a VM up: `vm`, and `force` for one that may be needed here.
async fn forget(
    State(Admin { registry, .. }): State<Admin>,
    Query(wanted): Query<Parameters>,
) -> (StatusCode, Json<Value>) {
    let Some(vm) = wanted.vm else {
        return (
            StatusCode::BAD_REQUEST,
            Json(json!({"error": "name the VM: vm=NAME"})),
        );
    };
    match registry.forget(&vm, wanted.force).await {
        Ok(()) => (StatusCode::OK, Json(json!({"done": true}))),
        Err(error) => {
            let code = match error {
                ForgetError::Unknown(_) => StatusCode::NOT_FOUND,
                ForgetError::Refused(_) => StatusCode::CONFLICT,
            };
            (code, Json(json!({"error": error.to_string()})))
        }
    }
}
