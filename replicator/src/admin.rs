//! The replicator's admin API on its Unix socket: status, events, and the operator's orders.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use romulus_protocol::PrimaryOrder;
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
}

/// The routes.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .route("/v1/unprotect", post(unprotect))
        .route("/v1/failover", post(failover))
        .with_state(admin)
}

async fn status(State(admin): State<Admin>) -> Json<Value> {
    Json(admin.status.json())
}

async fn events(State(admin): State<Admin>) -> Json<Value> {
    Json(admin.status.events())
}

async fn unprotect(State(admin): State<Admin>) -> (StatusCode, Json<Value>) {
    order(admin, PrimaryOrder::Unprotect).await
}

async fn failover(State(admin): State<Admin>) -> (StatusCode, Json<Value>) {
    order(admin, PrimaryOrder::HandOver).await
}

async fn order(admin: Admin, order: PrimaryOrder) -> (StatusCode, Json<Value>) {
    let (sender, done) = oneshot::channel();
    if admin.inbox.send(Input::Order(order, sender)).await.is_err() {
        return (
            StatusCode::GONE,
            Json(json!({"error": "the replicator is ending"})),
        );
    }
    match tokio::time::timeout(ORDER_TIMEOUT, done).await {
        Ok(Ok(Ok(()))) => (
            StatusCode::OK,
            Json(json!({"done": true, "status": admin.status.json()})),
        ),
        Ok(Ok(Err(why))) => (StatusCode::CONFLICT, Json(json!({"error": why}))),
        Ok(Err(_)) => (
            StatusCode::GONE,
            Json(json!({"error": "the replicator ended first"})),
        ),
        Err(_) => (
            StatusCode::ACCEPTED,
            Json(json!({"done": false, "next": "the order goes on; see `romulus status`"})),
        ),
    }
}
