//! What the replicator tells its operator: one snapshot, filled by the driver and the capture thread.

use std::sync::{Mutex, MutexGuard};

use romulus_epoch::Reach;
use romulus_hypervisor::source::CaptureReport;
use romulus_page_codec::Kind;
use romulus_protocol::{NotProtected, Notice, Protection};
use romulus_telemetry::{EventLog, Histogram, Samples, catalogue, notice_event};
use romulus_types::{Epoch, Session, Term, Time};
use serde_json::{Value, json};

use crate::capture::Moment;
use crate::gates::{GateFigures, GateLimits};
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
    /// When the newest commit of the session was captured.
    committed_state: Option<Time>,
    epochs: u64,
    late_epochs: u64,
    idle_epochs: u64,
    failed_captures: u64,
    on_time: u64,
    intervals: u64,
    command: Histogram,
    pause: Histogram,
    parts: PauseParts,
    scan_copy: Histogram,
    device: Histogram,
    dirty: Histogram,
    /// Length of the epochs that are to come, and of the one before.
    epoch_ns: u64,
    epoch_before_ns: u64,
    /// With `epochs.length = "auto"`, once that is known.
    goal_reached: Option<bool>,
    commit_lag: Histogram,
    pause_total_ns: u64,
    first_capture: Option<Time>,
    last_capture: Option<Time>,
    first_copy: Option<(u64, u64)>,
    first_copy_wire_bytes: u64,
    wire_bytes: u64,
    page_bytes: u64,
    pages_by_kind: [u64; 8],
    encoder_bytes: u64,
    refused_input: [u64; RefusedInput::ALL.len()],
    sessions: u64,
    suspicions: u64,
    grants: u64,
    witness_refusals: u64,
    gates: GateFigures,
    metrics_listen: Option<String>,
    events: EventLog,
}

/// What a backup sent that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedInput {
    /// Bytes that are no frame, or a frame whose contents are not what it says.
    Malformed,
    /// A frame that has no place where it came.
    Unexpected,
    /// A message that the protocol does not expect from this backup.
    Protocol,
}

impl RefusedInput {
    const ALL: [Self; 3] = [Self::Malformed, Self::Unexpected, Self::Protocol];

    fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Unexpected => "unexpected",
            Self::Protocol => "protocol",
        }
    }
}

