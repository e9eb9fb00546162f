//! The state of the model, and what must always be true of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use romulus_types::{Epoch, HostId, Nonce, Session, Term, Time, VmId, WitnessInstance};

use crate::{
    Ask, Backup, BackupConfig, BackupMessage, ImageStatus, Mode, Primary, PrimaryConfig, PrimaryMessage,
    Record, Remembered, Weakness, Witness, WitnessReply, WitnessRequest,
};

/// Where both machines' clocks stand between two actions.
pub(crate) const BASE: Time = Time::from_ns(1000);
/// The session of the host that lies.
pub(crate) const LIE: Session = Session(u128::MAX);
/// Later than anything in the model.
const NEVER_NS: u64 = u64::MAX;

/// How often what may go wrong goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    pub(crate) sessions: u8,
    pub(crate) captures: u8,
    pub(crate) primary_crashes: u8,
    pub(crate) backup_crashes: u8,
    pub(crate) primary_host_crashes: u8,
    pub(crate) witness_restores: u8,
    pub(crate) unprotects: u8,
    pub(crate) hand_overs: u8,
    pub(crate) guest_changes: u8,
    pub(crate) power_offs: u8,
    pub(crate) guest_losses: u8,
    /// Hellos of a host that the record does not name, in the term of the record.
    pub(crate) lies: u8,
    /// The same, in a term that there never was.
    pub(crate) lies_ahead: u8,
    /// The witness's word on a hello takes its time, as everything else does. Otherwise it comes at once: what can happen
    /// between is then left out, which keeps the larger budgets in reach.
    pub(crate) slow_words: bool,
}

/// One run of the model: a budget, and perhaps a planted mistake.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) budget: Budget,
    pub(crate) weakness: Option<Weakness>,
}

/// From the backup on a session's control stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ToPrimary {
    Accepted,
    Refused,
    Message(BackupMessage),
}

/// One session's connection. Each end is up until it is closed there; what is under way may still arrive or not.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Connection {
    pub(crate) hello: Option<(Term, WitnessInstance)>,
    pub(crate) primary_up: bool,
    pub(crate) backup_up: bool,
    pub(crate) control: VecDeque<PrimaryMessage>,
    pub(crate) checkpoints: VecDeque<Epoch>,
    pub(crate) answers: VecDeque<ToPrimary>,
}

/// The guest on the primary's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Guest {
    Running,
    Stopped,
    Gone,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) weakness: Option<Weakness>,
    pub(crate) budget: Budget,
    pub(crate) lives: u8,

    pub(crate) primary: Option<Primary>,
    pub(crate) primary_disk: Option<Remembered>,
    pub(crate) guest: Guest,
    pub(crate) gate_open: bool,
    /// Number of the interval between captures that the guest is in.
    pub(crate) interval: u8,

    pub(crate) backup: Option<Backup>,
    pub(crate) backup_disk: Option<Remembered>,
    pub(crate) image: ImageStatus,
    /// The newest interval whose output the image covers.
    pub(crate) image_covers: u8,
    /// The guest was activated at the backup, and what it covers.
    pub(crate) active_covers: Option<u8>,

    pub(crate) witness: Witness,
    /// Kept only where the budget lets the witness be restored from a copy.
    pub(crate) older_records: Vec<Record>,
    pub(crate) was_paired: bool,
    pub(crate) requests: BTreeSet<WitnessRequest>,
    pub(crate) to_primary: BTreeSet<WitnessReply>,
    pub(crate) to_backup: BTreeSet<WitnessReply>,

    pub(crate) connections: BTreeMap<Session, Connection>,
    /// The newest interval that each checkpoint covers.
    pub(crate) covers: BTreeMap<(Session, Epoch), u8>,
    pub(crate) durable: BTreeMap<Session, Epoch>,
    /// Newest interval whose output a client has seen.
    pub(crate) seen: u8,
    /// An answer reached the primary after the takeover.
    pub(crate) late_answer: bool,
    pub(crate) violation: Option<&'static str>,
}

pub(crate) fn vm() -> VmId {
    VmId::new("vm").expect("a name")
}

pub(crate) fn host(name: &str) -> HostId {
    HostId::new(name).expect("a name")
}

