//! The witness's admin API and metrics.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Json, Router};
use romulus_protocol::Record;
use romulus_telemetry::{Api, ApiQuery, Check, Metrics, Pulse, catalogue, mode_json, refusal};
use romulus_transport::{Certificates, Endpoint};
use romulus_types::{VmId, WitnessInstance};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::desk::Desk;
use crate::server::Counts;

/// Version of the JSON.
const SCHEMA: u32 = 1;

/// What the handlers need.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) desk: Arc<Desk>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) certificates: Arc<Certificates>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    vm: VmId,
}

/// No parameters.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// The routes; each is in `docs/openapi.json`.
pub(crate) fn api(watched: Router) -> Api<Admin> {
    Api::new()
        .get("/v1/status", status)
        .get("/v1/records", records)
        .post("/v1/forget", forget)
        .post("/v1/reload-certificates", reload_certificates)
        .watched(watched)
}

/// What the witness shows to those who watch it.
pub(crate) struct Watched {
    pub(crate) admin: Admin,
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) vms_max: u64,
    /// The loop that accepts connections.
    pub(crate) pulse: Pulse,
    pub(crate) stall_limit: Duration,
}

/// The routes `/metrics`, `/healthz` and `/readyz`.
pub(crate) fn watched_router(watched: Watched) -> Router {
    let Watched {
        admin: Admin { desk, counts, .. },
        endpoint,
        vms_max,
        pulse,
        stall_limit,
    } = watched;
    let shown = Arc::clone(&desk);
    let version = env!("CARGO_PKG_VERSION");
    let metrics = Metrics::new(catalogue::WITNESS, "witness", version, move |samples| {
        samples.number(&catalogue::VMS, &[], shown.records().len() as u64);
        samples.number(&catalogue::VMS_LIMIT, &[], vms_max);
        for (answer, count) in counts.answers() {
            samples.number(&catalogue::WITNESS_REQUESTS, &[answer], count);
        }
        for (cause, count) in counts.bad() {
            samples.number(&catalogue::WITNESS_BAD_REQUESTS, &[cause], count);
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
    });
    let alive: Check = Arc::new(move || pulse.check("the loop that accepts hosts", stall_limit));
    let ready: Check = Arc::new(move || match desk.failed() {
        false => Ok(()),
        true => Err("the store failed, so nobody is answered".to_owned()),
    });
    romulus_telemetry::watched_router(&metrics, alive, ready)
}

async fn status(State(admin): State<Admin>, ApiQuery(Nothing {}): ApiQuery<Nothing>) -> Json<Value> {
    Json(json!({
        "schema": SCHEMA,
        "role": "witness",
        "instance": admin.desk.instance().to_string(),
        "vms": admin.desk.records().len(),
        "answered": admin.counts.answered(),
        "granted": admin.counts.of("granted"),
        "bad": admin.counts.bad().map(|(_, count)| count).sum::<u64>(),
        "not_allowed": admin.counts.of("not_allowed"),
    }))
}

async fn records(State(admin): State<Admin>, ApiQuery(Nothing {}): ApiQuery<Nothing>) -> Json<Value> {
    Json(view(admin.desk.instance(), &admin.desk.records()))
}

async fn forget(
    State(admin): State<Admin>,
    ApiQuery(Wanted { vm }): ApiQuery<Wanted>,
) -> (StatusCode, Json<Value>) {
    let desk = admin.desk.clone();
    let name = vm.clone();
    let done = tokio::task::spawn_blocking(move || desk.forget(&vm))
        .await
        .expect("the desk does not panic");
    match done {
        Ok(()) => {
            tracing::warn!(event = "forgotten", vm = %name, "an operator removed a record");
            (StatusCode::OK, Json(json!({"done": true})))
        }
        Err(error) => refusal(StatusCode::NOT_FOUND, &error.to_string()),
    }
}

/// See [`romulus_daemon::reload_certificates`].
async fn reload_certificates(
    State(admin): State<Admin>,
    ApiQuery(Nothing {}): ApiQuery<Nothing>,
) -> (StatusCode, Json<Value>) {
    romulus_daemon::reload_certificates(admin.certificates).await
}

/// Records as JSON, for the API and for `witness show --json`.
pub(crate) fn view(instance: WitnessInstance, records: &[(VmId, Record)]) -> Value {
    let one = |(vm, record): &(VmId, Record)| {
        json!({
            "vm": vm,
            "term": record.term.0,
            "mode": mode_json(&record.mode),
            "instance": record.instance.to_string(),
            "usable": record.instance == instance,
        })
    };
    let records: Vec<Value> = records.iter().map(one).collect();
    json!({"schema": SCHEMA, "instance": instance.to_string(), "records": records})
}

#[cfg(test)]
mod tests {
    use romulus_protocol::Mode;
    use romulus_types::{Epoch, HostId, Nonce, Session, Term};

    use super::*;

    #[test]
    fn records_with_the_largest_numbers_have_a_place_in_json() {
        let host = |name| HostId::new(name).unwrap();
        let mode = Mode::Paired {
            primary: host("a"),
            backup: host("b"),
            session: Session(u128::MAX),
            first_epoch: Epoch(u64::MAX),
        };
        let instance = WitnessInstance(u128::MAX);
        let record = Record {
            instance,
            term: Term(u64::MAX),
            mode,
            nonce: Nonce(u128::MAX),
        };
        let shown = view(instance, &[(VmId::new("web").unwrap(), record)]);
        assert_eq!(shown["records"][0]["mode"]["paired"]["session"], "f".repeat(32));
        assert_eq!(shown["records"][0]["term"], u64::MAX);
    }

    #[test]
    fn the_admin_api_is_what_its_document_says() {
        assert_eq!(
            api(Router::new()).routes(),
            romulus_telemetry::openapi::Document::shipped().routes("witness")
        );
    }
}
