//! The witness's admin API and metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use romulus_protocol::Record;
use romulus_telemetry::{Api, ApiQuery, Metrics, mode_json, refusal};
use romulus_transport::Certificates;
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
pub(crate) fn api(metrics: &Metrics) -> Api<Admin> {
    Api::new()
        .get("/v1/status", status)
        .get("/v1/records", records)
        .post("/v1/forget", forget)
        .post("/v1/reload-certificates", reload_certificates)
        .merge(&[("GET", "/metrics")], metrics.router().with_state(()))
}

/// Counters and gauges, read from the counts.
pub(crate) fn metrics(admin: &Admin) -> Metrics {
    let metrics = Metrics::new();
    let vms = metrics.gauge("witness_vms", "VMs that have a record");
    let answered = metrics.counter("witness_requests", "Requests answered");
    let granted = metrics.counter(
        "witness_grants",
        "Changes of a record granted, repetitions included",
    );
    let bad = metrics.counter(
        "witness_bad_requests",
        "Requests that were malformed or for another host",
    );
    let not_allowed = metrics.counter(
        "witness_not_allowed",
        "Requests for a VM that the settings do not allow the host",
    );
    let admin = admin.clone();
    metrics.on_read(move || {
        vms.set(i64::try_from(admin.desk.records().len()).unwrap_or(i64::MAX));
        for (counter, count) in [
            (&answered, &admin.counts.answered),
            (&granted, &admin.counts.granted),
            (&bad, &admin.counts.bad),
            (&not_allowed, &admin.counts.not_allowed),
        ] {
            counter.inner().store(load(count), Ordering::Relaxed);
        }
    });
    metrics
}

fn load(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

async fn status(State(admin): State<Admin>, ApiQuery(Nothing {}): ApiQuery<Nothing>) -> Json<Value> {
    Json(json!({
        "schema": SCHEMA,
        "role": "witness",
        "instance": admin.desk.instance().to_string(),
        "vms": admin.desk.records().len(),
        "answered": load(&admin.counts.answered),
        "granted": load(&admin.counts.granted),
        "bad": load(&admin.counts.bad),
        "not_allowed": load(&admin.counts.not_allowed),
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
            api(&Metrics::new()).routes(),
            romulus_telemetry::openapi::Document::shipped().routes("witness")
        );
    }
}
