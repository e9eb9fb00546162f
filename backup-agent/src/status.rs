//! What the agent tells its operator of one VM.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use romulus_image::Usage;
use romulus_protocol::{NotProtected, Notice, Protection};
use romulus_telemetry::{EventLog, Histogram, Pulse, Samples, catalogue, notice_event};
use romulus_types::{Epoch, Session, Term, VmId};
use serde_json::{Value, json};
use tokio::sync::watch;

/// Acknowledgements whose times are kept: at 40 a second those of 25 s.
const RECENT_ACKS: usize = 1024;
/// Commits that are verified and not acknowledged yet, at most: more than a primary can have in flight.
const UNACKED_MAX: usize = 256;

/// Version of the JSON that `romulus status --json` prints.
pub const STATUS_SCHEMA: u32 = 1;

struct Inner {
    protection: Protection,
    detail: Option<String>,
    term: Term,
    session: Option<Session>,
    committed: Epoch,
    standby: &'static str,
    standby_pid: Option<u32>,
    usage: Usage,
    spilled_bytes: u64,
    commits: u64,
    receive_to_ack: Histogram,
    unacked: VecDeque<(Epoch, Instant)>,
    verify: Histogram,
    apply: Histogram,
    refused_input: [u64; RefusedInput::ALL.len()],
    counts: Counts,
    recent_acks_ns: VecDeque<u64>,
    committed_pages: u64,
    refused_session: Option<(Session, String)>,
    activation: Option<Value>,
    events: EventLog,
}

impl Inner {
    /// Whether the session that there is ends because of a checkpoint that was refused.
    fn checkpoint_was_refused(&self) -> bool {
        let refused = self.refused_session.as_ref();
        refused.is_some_and(|(refused, _)| self.session == Some(*refused))
    }
}

/// How often things happened.
#[derive(Default)]
struct Counts {
    sessions: u64,
    suspicions: u64,
    grants: u64,
    witness_refusals: u64,
    takeovers: u64,
    failed_takeovers: u64,
    given_up: u64,
}

/// What a primary sent that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedInput {
    /// What ended a session: bytes that are no frame, or a frame that has no place where it came.
    Session,
    /// A checkpoint that is not what its record says, or has no room.
    Checkpoint,
    /// A message that the protocol does not expect from this primary.
    Protocol,
}

impl RefusedInput {
    const ALL: [Self; 3] = [Self::Session, Self::Checkpoint, Self::Protocol];

    fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Checkpoint => "checkpoint",
            Self::Protocol => "protocol",
        }
    }
}

/// The states of a standby.
const STANDBYS: [&str; 5] = ["none", "proven", "waiting", "active", "ended"];

/// The shared snapshot.
pub struct VmStatus {
    vm: VmId,
    host: String,
    /// Beats as the driver's loop turns.
    pub pulse: Pulse,
    inner: Mutex<Inner>,
    orders: watch::Sender<Option<OrderEnd>>,
}

/// How a failover ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrderEnd {
    /// The guest runs here.
    Activated,
    /// It does not, and why.
    Refused(String),
}

impl OrderEnd {
    /// What an event says of an order that waits.
    fn of(event: &str, detail: &Value) -> Option<Self> {
        let text = |key: &str| detail[key].as_str().unwrap_or("no reason is known").to_owned();
        match event {
            "activated" => Some(Self::Activated),
            "activation_failed" => detail["error"]
                .as_str()
                .map(|error| Self::Refused(format!("the guest could not be started: {error}"))),
            "vm_given_up" => Some(Self::Refused(format!(
                "the agent gave this VM up and begins with it again, order it again: {}",
                text("error")
            ))),
            "order_refused" if detail["state"] == "protected" => Some(Self::Refused(
                "the VM is protected: there is nothing to force".to_owned(),
            )),
            "order_refused" => Some(Self::Refused(format!("not in this state: {}", text("reason")))),
            "refusal" => Some(Self::Refused(format!(
                "the witness refused it: its record is {}",
                detail["mode"]
            ))),
            _ => None,
        }
    }
}

