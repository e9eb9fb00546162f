//! Every metric of every daemon: its name, kind, labels and meaning. What a daemon shows, what the documentation says and what
//! dashboard and alerts ask for are held against this.

/// What every metric's name begins with.
pub const PREFIX: &str = "romulus";

/// Kinds of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until the daemon is started again. Its name ends with `_total`.
    Counter,
    /// A value as it is now.
    Gauge,
    /// Counts by upper bounds.
    Histogram,
}

impl Kind {
    /// The kind's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Definition {
    /// Without [`PREFIX`], and without the `_total` of a counter. Ends with the unit, if there is one.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
    /// How many of the daemon's whole numbers make one of the metric's unit: 10⁹ nanoseconds are a second.
    pub per_unit: u64,
}

impl Definition {
    /// The name as it is shown and asked for: with prefix and, for a counter, `_total`.
    pub fn full_name(&self) -> String {
        let suffix = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{PREFIX}_{}{suffix}", self.name)
    }

    /// The unit, as the name has it.
    pub fn unit(&self) -> &'static str {
        match self.name.rsplit('_').next() {
            Some("seconds") => "seconds",
            Some("bytes") => "bytes",
            Some("ratio") => "ratio",
            Some("frames") => "frames",
            Some("pages") => "pages",
            _ => "",
        }
    }
}

