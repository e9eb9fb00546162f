//! The answer to `POST /v1/reload-certificates`.

use std::sync::Arc;

use axum::Json;
use axum::http::StatusCode;
use romulus_telemetry::refusal;
use romulus_transport::Certificates;
use serde_json::{Value, json};
use tracing::{error, info};

/// Reads the certificates again; sessions go on.
pub async fn reload_certificates(certificates: Arc<Certificates>) -> (StatusCode, Json<Value>) {
    let reloaded = tokio::task::spawn_blocking(move || certificates.reload()).await;
    match reloaded.expect("reading certificates does not panic") {
        Ok(host) => {
            info!(event = "certificates_reloaded");
            (StatusCode::OK, Json(json!({"done": true, "host": host})))
        }
        Err(error) => {
            error!(event = "reload_failed", %error, "the certificates were not read again, the earlier ones stay");
            refusal(StatusCode::CONFLICT, &error.to_string())
        }
    }
}
