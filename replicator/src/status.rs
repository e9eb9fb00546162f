//! What the replicator tells its operator: one snapshot, filled by the driver and the capture thread.

use std::sync::{Mutex, MutexGuard};

use hdrhistogram::Histogram;
use romulus_hypervisor::source::CaptureReport;
use romulus_protocol::{NotProtected, Protection};
use romulus_telemetry::EventLog;
use romulus_types::{Epoch, Session, Term, Time};
use serde_json::{Value, json};

use crate::pause_parts::PauseParts;

/// Version of the JSON that `romulus status --json` prints.
pub const STATUS_SCHEMA: u32 = 1;
/// How late an epoch may start and still count as on time, in nanoseconds.
const ON_TIME_SLACK_NS: u64 = 2_000_000;

struct Inner {
    protection: Protection,
    detail: Option<String>,
    term: Term,
    session: Option<Session>,
    captured: Epoch,
    committed: Epoch,
    epochs: u64,
    on_time: u64,
    intervals: u64,
    command: Histogram<u64>,
    pause: Histogram<u64>,
    parts: PauseParts,
    scan_copy: Histogram<u64>,
    device: Histogram<u64>,
    dirty: Histogram<u64>,
    commit_lag: Histogram<u64>,
    pause_total_ns: u64,
    first_capture: Option<Time>,
    last_capture: Option<Time>,
    first_copy: Option<(u64, u64)>,
    wire_bytes: u64,
    page_bytes: u64,
    pages_by_kind: [u64; 8],
    refused_input: u64,
    gates: Vec<Value>,
    events: EventLog,
}

/// The shared snapshot.
pub struct Status {
    vm: String,
    host: String,
    backup: String,
    epoch_ns: u64,
    inner: Mutex<Inner>,
}

/// Of nanoseconds.
pub(crate) fn histogram() -> Histogram<u64> {
    // What is longer than an hour counts as an hour.
    Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("the bounds are fixed and allowed")
}

/// Of a histogram of nanoseconds.
pub(crate) fn percentiles_ms(histogram: &Histogram<u64>) -> Value {
    let at = |quantile: f64| nanoseconds_to_ms(histogram.value_at_quantile(quantile));
    json!({"p50": at(0.5), "p99": at(0.99), "max": nanoseconds_to_ms(histogram.max()), "count": histogram.len()})
}

#[expect(clippy::cast_precision_loss, reason = "a status figure, not an account")]
fn nanoseconds_to_ms(ns: u64) -> f64 {
    (ns as f64 / 1000.0).round() / 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "a status figure, not an account")]
fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