impl World {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        let instance = WitnessInstance(1);
        let mut witness = Witness::new(instance);
        let mode = Mode::Alone { host: host("p") };
        witness.load(
            vm(),
            Record {
                instance,
                term: Term(1),
                mode,
                nonce: Nonce(1),
            },
        );
        let mut world = Self {
            weakness: scenario.weakness,
            budget: scenario.budget,
            lives: 0,
            primary: None,
            primary_disk: None,
            guest: Guest::Running,
            gate_open: true,
            interval: 1,
            backup: None,
            backup_disk: None,
            image: ImageStatus::Unusable,
            image_covers: 0,
            active_covers: None,
            witness: scenario
                .weakness
                .map_or(witness.clone(), |weakness| witness.weakened(weakness)),
            older_records: Vec::new(),
            was_paired: false,
            requests: BTreeSet::new(),
            to_primary: BTreeSet::new(),
            to_backup: BTreeSet::new(),
            connections: BTreeMap::new(),
            covers: BTreeMap::new(),
            durable: BTreeMap::new(),
            seen: 1,
            late_answer: false,
            violation: None,
        };
        world.start_primary();
        world.start_backup();
        world
    }

    pub(crate) fn start_primary(&mut self) {
        self.lives += 1;
        let config = PrimaryConfig {
            vm: vm(),
            host: host("p"),
            backup: host("b"),
            register: false,
            epoch_ns: 0,
            heartbeat_interval_ns: NEVER_NS,
            suspicion_ns: 1,
            release_age_ns_max: NEVER_NS,
            retry_ns: 1,
            epochs_in_flight_max: 2,
            hold_ns_max: NEVER_NS,
            mute_ns_max: NEVER_NS,
        };
        let primary = Primary::new(config, self.primary_disk.clone(), u128::from(self.lives), BASE);
        let weak = self.weakness;
        self.primary = Some(weak.map_or(primary.clone(), |weakness| primary.weakened(weakness)));
        self.run_primary(0, None);
    }

    pub(crate) fn start_backup(&mut self) {
        self.lives += 1;
        let config = BackupConfig {
            vm: vm(),
            host: host("b"),
            suspicion_ns: 1,
            retry_ns: 1,
            mute_ns_max: NEVER_NS,
            hello_wait_ns: 1,
        };
        let seed = u128::from(self.lives);
        let backup = Backup::new(config, self.backup_disk.clone(), self.image, seed, BASE);
        let weak = self.weakness;
        self.backup = Some(weak.map_or(backup.clone(), |weakness| backup.weakened(weakness)));
        self.run_backup(0, None);
    }

    pub(crate) fn record(&self) -> &Record {
        self.witness.record(&vm()).expect("the record is never removed")
    }

    pub(crate) fn violate(&mut self, what: &'static str) {
        self.violation.get_or_insert(what);
    }

    /// Brings the world into its one form after an action, and looks whether all that must be true still is.
    pub(crate) fn settle(&mut self) {
        let speaks = self.gate_open && self.guest == Guest::Running;
        if speaks {
            self.seen = self.interval;
        }
        let known_witness = self.record().instance == self.witness.instance();
        if known_witness && speaks {
            match &self.record().mode {
                Mode::Paired { .. } => self.violate("paired, and the gate is open"),
                Mode::Alone { host: owner } if *owner != host("p") => {
                    self.violate("the primary speaks in the backup's term");
                }
                Mode::Alone { .. } | Mode::Ended => {}
            }
        }
        if let Some(known) = &self.backup_disk
            && known.instance == self.witness.instance()
            && self.record().instance == known.instance
            && known.term > self.record().term
        {
            self.violate("the backup believes in a term that there never was");
        }
        if let Some(covers) = self.active_covers {
            if speaks {
                self.violate("two hosts let the VM speak");
            }
            if self.seen > covers {
                self.violate("a client has seen output that the survivor does not have");
            }
        }
        self.forget_the_irrelevant();
    }

    /// What can't make a difference any more is dropped, so that worlds that differ in nothing else are one.
    fn forget_the_irrelevant(&mut self) {
        let record = self.record().clone();
        let restorable = self.budget.witness_restores > 0;
        let of_primary = self.primary.as_ref().and_then(Primary::asked);
        let by_backup = |nonce: Nonce| self.backup.as_ref().is_some_and(|backup| backup.awaits(nonce));
        let awaited = |nonce: Nonce| of_primary == Some(nonce) || by_backup(nonce);
        self.requests.retain(|request| match &request.ask {
            Ask::Change { term, .. } => *term >= record.term || awaited(request.nonce) || restorable,
            Ask::Read | Ask::Register => awaited(request.nonce),
        });
        self.to_primary.retain(|reply| of_primary == Some(reply.nonce));
        self.to_backup.retain(|reply| by_backup(reply.nonce));
        for connection in self.connections.values_mut() {
            if !connection.backup_up && connection.hello.is_none() {
                connection.control.clear();
                connection.checkpoints.clear();
            }
            if !connection.primary_up {
                connection.answers.clear();
            }
        }
        self.connections.retain(|_, connection| {
            connection.primary_up || connection.backup_up || connection.hello.is_some()
        });
    }
}