fn percentiles_us(histogram: &Histogram) -> Value {
    let at = |percent: f64| histogram.percentile(percent) / 1000;
    json!({"p50": at(50.0), "p99": at(99.0), "max": histogram.max() / 1000})
}

/// Exact percentiles of the last acknowledgements of one VM, or of several.
pub fn recent_us(mut sorted: Vec<u64>) -> Value {
    sorted.sort_unstable();
    let at = |permille: usize| {
        let position = (sorted.len() * permille / 1000).min(sorted.len().saturating_sub(1));
        sorted.get(position).map(|ns| ns / 1000)
    };
    json!({"p50": at(500), "p99": at(990), "max": at(1000), "count": sorted.len()})
}

impl VmStatus {
    /// How long the last acknowledgements took, in nanoseconds; at most [`RECENT_ACKS`].
    pub fn recent_acks_ns(&self) -> Vec<u64> {
        self.lock().recent_acks_ns.iter().copied().collect()
    }

    /// Nothing has happened yet.
    pub fn new(vm: VmId, host: &str) -> Self {
        let inner = Inner {
            protection: Protection::NotProtected(NotProtected::Starting),
            detail: None,
            term: Term(0),
            session: None,
            committed: Epoch::NONE,
            standby: "none",
            standby_pid: None,
            usage: Usage::default(),
            spilled_bytes: 0,
            commits: 0,
            receive_to_ack: Histogram::new(),
            unacked: VecDeque::new(),
            verify: Histogram::new(),
            apply: Histogram::new(),
            refused_input: [0; RefusedInput::ALL.len()],
            counts: Counts::default(),
            recent_acks_ns: VecDeque::new(),
            committed_pages: 0,
            refused_session: None,
            activation: None,
            events: EventLog::default(),
        };
        Self {
            vm,
            host: host.into(),
            pulse: Pulse::new(),
            inner: Mutex::new(inner),
            orders: watch::channel(None).0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM.
    pub fn vm(&self) -> &str {
        self.vm.as_str()
    }

    /// The same as a name.
    pub fn vm_id(&self) -> &VmId {
        &self.vm
    }

    /// The operator's word for the state.
    pub fn set_protection(&self, protection: Protection) {
        self.lock().protection = protection;
    }

    /// Whether a guest runs here after a takeover, and otherwise whether one is protected by this host.
    pub fn summary(&self) -> (bool, bool) {
        let inner = self.lock();
        (
            inner.standby == "active",
            inner.protection == Protection::Protected,
        )
    }

    /// What went wrong last, in words.
    pub fn set_detail(&self, detail: String) {
        self.lock().detail = Some(detail);
    }

    /// Where the protocol stands.
    pub fn set_progress(&self, term: Term, session: Option<Session>, committed: Epoch) {
        let mut inner = self.lock();
        (inner.term, inner.session, inner.committed) = (term, session, committed);
    }

    /// What the standby is doing: "none", "proven", "waiting", "active", "ended".
    pub fn set_standby(&self, standby: &'static str, pid: Option<u32>) {
        let mut inner = self.lock();
        (inner.standby, inner.standby_pid) = (standby, pid);
    }

    /// One checkpoint of so many pages was verified and applied; nanoseconds.
    pub fn add_commit(&self, pages: u64, verify_ns: u64, apply_ns: u64) {
        let mut inner = self.lock();
        inner.commits += 1;
        inner.committed_pages += pages;
        inner.verify.record(verify_ns);
        inner.apply.record(apply_ns);
    }

    /// The last byte of this epoch's checkpoint came at `received`; it is verified now.
    pub fn commit_received(&self, epoch: Epoch, received: Instant) {
        let unacked = &mut self.lock().unacked;
        if unacked.len() == UNACKED_MAX {
            unacked.pop_front();
        }
        unacked.push_back((epoch, received));
    }

    /// This epoch and those before it are acknowledged at `now`.
    pub fn commit_acked(&self, epoch: Epoch, now: Instant) {
        let inner = &mut *self.lock();
        while let Some((_, received)) = inner.unacked.pop_front_if(|(unacked, _)| *unacked <= epoch) {
            let took = now.saturating_duration_since(received);
            let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            inner.receive_to_ack.record(took_ns);
            if inner.recent_acks_ns.len() == RECENT_ACKS {
                inner.recent_acks_ns.pop_front();
            }
            inner.recent_acks_ns.push_back(took_ns);
        }
    }

    /// Another session begins: what the last one left is not acknowledged any more.
    pub fn session_begins(&self) {
        let mut inner = self.lock();
        inner.unacked.clear();
        inner.counts.sessions += 1;
    }

    /// What the image takes, as counted now.
    pub fn set_usage(&self, usage: Usage) {
        self.lock().usage = usage;
    }

    /// Bytes of staging that lie in files now.
    pub fn set_spilled_bytes(&self, spilled_bytes: u64) {
        self.lock().spilled_bytes = spilled_bytes;
    }

    /// What the image takes, as last counted.
    pub fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// A peer sent something that was refused.
    pub fn count_refused_input(&self, cause: RefusedInput) {
        self.lock().refused_input[cause as usize] += 1;
    }

    /// A checkpoint of this session was refused, for this reason.
    pub fn refuse_session(&self, session: Session, reason: String) {
        let mut inner = self.lock();
        inner.refused_input[RefusedInput::Checkpoint as usize] += 1;
        inner.refused_session = Some((session, reason));
    }

    /// Why a checkpoint of this session was refused, if one was.
    pub fn refusal_of(&self, session: Session) -> Option<String> {
        let inner = self.lock();
        let (refused, reason) = inner.refused_session.as_ref()?;
        (*refused == session).then(|| reason.clone())
    }

    /// How the activation went.
    pub fn set_activation(&self, report: Value) {
        self.lock().activation = Some(report);
    }

    /// What worked at the VM has ended, and with it the standby that waited. A guest that was taken over runs on.
    pub fn parts_ended(&self) {
        let mut inner = self.lock();
        (inner.session, inner.committed) = (None, Epoch::NONE);
        if inner.standby != "active" {
            (inner.standby, inner.standby_pid) = ("none", None);
        }
    }

    /// What works at the VM gave up.
    pub fn count_given_up(&self) {
        self.lock().counts.given_up += 1;
    }

    /// Keeps an event for `romulus events`, and tells those who wait for an order's end.
    pub fn event(&self, name: &str, detail: &Value) {
        let mut inner = self.lock();
        match name {
            "activated" => inner.counts.takeovers += 1,
            // It comes a second time, without the error, when the protocol has heard of it.
            "activation_failed" if !detail["error"].is_null() => inner.counts.failed_takeovers += 1,
            _ => {}
        }
        inner.events.add(name, detail);
        drop(inner);
        if let Some(end) = OrderEnd::of(name, detail) {
            self.orders.send_replace(Some(end));
        }
    }

    /// What the protocol reported: counted, and kept as an event. Gives the event's name and details.
    pub fn notice(&self, notice: &Notice) -> (&'static str, Value) {
        let (name, detail) = notice_event(notice);
        let mut inner = self.lock();
        match notice {
            Notice::Suspicion { .. } => inner.counts.suspicions += 1,
            Notice::Grant(..) => inner.counts.grants += 1,
            Notice::Refusal(..) => inner.counts.witness_refusals += 1,
            // What the store refused is counted as its checkpoint; the protocol says so as well.
            Notice::BadPeer(_) if inner.checkpoint_was_refused() => {}
            Notice::BadPeer(_) => inner.refused_input[RefusedInput::Protocol as usize] += 1,
            _ => {}
        }
        drop(inner);
        self.event(name, &detail);
        (name, detail)
    }

    /// How failovers end from now on: the next change is the next end.
    pub fn order_ends(&self) -> watch::Receiver<Option<OrderEnd>> {
        self.orders.subscribe()
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
            "role": "backup",
            "vm": self.vm,
            "host": self.host,
            "state": state,
            "reason": reason,
            "detail": inner.detail,
            "term": inner.term.0,
            "session": inner.session.map(|s| s.to_string()),
            "committed": inner.committed.0,
            "commits": inner.commits,
            "standby": inner.standby,
            "standby_pid": inner.standby_pid,
            "image_bytes": inner.usage.ram_bytes,
            "staging_bytes": inner.usage.staging_bytes,
            "spilled_bytes": inner.spilled_bytes,
            "verify_us": percentiles_us(&inner.verify),
            "apply_us": percentiles_us(&inner.apply),
            "receive_to_ack_us": percentiles_us(&inner.receive_to_ack),
            "refused_input": inner.refused_input.iter().sum::<u64>(),
            "receive_to_ack_recent_us": recent_us(inner.recent_acks_ns.iter().copied().collect()),
            "committed_pages": inner.committed_pages,
            "activation": inner.activation,
        })
    }