impl Status {
    /// Nothing has happened yet.
    pub fn new(vm: &str, host: &str, backup: &str, epoch_ns: u64) -> Self {
        let inner = Inner {
            protection: Protection::NotProtected(NotProtected::Starting),
            detail: None,
            term: Term(0),
            session: None,
            captured: Epoch::NONE,
            committed: Epoch::NONE,
            epochs: 0,
            on_time: 0,
            intervals: 0,
            command: histogram(),
            pause: histogram(),
            parts: PauseParts::new(),
            scan_copy: histogram(),
            device: histogram(),
            dirty: histogram(),
            commit_lag: histogram(),
            pause_total_ns: 0,
            first_capture: None,
            last_capture: None,
            first_copy: None,
            wire_bytes: 0,
            page_bytes: 0,
            pages_by_kind: [0; 8],
            refused_input: 0,
            gates: Vec::new(),
            events: EventLog::default(),
        };
        Self {
            vm: vm.into(),
            host: host.into(),
            backup: backup.into(),
            epoch_ns,
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The VM.
    pub fn vm(&self) -> &str {
        &self.vm
    }

    /// The operator's word for the state, with what else there is to say.
    pub fn set_protection(&self, protection: Protection) {
        let mut inner = self.lock();
        inner.protection = protection;
        if protection == Protection::Protected {
            inner.detail = None;
        }
    }

    /// Why the last try failed, in words; kept until the VM is protected.
    pub fn set_detail(&self, detail: String) {
        self.lock().detail = Some(detail);
    }

    /// Where the protocol stands.
    pub fn set_progress(&self, term: Term, session: Option<Session>, captured: Epoch, committed: Epoch) {
        let mut inner = self.lock();
        (inner.term, inner.session, inner.captured, inner.committed) = (term, session, captured, committed);
    }

    /// Pages of the first copy sent, of how many.
    pub fn set_first_copy(&self, done_pages: u64, all_pages: u64) {
        self.lock().first_copy = Some((done_pages, all_pages));
    }

    /// What the gates hold.
    pub fn set_gates(&self, gates: Vec<Value>) {
        self.lock().gates = gates;
    }

    /// A peer sent something that was refused.
    pub fn count_refused_input(&self) {
        self.lock().refused_input += 1;
    }

    /// A capture ended at `now`; it began `interval_ns` after the one before, 0 for the first.
    pub fn add_capture(&self, now: Time, interval_ns: u64, report: &CaptureReport) {
        let mut inner = self.lock();
        inner.epochs += 1;
        if interval_ns > 0 {
            inner.intervals += 1;
            inner.on_time += u64::from(interval_ns <= self.epoch_ns + ON_TIME_SLACK_NS);
        }
        inner.command.saturating_record(report.command_ns);
        inner.pause.saturating_record(report.pause_ns);
        inner.parts.add(report);
        inner.scan_copy.saturating_record(report.scan_ns + report.copy_ns);
        inner.device.saturating_record(report.device_state_ns);
        inner.dirty.saturating_record(report.dirty_pages);
        inner.pause_total_ns += report.pause_ns;
        inner.first_capture.get_or_insert(now);
        inner.last_capture = Some(now);
    }

    /// A checkpoint was encoded: bytes of pages in, bytes on the wire out, pages of each encoding.
    pub fn add_encoded(&self, page_bytes: u64, wire_bytes: u64, kinds: [u64; 8]) {
        let mut inner = self.lock();
        inner.page_bytes += page_bytes;
        inner.wire_bytes += wire_bytes;
        for (sum, count) in inner.pages_by_kind.iter_mut().zip(kinds) {
            *sum += count;
        }
    }

    /// From the end of a capture to its commit, in nanoseconds.
    pub fn add_commit_lag(&self, lag_ns: u64) {
        self.lock().commit_lag.saturating_record(lag_ns);
    }

    /// Forgets the measurements, so that the next ones speak of what follows.
    pub fn reset_measurements(&self) {
        let mut inner = self.lock();
        inner.command.reset();
        inner.pause.reset();
        inner.parts.reset();
        inner.scan_copy.reset();
        inner.device.reset();
        inner.dirty.reset();
        inner.commit_lag.reset();
        (inner.on_time, inner.intervals, inner.pause_total_ns) = (0, 0, 0);
        (inner.first_capture, inner.last_capture) = (None, None);
    }

    /// Keeps an event for `romulus events`.
    pub fn add_event(&self, name: &str, detail: &Value) {
        self.lock().events.add(name, detail);
    }

    /// The events kept, oldest first.
    pub fn events(&self) -> Value {
        json!({"schema": STATUS_SCHEMA, "vm": self.vm, "events": self.lock().events.events()})
    }

    /// The snapshot as JSON, schema [`STATUS_SCHEMA`].
    pub fn json(&self) -> Value {
        let inner = self.lock();
        let (state, reason) = inner.protection.words();
        let elapsed_ns = match (inner.first_capture, inner.last_capture) {
            (Some(first), Some(last)) => last.since_ns(first),
            _ => 0,
        };
        json!({
            "schema": STATUS_SCHEMA,
            "role": "primary",
            "vm": self.vm,
            "host": self.host,
            "backup": self.backup,
            "state": state,
            "reason": reason,
            "detail": inner.detail,
            "term": inner.term.0,
            "session": inner.session.map(|s| s.to_string()),
            "epoch": inner.captured.0,
            "committed": inner.committed.0,
            "lag_epochs": inner.captured.0.saturating_sub(inner.committed.0),
            "epoch_ms": nanoseconds_to_ms(self.epoch_ns),
            "epochs": inner.epochs,
            "epoch_on_time_ratio": ratio(inner.on_time, inner.intervals),
            "command_ms": percentiles_ms(&inner.command),
            "pause_ms": percentiles_ms(&inner.pause),
            "pause_parts_ms": inner.parts.json(),
            "scan_copy_ms": percentiles_ms(&inner.scan_copy),
            "device_state_ms": percentiles_ms(&inner.device),
            "commit_lag_ms": percentiles_ms(&inner.commit_lag),
            "dirty_pages": {"p50": inner.dirty.value_at_quantile(0.5), "p99": inner.dirty.value_at_quantile(0.99)},
            "clock_slip_ratio": ratio(inner.pause_total_ns, elapsed_ns),
            "first_copy": inner.first_copy.map(|(done, all)| json!({"pages": done, "of_pages": all})),
            "page_bytes": inner.page_bytes,
            "wire_bytes": inner.wire_bytes,
            "pages_by_kind": inner.pages_by_kind,
            "refused_input": inner.refused_input,
            "gates": inner.gates,
        })
    }
}