const NANOSECONDS: u64 = 1_000_000_000;
const VM: &[&str] = &["vm"];

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Definition {
    define(name, Kind::Counter, labels, help, 1)
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Definition {
    define(name, Kind::Gauge, labels, help, 1)
}

const fn durations(name: &'static str, help: &'static str) -> Definition {
    define(name, Kind::Histogram, VM, help, NANOSECONDS)
}

const fn define(
    name: &'static str,
    kind: Kind,
    labels: &'static [&'static str],
    help: &'static str,
    per_unit: u64,
) -> Definition {
    Definition {
        name,
        kind,
        labels,
        help,
        per_unit,
    }
}

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident = $definition:expr;)*) => {
        $($(#[$doc])* #[doc = "See its help text."] pub static $name: Definition = $definition;)*
    };
}

metrics! {
    // Of every daemon.
    BUILD_INFO = gauge("build_info", &["daemon", "version"], "Always 1; says which daemon this is, and its version");
    START_TIME_SECONDS = gauge("start_time_seconds", &[], "When the daemon was started, in Unix time");
    RESIDENT_MEMORY_BYTES = gauge("resident_memory_bytes", &[], "Memory of the daemon's process that is resident, shared memory included");
    CPU_SECONDS = define("cpu_seconds", Kind::Counter, &[], "Processor time of the daemon's process, user and system", 1);
    CERTIFICATE_EXPIRY_TIME_SECONDS = gauge("certificate_expiry_time_seconds", &[], "When the certificates in use for new connections expire, in Unix time: the first of the host's own");

    // Of a VM, at the replicator and at the agent.
    ROLE = gauge("role", &["vm", "host", "role"], "Always 1; what this host is to the VM: primary, backup, or active after a takeover");
    PROTECTED = gauge("protected", VM, "1 while the VM is protected, as this host sees it, else 0");
    NOT_PROTECTED = gauge("not_protected", &["vm", "reason"], "1 for the reason why the VM is not protected, 0 for all others");
    TERM = gauge("term", VM, "Term of the witness's record, as far as it is known here; 0 before");
    CONNECTED = gauge("connected", VM, "1 while a session with the other host is open, else 0");
    COMMITTED_EPOCH = gauge("committed_epoch", VM, "Newest epoch of the session that is committed; 0 for none");
    SESSIONS = counter("sessions", VM, "Sessions that began: connections which the backup accepted");
    SUSPICIONS = counter("suspicions", VM, "Times that the other host was silent for too long");
    GRANTS = counter("grants", VM, "Changes of the record that the witness granted this host");
    WITNESS_REFUSALS = counter("witness_refusals", VM, "Changes of the record that the witness refused this host");
    REFUSED_INPUT = counter("refused_input", &["vm", "cause"], "Input of the other host that was refused");
    MEMORY_BYTES = gauge("memory_bytes", &["vm", "kind"], "Memory that the VM costs this host, by what it is for");
    WITNESS_CONNECTED = gauge("witness_connected", &[], "1 while the connection to the witness stands, as far as is known, else 0");

    // At the replicator.
    EPOCH = gauge("epoch", VM, "Newest epoch of the session that was captured; 0 for none");
    LAG_EPOCHS = gauge("lag_epochs", VM, "Epochs that were captured and are not committed");
    LAG_SECONDS = define("lag_seconds", Kind::Gauge, VM, "Age of the newest committed checkpoint; missing before the first one of a session", NANOSECONDS);
    EPOCH_LENGTH_SECONDS = define("epoch_length_seconds", Kind::Gauge, VM, "Length of an epoch, as set", NANOSECONDS);
    EPOCHS = counter("epochs", VM, "Checkpoints taken");
    LATE_EPOCHS = counter("late_epochs", VM, "Checkpoints that began more than 2 ms late");
    IDLE_EPOCHS = counter("idle_epochs", VM, "Epochs that were prolonged because the guest was idle");
    FAILED_CAPTURES = counter("failed_captures", VM, "Checkpoints that could not be taken; each ends the session");
    PAUSE_SECONDS = durations("pause_seconds", "How long the guest stood still for a checkpoint");
    PAUSE_PART_SECONDS = define("pause_part_seconds", Kind::Counter, &["vm", "part"], "Time that the guest stood still, by what was done meanwhile", NANOSECONDS);
    COMMIT_LATENCY_SECONDS = durations("commit_latency_seconds", "From the end of a capture until it was known to be committed");
    HOLD_SECONDS = durations("hold_seconds", "How long released frames were held: the latency that protection adds to output");
    CHECKPOINT_PAGES = define("checkpoint_pages", Kind::Histogram, VM, "Dirty pages of a checkpoint", 1);
    PAGES = counter("encoded_pages", &["vm", "encoding"], "Pages of checkpoints, by how they were encoded");
    PAGE_BYTES = counter("page_bytes", VM, "Bytes of the pages of checkpoints, before encoding");
    WIRE_BYTES = counter("wire_bytes", &["vm", "phase"], "Bytes of pages and device state that were sent, after encoding");
    HELD_FRAMES = gauge("held_frames", VM, "Frames of the guest that are held");
    HELD_BYTES = gauge("held_bytes", VM, "Bytes of the guest's output that are held");
    HELD_FRAMES_LIMIT = gauge("held_limit_frames", VM, "Most frames that may be held; past it they are dropped");
    HELD_BYTES_LIMIT = gauge("held_limit_bytes", VM, "Most bytes that may be held; past it frames are dropped");
    RELEASED_FRAMES = counter("released_frames", VM, "Frames that were held and then released");
    RELEASED_BYTES = counter("released_bytes", VM, "Bytes that were held and then released");
    DROPPED_FRAMES = counter("dropped_frames", &["vm", "cause"], "Frames of the guest that never left");
    GATE_CLOSED = gauge("gate_closed", VM, "1 while the guest's output is held, else 0");
    CLOCK_SLIP_RATIO = gauge("clock_slip_ratio", VM, "Part of the time since the VM became protected that its guest stood still");
    RESYNC_PAGES = gauge("resync_pages", VM, "Pages that the full copy of this session, or of the last one, goes over");
    RESYNC_DONE_RATIO = gauge("resync_done_ratio", VM, "Part of them that is done; 1 when the copy is complete");

    // At the agent.
    VMS = gauge("vms", &[], "VMs that are backed up or run here, or have a record at this witness");
    VMS_LIMIT = gauge("vms_limit", &[], "Most VMs that there may be");
    IMAGE_LIMIT_BYTES = gauge("image_limit_bytes", &[], "Most bytes that all images may come to take");
    STAGING_BYTES = gauge("staging_bytes", &[], "Memory that the checkpoints of all VMs take while they are staged");
    STAGING_LIMIT_BYTES = gauge("staging_limit_bytes", &[], "Most memory for staging; past it checkpoints are staged in files");
    SPILLED_BYTES = counter("spilled_bytes", &[], "Bytes of checkpoints that were staged in files, for want of memory");
    SPILLED_STAGING_BYTES = gauge("spilled_staging_bytes", VM, "Bytes of the VM's staging that lie in files now");
    COMMITS = counter("commits", VM, "Checkpoints that were verified, made durable and applied");
    RECEIVE_TO_ACK_SECONDS = durations("receive_to_ack_seconds", "From the last byte of a checkpoint received until its acknowledgement was handed to the connection");
    VERIFY_SECONDS = durations("verify_seconds", "How long a commit's verification took, until it was durable");
    APPLY_SECONDS = durations("apply_seconds", "How long a commit took to be applied to the image");
    STANDBY = gauge("standby", &["vm", "state"], "1 for the state that the standby is in, 0 for all others");
    TAKEOVERS = counter("takeovers", VM, "Takeovers that let the guest run here");
    FAILED_TAKEOVERS = counter("failed_takeovers", VM, "Takeovers after which the guest does not run here");
    GIVEN_UP = counter("given_up", VM, "How often what works at the VM in the agent gave up, and was started again");
    REFUSED_CONNECTIONS = counter("refused_connections", &["cause"], "Hosts that were turned away after the handshake");

    // At agent and witness.
    CONNECTIONS = gauge("connections", &[], "Connections that are open");
    HANDSHAKES = counter("handshakes", &["result"], "Attempts to connect, by what became of them");

    // At the witness.
    WITNESS_REQUESTS = counter("witness_requests", &["answer"], "Requests answered, by the answer");
    WITNESS_BAD_REQUESTS = counter("witness_bad_requests", &["cause"], "Requests that were refused unanswered");
}

/// What the replicator shows.
pub static REPLICATOR: &[&Definition] = &[
    &BUILD_INFO,
    &START_TIME_SECONDS,
    &RESIDENT_MEMORY_BYTES,
    &CPU_SECONDS,
    &CERTIFICATE_EXPIRY_TIME_SECONDS,
    &ROLE,
    &PROTECTED,
    &NOT_PROTECTED,
    &TERM,
    &CONNECTED,
    &WITNESS_CONNECTED,
    &EPOCH,
    &COMMITTED_EPOCH,
    &LAG_EPOCHS,
    &LAG_SECONDS,
    &EPOCH_LENGTH_SECONDS,
    &EPOCHS,
    &LATE_EPOCHS,
    &IDLE_EPOCHS,
    &FAILED_CAPTURES,
    &PAUSE_SECONDS,
    &PAUSE_PART_SECONDS,
    &CLOCK_SLIP_RATIO,
    &COMMIT_LATENCY_SECONDS,
    &HOLD_SECONDS,
    &HELD_FRAMES,
    &HELD_BYTES,
    &HELD_FRAMES_LIMIT,
    &HELD_BYTES_LIMIT,
    &RELEASED_FRAMES,
    &RELEASED_BYTES,
    &DROPPED_FRAMES,
    &GATE_CLOSED,
    &CHECKPOINT_PAGES,
    &PAGES,
    &PAGE_BYTES,
    &WIRE_BYTES,
    &RESYNC_PAGES,
    &RESYNC_DONE_RATIO,
    &MEMORY_BYTES,
    &SESSIONS,
    &SUSPICIONS,
    &GRANTS,
    &WITNESS_REFUSALS,
    &REFUSED_INPUT,
];

/// What the backup agent shows.
pub static BACKUP_AGENT: &[&Definition] = &[
    &BUILD_INFO,
    &START_TIME_SECONDS,
    &RESIDENT_MEMORY_BYTES,
    &CPU_SECONDS,
    &CERTIFICATE_EXPIRY_TIME_SECONDS,
    &VMS,
    &VMS_LIMIT,
    &IMAGE_LIMIT_BYTES,
    &STAGING_BYTES,
    &STAGING_LIMIT_BYTES,
    &SPILLED_BYTES,
    &WITNESS_CONNECTED,
    &CONNECTIONS,
    &HANDSHAKES,
    &REFUSED_CONNECTIONS,
    &ROLE,
    &PROTECTED,
    &NOT_PROTECTED,
    &TERM,
    &CONNECTED,
    &COMMITTED_EPOCH,
    &COMMITS,
    &RECEIVE_TO_ACK_SECONDS,
    &VERIFY_SECONDS,
    &APPLY_SECONDS,
    &STANDBY,
    &MEMORY_BYTES,
    &SPILLED_STAGING_BYTES,
    &SESSIONS,
    &SUSPICIONS,
    &GRANTS,
    &WITNESS_REFUSALS,
    &TAKEOVERS,
    &FAILED_TAKEOVERS,
    &GIVEN_UP,
    &REFUSED_INPUT,
];

/// What the witness shows.
pub static WITNESS: &[&Definition] = &[
    &BUILD_INFO,
    &START_TIME_SECONDS,
    &RESIDENT_MEMORY_BYTES,
    &CPU_SECONDS,
    &CERTIFICATE_EXPIRY_TIME_SECONDS,
    &VMS,
    &VMS_LIMIT,
    &CONNECTIONS,
    &HANDSHAKES,
    &WITNESS_REQUESTS,
    &WITNESS_BAD_REQUESTS,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_what_prometheus_asks_for() {
        for definition in REPLICATOR.iter().chain(BACKUP_AGENT).chain(WITNESS) {
            let Definition {
                name, help, labels, ..
            } = definition;
            let plain = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            assert!(plain(name) && labels.iter().all(|label| plain(label)), "{name}");
            assert!(!name.ends_with("_total") && !name.starts_with(PREFIX), "{name}");
            assert!(!help.is_empty() && !help.ends_with('.'), "{name}: {help}");
            assert!(
                definition.per_unit == 1 || definition.unit() == "seconds",
                "{name}"
            );
        }
    }

    #[test]
    fn no_daemon_shows_a_metric_twice() {
        for list in [REPLICATOR, BACKUP_AGENT, WITNESS] {
            let mut names: Vec<_> = list.iter().map(|definition| definition.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), list.len());
        }
    }
}
