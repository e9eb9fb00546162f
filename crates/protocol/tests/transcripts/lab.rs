//! Primary, backup and witness in memory, with a clock of milliseconds and links that can be cut.

use std::collections::{BTreeSet, VecDeque};

use romulus_protocol::{
    Backup, BackupCommand, BackupConfig, BackupEvent, BackupMessage, BackupOrder, GuestEvent, ImageStatus,
    Primary, PrimaryCommand, PrimaryConfig, PrimaryEvent, PrimaryMessage, PrimaryOrder, Remembered, Witness,
    WitnessReply, WitnessRequest,
};
use romulus_types::{Epoch, HostId, Session, Term, Time, VmId, WitnessInstance};

use crate::tell::Names;

const MS: u64 = 1_000_000;

enum Parcel {
    Hello(Session, Term, WitnessInstance),
    Accepted(Session),
    Refused(Session),
    ToBackup(Session, PrimaryMessage),
    Checkpoint(Session, Epoch, Time),
    ToPrimary(Session, BackupMessage),
    Ask(WitnessRequest),
    Reply(WitnessReply),
}

pub(crate) struct Lab {
    now_ms: u64,
    names: Names,
    trace: Vec<String>,
    witness: Witness,
    primary: Option<Primary>,
    primary_disk: Option<Remembered>,
    backup: Option<Backup>,
    backup_disk: Option<Remembered>,
    image: ImageStatus,
    register: bool,
    quiet: bool,
    lives: u128,
    cut: BTreeSet<String>,
    parcels: VecDeque<(u64, Parcel)>,
    captures: Vec<(u64, Session, Epoch, Time)>,
    /// The guest is idle: captures are made so much later than they were asked for.
    idle_ms: u64,
    standby_fails: bool,
    /// Every capture is told, not only those that do something else as well.
    captures_told: bool,
    /// So is every heartbeat.
    heartbeats_told: bool,
    stalled_until_ms: u64,
    late: VecDeque<PrimaryEvent>,
    released: Epoch,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self {
            now_ms: 0,
            names: Names::default(),
            trace: Vec::new(),
            witness: Witness::new(WitnessInstance(1)),
            primary: None,
            primary_disk: None,
            backup: None,
            backup_disk: None,
            image: ImageStatus::Unusable,
            register: true,
            quiet: false,
            lives: 0,
            cut: BTreeSet::new(),
            parcels: VecDeque::new(),
            captures: Vec::new(),
            idle_ms: 0,
            standby_fails: false,
            captures_told: false,
            heartbeats_told: false,
            stalled_until_ms: 0,
            late: VecDeque::new(),
            released: Epoch::NONE,
        }
    }

    pub(crate) fn take_trace(&mut self) -> Vec<String> {
        std::mem::take(&mut self.trace)
    }

    /// The words of the transcripts.
    pub(crate) fn obey(&mut self, line: &str) {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["start", "primary"] => self.start_primary(),
            ["start", "backup"] => self.start_backup(),
            // A first start to the end, not told.
            ["paired"] => {
                self.start_backup();
                self.start_primary();
                (0..200).for_each(|_| self.tick());
                self.trace.clear();
            }
            // Repeated questions to the witness are not told.
            ["quiet"] => self.quiet = true,
            ["registered"] => self.register = true,
            ["unregistered"] => self.register = false,
            ["crash", "primary"] => {
                self.primary = None;
                self.captures.clear();
            }
            ["crash", "backup"] => self.backup = None,
            ["run", time] => {
                let ms: u64 = time.trim_end_matches("ms").parse().expect("milliseconds");
                (0..ms).for_each(|_| self.tick());
            }
            ["stall", "primary", time] => {
                let ms: u64 = time.trim_end_matches("ms").parse().expect("milliseconds");
                self.stalled_until_ms = self.now_ms + ms;
            }
            // Lines are `link`, `primary-witness` and `backup-witness`.
            ["delay", time] => {
                let ms: u64 = time.trim_end_matches("ms").parse().expect("milliseconds");
                self.delay(ms);
            }
            ["cut", line] => {
                self.cut.insert((*line).to_owned());
            }
            ["heal", line] => {
                self.cut.remove(*line);
            }
            ["disconnect"] => self.disconnect(),
            ["restore", "witness"] => self.witness = self.restored_witness(),
            ["standby", "fails"] => self.standby_fails = true,
            ["standby", "loads"] => self.standby_fails = false,
            ["order", "unprotect"] => self.tell_primary(PrimaryEvent::Order(PrimaryOrder::Unprotect)),
            ["order", "hand-over"] => self.tell_primary(PrimaryEvent::Order(PrimaryOrder::HandOver)),
            ["order", "failover"] => self.tell_backup(BackupEvent::Order(BackupOrder::Failover)),
            ["order", "force"] => self.force(false),
            ["order", "force", "fenced"] => self.force(true),
            // A host that the record does not name says hello, so many terms ahead of the record.
            ["lie", ahead] => self.lie(ahead.parse().expect("a number of terms")),
            ["heartbeats", "told"] => self.heartbeats_told = true,
            ["idle", time] => self.idle_ms = time.trim_end_matches("ms").parse().expect("milliseconds"),
            ["epochs", "told"] => self.captures_told = true,
            ["epochs", time] => {
                let ms: u64 = time.trim_end_matches("ms").parse().expect("milliseconds");
                self.tell_primary(PrimaryEvent::EpochLength(ms * 1_000_000));
            }
            ["guest", what] => self.tell_primary(PrimaryEvent::Guest(guest_event(what))),
            ["status"] => self.status(),
            _ => panic!("not a command: {line}"),
        }
    }

    fn force(&mut self, fenced: bool) {
        self.tell_backup(BackupEvent::Order(BackupOrder::ForceFailover { fenced }));
    }

    fn lie(&mut self, ahead: u64) {
        let record = self.witness.records().next().map(|(_, record)| record.clone());
        let record = record.expect("there is a record to lie about");
        self.lives += 1;
        self.tell_backup(BackupEvent::Hello {
            session: Session(self.lives),
            primary: HostId::new("liar").expect("a name"),
            term: Term(record.term.0 + ahead),
            instance: record.instance,
        });
    }

    fn start_primary(&mut self) {
        self.lives += 1;
        let config = PrimaryConfig {
            vm: VmId::new("vm").expect("a name"),
            host: HostId::new("p").expect("a name"),
            backup: HostId::new("b").expect("a name"),
            register: self.register,
            epoch_ns: 25 * MS,
            heartbeat_interval_ns: 30 * MS,
            suspicion_ns: 100 * MS,
            release_age_ns_max: 150 * MS,
            retry_ns: 200 * MS,
            epochs_in_flight_max: 4,
            hold_ns_max: 1000 * MS,
            mute_ns_max: 5000 * MS,
        };
        self.primary = Some(Primary::new(
            config,
            self.primary_disk.clone(),
            self.lives,
            self.now(),
        ));
        self.carry_out_primary();
    }

    fn start_backup(&mut self) {
        self.lives += 1;
        let config = BackupConfig {
            vm: VmId::new("vm").expect("a name"),
            host: HostId::new("b").expect("a name"),
            suspicion_ns: 150 * MS,
            retry_ns: 200 * MS,
            mute_ns_max: 5000 * MS,
            hello_wait_ns: 1000 * MS,
        };
        self.backup = Some(Backup::new(
            config,
            self.backup_disk.clone(),
            self.image,
            self.lives,
            self.now(),
        ));
        self.carry_out_backup();
    }

    fn restored_witness(&self) -> Witness {
        let mut witness = Witness::new(WitnessInstance(self.witness.instance().0 + 1));
        for (vm, record) in self.witness.records() {
            witness.load(vm.clone(), record.clone());
        }
        witness
    }

    fn now(&self) -> Time {
        Time::from_ns(self.now_ms * MS)
    }

    fn say(&mut self, who: &str, what: &str) {
        if self.quiet && (what.starts_with("ask") || what.contains("is silent")) {
            return;
        }
        self.trace.push(format!("{:>6}ms {who:<8} {what}", self.now_ms));
    }

    fn status(&mut self) {
        let paired = self
            .witness
            .records()
            .next()
            .map_or("nothing".to_owned(), |(_, record)| {
                format!("term {}", record.term)
            });
        let primary = self
            .primary
            .as_ref()
            .map(|primary| format!("{:?}", primary.protection()));
        let backup = self
            .backup
            .as_ref()
            .map(|backup| format!("{:?}", backup.protection()));
        let flowing = self.released > Epoch::NONE;
        let line = format!(
            "primary {}, backup {}, witness {paired}, output {}",
            primary.unwrap_or("gone".to_owned()),
            backup.unwrap_or("gone".to_owned()),
            if flowing {
                "was released by epochs"
            } else {
                "was never released by epochs"
            }
        );
        self.say("status", &line);
    }

    /// One millisecond: what is under way arrives, then what is due fires.
    fn tick(&mut self) {
        self.now_ms += 1;
        let now_ms = self.now_ms;
        let (due, later) = std::mem::take(&mut self.parcels)
            .into_iter()
            .partition(|(at, _)| *at <= now_ms);
        self.parcels = later;
        for (_, parcel) in due {
            self.deliver(parcel);
        }
        if now_ms < self.stalled_until_ms {
            return;
        }
        while let Some(event) = self.late.pop_front() {
            self.tell_primary(event);
        }
        for (_, session, epoch, due_at) in self
            .captures
            .extract_if(.., |(at, ..)| *at <= now_ms)
            .collect::<Vec<_>>()
        {
            self.send("link", Parcel::Checkpoint(session, epoch, self.now()));
            self.tell_primary(PrimaryEvent::Captured(session, epoch, due_at));
        }
        let now = self.now();
        if self
            .primary
            .as_ref()
            .and_then(Primary::poll_timeout)
            .is_some_and(|at| at <= now)
        {
            self.primary.as_mut().expect("there").handle_timeout(now);
            self.carry_out_primary();
        }
        if self
            .backup
            .as_ref()
            .and_then(Backup::poll_timeout)
            .is_some_and(|at| at <= now)
        {
            self.backup.as_mut().expect("there").handle_timeout(now);
            self.carry_out_backup();
        }
    }

    fn send(&mut self, line: &str, parcel: Parcel) {
        if !self.cut.contains(line) {
            self.parcels.push_back((self.now_ms + 1, parcel));
        }
    }

    /// What is under way comes so much later; what is sent from now on overtakes it.
    fn delay(&mut self, ms: u64) {
        for (at, _) in &mut self.parcels {
            *at += ms;
        }
    }

    fn deliver(&mut self, parcel: Parcel) {
        match parcel {
            Parcel::Hello(session, term, instance) => {
                let primary = HostId::new("p").expect("a name");
                self.tell_backup(BackupEvent::Hello {
                    session,
                    primary,
                    term,
                    instance,
                });
            }
            Parcel::Accepted(session) => self.tell_primary(PrimaryEvent::Connected(session)),
            Parcel::Refused(session) => self.tell_primary(PrimaryEvent::Disconnected(session)),
            Parcel::ToBackup(session, message) => self.tell_backup(BackupEvent::Peer(session, message)),
            Parcel::Checkpoint(session, epoch, captured) => {
                if self
                    .backup
                    .as_ref()
                    .is_some_and(|backup| backup.session() == Some(session))
                {
                    self.image = ImageStatus::Committed { session, epoch };
                    self.tell_backup(BackupEvent::Verified(session, epoch, captured));
                }
            }
            Parcel::ToPrimary(session, message) => self.tell_primary(PrimaryEvent::Peer(session, message)),
            Parcel::Ask(request) => {
                let reply = self.witness.handle(&request).0;
                let line = if request.host.as_str() == "p" {
                    "primary-witness"
                } else {
                    "backup-witness"
                };
                self.send(line, Parcel::Reply(reply));
            }
            Parcel::Reply(reply) => {
                self.tell_primary(PrimaryEvent::Witness(reply.clone()));
                self.tell_backup(BackupEvent::Witness(reply));
            }
        }
    }

    fn disconnect(&mut self) {
        if let Some(session) = self.primary.as_ref().and_then(Primary::session) {
            self.tell_primary(PrimaryEvent::Disconnected(session));
        }
        if let Some(session) = self.backup.as_ref().and_then(Backup::session) {
            self.tell_backup(BackupEvent::Disconnected(session));
        }
    }

    fn tell_primary(&mut self, event: PrimaryEvent) {
        if self.now_ms < self.stalled_until_ms {
            self.late.push_back(event);
            return;
        }
        let now = self.now();
        if let Some(primary) = &mut self.primary {
            primary.handle(now, event);
            self.carry_out_primary();
        }
    }

    fn tell_backup(&mut self, event: BackupEvent) {
        let now = self.now();
        if let Some(backup) = &mut self.backup {
            backup.handle(now, event);
            self.carry_out_backup();
        }
    }

    fn carry_out_primary(&mut self) {
        while let Some(command) = self.primary.as_mut().and_then(Primary::poll_command) {
            if let Some(line) = self.names.primary(&command) {
                self.say("primary", &line);
            }
            match command {
                PrimaryCommand::Remember(known) => self.primary_disk = Some(known),
                PrimaryCommand::AskWitness(request) => self.send("primary-witness", Parcel::Ask(request)),
                PrimaryCommand::Connect {
                    session,
                    term,
                    instance,
                } => {
                    let reachable = self.backup.is_some() && !self.cut.contains("link");
                    let parcel = Parcel::Hello(session, term, instance);
                    self.send(
                        "link",
                        if reachable {
                            parcel
                        } else {
                            Parcel::Refused(session)
                        },
                    );
                    if self.cut.contains("link") {
                        self.parcels
                            .push_back((self.now_ms + 1, Parcel::Refused(session)));
                    }
                }
                PrimaryCommand::Disconnect(_) => self.captures.clear(),
                PrimaryCommand::Send(session, message) => {
                    if self.heartbeats_told && matches!(message, PrimaryMessage::Heartbeat { .. }) {
                        self.say("primary", "heartbeat");
                    }
                    self.send("link", Parcel::ToBackup(session, message));
                }
                PrimaryCommand::StartFirstCopy(session) => {
                    self.tell_primary(PrimaryEvent::FirstCopyDone(session))
                }
                PrimaryCommand::Capture {
                    session, epoch, at, ..
                } => {
                    if self.captures_told {
                        self.say("primary", &format!("capture {epoch} at {} ms", at.ns / MS));
                    }
                    let due_at = at.after_ns(self.idle_ms * MS);
                    let at_ms = due_at.ns.div_ceil(MS).max(self.now_ms + 1);
                    self.captures.push((at_ms, session, epoch, due_at));
                }
                PrimaryCommand::Release(epoch) => self.released = epoch,
                PrimaryCommand::DrainSockets => self.tell_primary(PrimaryEvent::Drained),
                PrimaryCommand::OpenGate
                | PrimaryCommand::StopGuest
                | PrimaryCommand::SuspendGuest
                | PrimaryCommand::ResumeGuest
                | PrimaryCommand::Report(_)
                | PrimaryCommand::Finish => {}
            }
        }
    }

    fn carry_out_backup(&mut self) {
        while let Some(command) = self.backup.as_mut().and_then(Backup::poll_command) {
            if let Some(line) = self.names.backup(&command) {
                self.say("backup", &line);
            }
            match command {
                BackupCommand::Remember(known) => self.backup_disk = Some(known),
                BackupCommand::AskWitness(request) => self.send("backup-witness", Parcel::Ask(request)),
                BackupCommand::MarkUnusable => self.image = ImageStatus::Unusable,
                BackupCommand::Accept(session) => self.send("link", Parcel::Accepted(session)),
                BackupCommand::Refuse(session, _) => self.send("link", Parcel::Refused(session)),
                BackupCommand::Send(session, message) => {
                    self.send("link", Parcel::ToPrimary(session, message))
                }
                BackupCommand::TryStandby(session, _) if self.standby_fails => {
                    self.tell_backup(BackupEvent::StandbyFailed(session));
                }
                BackupCommand::TryStandby(session, epoch) => {
                    self.tell_backup(BackupEvent::StandbyLoaded(session, epoch));
                }
                BackupCommand::Activate { .. } => {
                    self.image = ImageStatus::Consumed;
                    self.tell_backup(BackupEvent::Activated);
                }
                BackupCommand::DrainSockets => self.tell_backup(BackupEvent::Drained),
                BackupCommand::Disconnect(_) | BackupCommand::StopGuest | BackupCommand::Report(_) => {}
            }
        }
    }
}

fn guest_event(word: &str) -> GuestEvent {
    match word {
        "paused" => GuestEvent::Paused,
        "resumed" => GuestEvent::Resumed,
        "changed" => GuestEvent::Changed,
        "powered-off" => GuestEvent::PoweredOff,
        "lost" => GuestEvent::Lost,
        other => panic!("not a guest event: {other}"),
    }
}
