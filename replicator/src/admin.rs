//! The replicator's admin API on its Unix socket: status, events, and the operator's orders.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Json, Router};
use romulus_protocol::PrimaryOrder;
use romulus_telemetry::{Api, ApiQuery, refusal};
use romulus_transport::Certificates;
use romulus_types::VmId;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::events::Input;
use crate::status::Status;

/// Longest an order may take before its caller is told that it goes on.
const ORDER_TIMEOUT: Duration = Duration::from_secs(30);

/// What the handlers need.
#[derive(Clone)]
pub struct Admin {
    /// Figures.
    pub status: Arc<Status>,
    /// The driver's inbox.
    pub inbox: mpsc::Sender<Input>,
    /// This host's certificates.
    pub certificates: Arc<Certificates>,
}

/// Which VM is meant: an order for another one must not be carried out on this one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    vm: Option<VmId>,
}

/// No parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

type Reply = (StatusCode, Json<Value>);

impl Admin {
    /// # Errors
    /// The answer, when another VM is meant.
    fn check(&self, wanted: &Wanted) -> Result<(), Reply> {
        match &wanted.vm {
            Some(vm) if vm.as_str() != self.status.vm() => {
                let text = format!("this is the replicator of {}, not of {vm}", self.status.vm());
                Err(refusal(StatusCode::NOT_FOUND, &text))
            }
            _ => Ok(()),
        }
    }
}

/// The routes; each is in `docs/openapi.json`.
pub fn api(watched: Router) -> Api<Admin> {
    Api::new()
        .get("/v1/status", status)
        .get("/v1/events", events)
        .post("/v1/unprotect", unprotect)
        .post("/v1/failover", failover)
        .post("/v1/reload-certificates", reload_certificates)
        .watched(watched)
}

async fn status(
    State(admin): State<Admin>,
    ApiQuery(wanted): ApiQuery<Wanted>,
) -> Result<Json<Value>, Reply> {
    admin.check(&wanted)?;
    Ok(Json(admin.status.json()))
}

async fn events(
    State(admin): State<Admin>,
    ApiQuery(wanted): ApiQuery<Wanted>,
) -> Result<Json<Value>, Reply> {
    admin.check(&wanted)?;
    Ok(Json(admin.status.events()))
}

async fn unprotect(State(admin): State<Admin>, ApiQuery(wanted): ApiQuery<Wanted>) -> Result<Reply, Reply> {
    admin.check(&wanted)?;
    Ok(order(admin, PrimaryOrder::Unprotect).await)
}

async fn failover(State(admin): State<Admin>, ApiQuery(wanted): ApiQuery<Wanted>) -> Result<Reply, Reply> {
    admin.check(&wanted)?;
    Ok(order(admin, PrimaryOrder::HandOver).await)
}

async fn order(admin: Admin, order: PrimaryOrder) -> Reply {
    let (sender, done) = oneshot::channel();
    if admin.inbox.send(Input::Order(order, sender)).await.is_err() {
        return refusal(StatusCode::GONE, "the replicator is ending");
    }
    match tokio::time::timeout(ORDER_TIMEOUT, done).await {
        Ok(Ok(Ok(()))) => (
            StatusCode::OK,
            Json(json!({"done": true, "status": admin.status.json()})),
        ),
        Ok(Ok(Err(why))) => refusal(StatusCode::CONFLICT, &why),
        Ok(Err(_)) => refusal(StatusCode::GONE, "the replicator ended first"),
        Err(_) => (
            StatusCode::ACCEPTED,
            Json(json!({"done": false, "next": "the order goes on; see `romulus status`"})),
        ),
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
            romulus_telemetry::openapi::Document::shipped().routes("replicator")
        );
    }
}