    /// Whether this host could take the VM over, or has done so.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn ready(&self) -> Result<(), String> {
        let inner = self.lock();
        match inner.protection.words() {
            (_, None) => Ok(()),
            _ if inner.standby == "active" => Ok(()),
            (_, Some(reason)) => Err(format!("{} is not protected: {reason}", self.vm)),
        }
    }

    /// The figures as metrics.
    pub fn sample(&self, samples: &mut Samples) {
        let inner = self.lock();
        let vm = &[self.vm.as_str()];
        let active = inner.standby == "active";
        let role = if active { "active" } else { "backup" };
        samples.flag(&catalogue::ROLE, &[self.vm.as_str(), &self.host, role], true);
        let reason = match inner.protection {
            Protection::Protected => None,
            Protection::NotProtected(reason) => Some(reason.name()),
        };
        samples.flag(&catalogue::PROTECTED, vm, reason.is_none());
        let reasons = NotProtected::ALL.map(NotProtected::name);
        samples.one_of(&catalogue::NOT_PROTECTED, vm, &reasons, reason);
        samples.one_of(&catalogue::STANDBY, vm, &STANDBYS, Some(inner.standby));
        for (definition, number) in [
            (&catalogue::TERM, inner.term.0),
            (&catalogue::CONNECTED, u64::from(inner.session.is_some())),
            (&catalogue::COMMITTED_EPOCH, inner.committed.0),
            (&catalogue::COMMITS, inner.commits),
            (&catalogue::SESSIONS, inner.counts.sessions),
            (&catalogue::SUSPICIONS, inner.counts.suspicions),
            (&catalogue::GRANTS, inner.counts.grants),
            (&catalogue::WITNESS_REFUSALS, inner.counts.witness_refusals),
            (&catalogue::TAKEOVERS, inner.counts.takeovers),
            (&catalogue::FAILED_TAKEOVERS, inner.counts.failed_takeovers),
            (&catalogue::GIVEN_UP, inner.counts.given_up),
        ] {
            samples.number(definition, vm, number);
        }
        for (definition, histogram) in [
            (&catalogue::RECEIVE_TO_ACK_SECONDS, &inner.receive_to_ack),
            (&catalogue::VERIFY_SECONDS, &inner.verify),
            (&catalogue::APPLY_SECONDS, &inner.apply),
        ] {
            samples.buckets(definition, vm, histogram.buckets());
        }
        for cause in RefusedInput::ALL {
            let labels = &[self.vm.as_str(), cause.name()];
            samples.number(
                &catalogue::REFUSED_INPUT,
                labels,
                inner.refused_input[cause as usize],
            );
        }
        for (kind, bytes) in [
            ("image", inner.usage.ram_bytes),
            ("staging", inner.usage.staging_bytes),
        ] {
            samples.number(&catalogue::MEMORY_BYTES, &[self.vm.as_str(), kind], bytes);
        }
        samples.number(&catalogue::SPILLED_STAGING_BYTES, vm, inner.spilled_bytes);
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