/// The shared snapshot.
pub struct Status {
    vm: String,
    host: String,
    backup: String,
    inner: Mutex<Inner>,
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
            committed_state: None,
            epoch_ns,
            epoch_before_ns: epoch_ns,
            goal_reached: None,
            epochs: 0,
            late_epochs: 0,
            idle_epochs: 0,
            failed_captures: 0,
            on_time: 0,
            intervals: 0,
            command: Histogram::new(),
            pause: Histogram::new(),
            parts: PauseParts::new(),
            scan_copy: Histogram::new(),
            device: Histogram::new(),
            dirty: Histogram::of_numbers(),
            commit_lag: Histogram::new(),
            pause_total_ns: 0,
            first_capture: None,
            last_capture: None,
            first_copy: None,
            first_copy_wire_bytes: 0,
            wire_bytes: 0,
            page_bytes: 0,
            pages_by_kind: [0; 8],
            encoder_bytes: 0,
            refused_input: [0; RefusedInput::ALL.len()],
            sessions: 0,
            suspicions: 0,
            grants: 0,
            witness_refusals: 0,
            gates: GateFigures::default(),
            metrics_listen: None,
            events: EventLog::default(),
        };
        Self {
            vm: vm.into(),
            host: host.into(),
            backup: backup.into(),
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
        if session != inner.session {
            inner.committed_state = None;
        }
        (inner.term, inner.session, inner.captured, inner.committed) = (term, session, captured, committed);
    }

    /// The backup accepted a session.
    pub fn count_session(&self) {
        self.lock().sessions += 1;
    }

    /// A checkpoint could not be taken.
    pub fn count_failed_capture(&self) {
        self.lock().failed_captures += 1;
    }

    /// Where metrics are served by TCP.
    pub fn set_metrics_listen(&self, address: String) {
        self.lock().metrics_listen = Some(address);
    }

    /// Pages of the first copy sent, of how many.
    pub fn set_first_copy(&self, done_pages: u64, all_pages: u64) {
        self.lock().first_copy = Some((done_pages, all_pages));
    }

    /// Epochs are so long from now on, in nanoseconds, and the goal that they are steered to can be reached or not.
    pub fn set_epoch_length(&self, epoch_ns: u64, reach: Reach) {
        let mut inner = self.lock();
        inner.epoch_before_ns = inner.epoch_ns;
        inner.epoch_ns = epoch_ns;
        inner.goal_reached = Some(reach == Reach::Reached);
    }

    /// What the gates hold.
    pub fn set_gates(&self, gates: GateFigures) {
        self.lock().gates = gates;
    }

    /// A peer sent something that was refused.
    pub fn count_refused_input(&self, cause: RefusedInput) {
        self.lock().refused_input[cause as usize] += 1;
    }

    /// A capture ended at `now`.
    pub fn add_capture(&self, now: Time, moment: &Moment, report: &CaptureReport) {
        let mut inner = self.lock();
        inner.epochs += 1;
        inner.idle_epochs += u64::from(moment.idle_ns > 0);
        if moment.interval_ns > 0 {
            // One capture may have been due by the length before.
            let due_ns = inner.epoch_ns.max(inner.epoch_before_ns);
            inner.epoch_before_ns = inner.epoch_ns;
            let on_time = moment.interval_ns <= due_ns + moment.idle_ns + ON_TIME_SLACK_NS;
            inner.intervals += 1;
            inner.on_time += u64::from(on_time);
            inner.late_epochs += u64::from(!on_time);
        }
        inner.command.record(report.command_ns);
        inner.pause.record(report.pause_ns);
        inner.parts.add(report);
        inner.scan_copy.record(report.scan_ns + report.copy_ns);
        inner.device.record(report.device_state_ns);
        inner.dirty.record(report.dirty_pages);
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

    /// A part of the first copy was sent.
    pub fn add_first_copy(&self, wire_bytes: u64) {
        self.lock().first_copy_wire_bytes += wire_bytes;
    }

    /// Memory that the encoder has for what it knows of the backup's image.
    pub fn set_encoder_bytes(&self, bytes: u64) {
        self.lock().encoder_bytes = bytes;
    }

    /// At `now` it is known that what was captured at `captured` is committed.
    pub fn add_commit(&self, captured: Time, now: Time) {
        let mut inner = self.lock();
        inner.commit_lag.record(now.since_ns(captured));
        inner.committed_state = Some(captured);
    }

    /// What the protocol reported: counted, and kept as an event. Gives the event's name and details.
    pub fn add_notice(&self, notice: &Notice) -> (&'static str, Value) {
        let (name, detail) = notice_event(notice);
        let mut inner = self.lock();
        match notice {
            Notice::Suspicion { .. } => inner.suspicions += 1,
            Notice::Grant(..) => inner.grants += 1,
            Notice::Refusal(..) => inner.witness_refusals += 1,
            Notice::BadPeer(_) => inner.refused_input[RefusedInput::Protocol as usize] += 1,
            _ => {}
        }
        inner.events.add(name, &detail);
        (name, detail)
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
            "epoch_ms": nanoseconds_to_ms(inner.epoch_ns),
            "epoch_goal_reached": inner.goal_reached,
            "epochs": inner.epochs,
            "epoch_on_time_ratio": ratio(inner.on_time, inner.intervals),
            "idle_epochs": inner.idle_epochs,
            "command_ms": inner.command.summary_ms(),
            "pause_ms": inner.pause.summary_ms(),
            "pause_parts_ms": inner.parts.json(),
            "scan_copy_ms": inner.scan_copy.summary_ms(),
            "device_state_ms": inner.device.summary_ms(),
            "commit_lag_ms": inner.commit_lag.summary_ms(),
            "dirty_pages": {"p50": inner.dirty.percentile(50.0), "p99": inner.dirty.percentile(99.0)},
            "clock_slip_ratio": ratio(inner.pause_total_ns, inner.elapsed_ns()),
            "first_copy": inner.first_copy.map(|(done, all)| json!({"pages": done, "of_pages": all})),
            "page_bytes": inner.page_bytes,
            "wire_bytes": inner.wire_bytes,
            "pages_by_kind": inner.pages_by_kind,
            "refused_input": inner.refused_input.iter().sum::<u64>(),
            "gates": inner.gates.json(),
            "metrics": inner.metrics_listen,
        })
    }

    /// Whether the VM is protected.
    ///
    /// # Errors
    /// Why it is not, in words.
    pub fn ready(&self) -> Result<(), String> {
        match self.lock().protection.words() {
            (_, None) => Ok(()),
            (_, Some(reason)) => Err(format!("{} is not protected: {reason}", self.vm)),
        }
    }

    /// The figures as metrics, at `now`.
    pub fn sample(&self, samples: &mut Samples, now: Time, limits: &GateLimits) {
        let inner = self.lock();
        let vm = &[self.vm.as_str()];
        samples.flag(&catalogue::ROLE, &[&self.vm, &self.host, "primary"], true);
        sample_protection(samples, &self.vm, inner.protection);
        for (definition, number) in [
            (&catalogue::TERM, inner.term.0),
            (&catalogue::CONNECTED, u64::from(inner.session.is_some())),
            (&catalogue::EPOCH, inner.captured.0),
            (&catalogue::COMMITTED_EPOCH, inner.committed.0),
            (
                &catalogue::LAG_EPOCHS,
                inner.captured.0.saturating_sub(inner.committed.0),
            ),
            (&catalogue::EPOCH_LENGTH_SECONDS, inner.epoch_ns),
            (&catalogue::EPOCHS, inner.epochs),
            (&catalogue::LATE_EPOCHS, inner.late_epochs),
            (&catalogue::IDLE_EPOCHS, inner.idle_epochs),
            (&catalogue::FAILED_CAPTURES, inner.failed_captures),
            (&catalogue::PAGE_BYTES, inner.page_bytes),
            (&catalogue::SESSIONS, inner.sessions),
            (&catalogue::SUSPICIONS, inner.suspicions),
            (&catalogue::GRANTS, inner.grants),
            (&catalogue::WITNESS_REFUSALS, inner.witness_refusals),
        ] {
            samples.number(definition, vm, number);
        }
        if let Some(state) = inner.committed_state {
            samples.number(&catalogue::LAG_SECONDS, vm, now.since_ns(state));
        }
        inner.sample_pauses(samples, &self.vm);
        inner.sample_encoding(samples, &self.vm);
        inner.gates.sample(samples, &self.vm, limits);
        for cause in RefusedInput::ALL {
            let count = inner.refused_input[cause as usize];
            samples.number(&catalogue::REFUSED_INPUT, &[&self.vm, cause.name()], count);
        }
    }
}

/// The VM's state and, if it is not protected, why.
fn sample_protection(samples: &mut Samples, vm: &str, protection: Protection) {
    let reason = match protection {
        Protection::Protected => None,
        Protection::NotProtected(reason) => Some(reason.name()),
    };
    samples.flag(&catalogue::PROTECTED, &[vm], reason.is_none());
    let reasons = NotProtected::ALL.map(NotProtected::name);
    samples.one_of(&catalogue::NOT_PROTECTED, &[vm], &reasons, reason);
}

impl Inner {
    fn sample_pauses(&self, samples: &mut Samples, vm: &str) {
        samples.buckets(&catalogue::PAUSE_SECONDS, &[vm], self.pause.buckets());
        samples.buckets(
            &catalogue::COMMIT_LATENCY_SECONDS,
            &[vm],
            self.commit_lag.buckets(),
        );
        samples.buckets(&catalogue::CHECKPOINT_PAGES, &[vm], self.dirty.buckets());
        for (part, sum_ns) in self.parts.sums_ns() {
            samples.number(&catalogue::PAUSE_PART_SECONDS, &[vm, part], sum_ns);
        }
        let elapsed_ns = self.elapsed_ns();
        samples.real(
            &catalogue::CLOCK_SLIP_RATIO,
            &[vm],
            ratio(self.pause_total_ns, elapsed_ns).unwrap_or(0.0),
        );
    }

    fn sample_encoding(&self, samples: &mut Samples, vm: &str) {
        for kind in Kind::ALL {
            let pages = self.pages_by_kind[usize::from(kind.number())];
            samples.number(&catalogue::PAGES, &[vm, kind.name()], pages);
        }
        for (phase, bytes) in [
            ("first_copy", self.first_copy_wire_bytes),
            ("checkpoint", self.wire_bytes),
        ] {
            samples.number(&catalogue::WIRE_BYTES, &[vm, phase], bytes);
        }
        let (done, all) = self.first_copy.unwrap_or((0, 0));
        samples.number(&catalogue::RESYNC_PAGES, &[vm], all);
        samples.real(
            &catalogue::RESYNC_DONE_RATIO,
            &[vm],
            ratio(done, all).unwrap_or(0.0),
        );
        samples.number(&catalogue::MEMORY_BYTES, &[vm, "deltas"], self.encoder_bytes);
    }

    /// From the first to the last capture since the last reset.
    fn elapsed_ns(&self) -> u64 {
        match (self.first_capture, self.last_capture) {
            (Some(first), Some(last)) => last.since_ns(first),
            _ => 0,
        }
    }
}
