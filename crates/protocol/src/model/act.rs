//! What can happen next in the model.

use romulus_types::{Session, WitnessInstance};
use stateright::{Model, Property};

use super::world::{BASE, Guest, LIE, Scenario, ToPrimary, World, host, vm};
use crate::{
    BackupEvent, GuestEvent, Mode, Primary, PrimaryEvent, PrimaryOrder, Record, Witness, WitnessReply,
    WitnessRequest,
};

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Act {
    WitnessGets(WitnessRequest),
    PrimaryGetsReply(WitnessReply),
    BackupGetsReply(WitnessReply),
    BackupGetsHello(Session),
    BackupGetsMessage(Session),
    BackupGetsCheckpoint(Session),
    PrimaryGetsMessage(Session),
    PrimarySeesEnd(Session),
    BackupSeesEnd(Session),
    PrimaryTimesOut,
    BackupTimesOut,
    Capture,
    PrimaryCrashes,
    PrimaryRestarts,
    BackupCrashes,
    BackupRestarts,
    PrimaryHostCrashes,
    WitnessRestored(usize),
    Order(PrimaryOrder),
    Guest(GuestEvent),
    BackupGetsLie { ahead: bool },
}

impl Model for Scenario {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        let mut world = World::new(self);
        world.settle();
        vec![world]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        if world.violation.is_some() {
            return;
        }
        acts.extend(world.requests.iter().cloned().map(Act::WitnessGets));
        acts.extend(world.to_primary.iter().cloned().map(Act::PrimaryGetsReply));
        acts.extend(world.to_backup.iter().cloned().map(Act::BackupGetsReply));
        world.list_connection_acts(acts);
        world.list_primary_acts(acts);
        world.list_backup_acts(acts);
        if world.budget.witness_restores > 0 {
            acts.extend((0..world.older_records.len()).map(Act::WitnessRestored));
        }
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let mut next = world.clone();
        next.perform(act);
        next.settle();
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![Property::always("no invariant is broken", |_, world: &World| {
            world.violation.is_none()
        })];
        if self.weakness.is_none() {
            properties.extend(self.reached());
        }
        properties
    }
}

impl Scenario {
    /// What the budget makes possible must happen somewhere: the model is not empty.
    fn reached(&self) -> Vec<Property<Self>> {
        let mut reached = vec![
            Property::sometimes("paired", |_, world: &World| {
                matches!(world.record().mode, Mode::Paired { .. })
            }),
            Property::sometimes("the backup took over", |_, world: &World| {
                world.active_covers.is_some()
            }),
            Property::sometimes("released while paired", |_, world: &World| {
                !world.gate_open && world.seen > 2
            }),
        ];
        if self.budget.captures > 3 {
            reached.push(Property::sometimes(
                "an answer came after the takeover",
                |_, world: &World| world.late_answer,
            ));
        }
        if self.budget.sessions > 1 {
            reached.push(Property::sometimes(
                "alone again after paired",
                |_, world: &World| {
                    world.gate_open
                        && world.record().mode == Mode::Alone { host: host("p") }
                        && world.was_paired
                },
            ));
        }
        reached
    }
}

impl World {
    fn list_connection_acts(&self, acts: &mut Vec<Act>) {
        for (session, connection) in &self.connections {
            let session = *session;
            if connection.hello.is_some() && self.backup.is_some() {
                acts.push(Act::BackupGetsHello(session));
            }
            if connection.backup_up {
                if !connection.control.is_empty() {
                    acts.push(Act::BackupGetsMessage(session));
                }
                if !connection.checkpoints.is_empty() {
                    acts.push(Act::BackupGetsCheckpoint(session));
                }
                acts.push(Act::BackupSeesEnd(session));
            }
            if connection.primary_up {
                if !connection.answers.is_empty() {
                    acts.push(Act::PrimaryGetsMessage(session));
                }
                acts.push(Act::PrimarySeesEnd(session));
            }
        }
    }

    fn list_primary_acts(&self, acts: &mut Vec<Act>) {
        let budget = &self.budget;
        let Some(primary) = &self.primary else {
            if self.guest != Guest::Gone {
                acts.push(Act::PrimaryRestarts);
            }
            return;
        };
        if budget.primary_host_crashes > 0 && self.guest != Guest::Gone {
            acts.push(Act::PrimaryHostCrashes);
        }
        if primary.is_finished() {
            return;
        }
        let reconnects = primary.session().is_none() && primary.is_settled();
        if primary.poll_timeout().is_some_and(|at| at.ns < u64::MAX / 2)
            && !(reconnects && budget.sessions == 0)
        {
            acts.push(Act::PrimaryTimesOut);
        }
        if primary.outstanding().is_some() && budget.captures > 0 && self.guest == Guest::Running {
            acts.push(Act::Capture);
        }
        let once = [
            (budget.primary_crashes, Act::PrimaryCrashes),
            (budget.unprotects, Act::Order(PrimaryOrder::Unprotect)),
            (budget.hand_overs, Act::Order(PrimaryOrder::HandOver)),
            (budget.guest_changes, Act::Guest(GuestEvent::Changed)),
            (budget.power_offs, Act::Guest(GuestEvent::PoweredOff)),
            (budget.guest_losses, Act::Guest(GuestEvent::Lost)),
        ];
        acts.extend(once.into_iter().filter(|(left, _)| *left > 0).map(|(_, act)| act));
    }

    fn list_backup_acts(&self, acts: &mut Vec<Act>) {
        match &self.backup {
            None => acts.push(Act::BackupRestarts),
            Some(backup) => {
                if backup.poll_timeout().is_some() {
                    acts.push(Act::BackupTimesOut);
                }
                if self.budget.backup_crashes > 0 {
                    acts.push(Act::BackupCrashes);
                }
                if self.budget.lies > 0 {
                    acts.push(Act::BackupGetsLie { ahead: false });
                }
                if self.budget.lies_ahead > 0 {
                    acts.push(Act::BackupGetsLie { ahead: true });
                }
            }
        }
    }

    fn perform(&mut self, act: Act) {
        match act {
            Act::WitnessGets(request) => self.ask_witness(&request),
            Act::PrimaryGetsReply(reply) => {
                self.to_primary.remove(&reply);
                self.run_primary(0, Some(PrimaryEvent::Witness(reply)));
            }
            Act::BackupGetsReply(reply) => {
                self.to_backup.remove(&reply);
                self.run_backup(0, Some(BackupEvent::Witness(reply)));
            }
            Act::BackupGetsHello(session) => {
                let connection = self.connections.get_mut(&session).expect("listed");
                let (term, instance) = connection.hello.take().expect("listed");
                connection.backup_up = true;
                let primary = host("p");
                self.run_backup(
                    0,
                    Some(BackupEvent::Hello {
                        session,
                        primary,
                        term,
                        instance,
                    }),
                );
            }
            Act::BackupGetsMessage(session) => {
                let connection = self.connections.get_mut(&session).expect("listed");
                let message = connection.control.pop_front().expect("listed");
                self.run_backup(0, Some(BackupEvent::Peer(session, message)));
            }
            Act::BackupGetsCheckpoint(session) => {
                let connection = self.connections.get_mut(&session).expect("listed");
                let epoch = connection.checkpoints.pop_front().expect("listed");
                self.verify(session, epoch);
            }
            Act::PrimaryGetsMessage(session) => self.primary_gets_message(session),
            Act::PrimarySeesEnd(session) => {
                self.connections.get_mut(&session).expect("listed").primary_up = false;
                self.run_primary(0, Some(PrimaryEvent::Disconnected(session)));
            }
            Act::BackupSeesEnd(session) => {
                self.connections.get_mut(&session).expect("listed").backup_up = false;
                self.run_backup(0, Some(BackupEvent::Disconnected(session)));
            }
            Act::PrimaryTimesOut => {
                let at = self
                    .primary
                    .as_ref()
                    .and_then(Primary::poll_timeout)
                    .expect("listed");
                self.run_primary(at.since_ns(BASE), None);
            }
            Act::BackupTimesOut => {
                let at = self
                    .backup
                    .as_ref()
                    .and_then(crate::Backup::poll_timeout)
                    .expect("listed");
                self.run_backup(at.since_ns(BASE), None);
            }
            Act::BackupGetsLie { ahead } => self.lie(ahead),
            Act::Capture => self.capture(),
            Act::Order(order) => {
                match order {
                    PrimaryOrder::Unprotect => self.budget.unprotects -= 1,
                    PrimaryOrder::HandOver => self.budget.hand_overs -= 1,
                }
                self.run_primary(0, Some(PrimaryEvent::Order(order)));
            }
            Act::Guest(event) => self.guest_does(event),
            crash => self.crash_or_restart(&crash),
        }
    }

    /// A host with a certificate says that the VM is its own.
    fn lie(&mut self, ahead: bool) {
        let record = self.record();
        let (instance, mut term) = (record.instance, record.term);
        if ahead {
            self.budget.lies_ahead -= 1;
            term = term.next();
        } else {
            self.budget.lies -= 1;
        }
        self.run_backup(
            0,
            Some(BackupEvent::Hello {
                session: LIE,
                primary: host("liar"),
                term,
                instance,
            }),
        );
    }

    fn crash_or_restart(&mut self, act: &Act) {
        match act {
            Act::PrimaryCrashes => {
                self.budget.primary_crashes -= 1;
                self.end_primary();
            }
            Act::PrimaryHostCrashes => {
                self.budget.primary_host_crashes -= 1;
                self.guest = Guest::Gone;
                self.end_primary();
            }
            Act::PrimaryRestarts => self.start_primary(),
            Act::BackupCrashes => {
                self.budget.backup_crashes -= 1;
                self.backup = None;
                self.connections
                    .values_mut()
                    .for_each(|connection| connection.backup_up = false);
            }
            Act::BackupRestarts => self.start_backup(),
            Act::WitnessRestored(position) => self.restore_witness(*position),
            other => unreachable!("{other:?} is no crash"),
        }
    }

    fn end_primary(&mut self) {
        self.primary = None;
        self.connections
            .values_mut()
            .for_each(|connection| connection.primary_up = false);
    }

    fn guest_does(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Changed => self.budget.guest_changes -= 1,
            GuestEvent::PoweredOff => {
                self.budget.power_offs -= 1;
                self.guest = Guest::Gone;
            }
            GuestEvent::Lost => {
                self.budget.guest_losses -= 1;
                self.guest = Guest::Gone;
            }
            GuestEvent::Paused | GuestEvent::Resumed => {}
        }
        self.run_primary(0, Some(PrimaryEvent::Guest(event)));
    }

    fn primary_gets_message(&mut self, session: Session) {
        let connection = self.connections.get_mut(&session).expect("listed");
        let event = match connection.answers.pop_front().expect("listed") {
            ToPrimary::Accepted => PrimaryEvent::Connected(session),
            ToPrimary::Refused => {
                connection.primary_up = false;
                PrimaryEvent::Disconnected(session)
            }
            ToPrimary::Message(message) => PrimaryEvent::Peer(session, message),
        };
        self.run_primary(0, Some(event));
    }

    fn ask_witness(&mut self, request: &WitnessRequest) {
        let before = self.record().clone();
        let (reply, changed) = self.witness.handle(request);
        if changed.is_some() {
            self.was_paired |= matches!(before.mode, Mode::Paired { .. });
            if self.budget.witness_restores > 0 {
                self.older_records.push(before);
            }
        }
        if request.host == host("p") {
            self.to_primary.insert(reply);
        } else {
            self.to_backup.insert(reply);
        }
    }

    /// The store comes back from a copy. By the rules of the witness it is a new instance.
    fn restore_witness(&mut self, position: usize) {
        self.budget.witness_restores -= 1;
        let old: Record = self.older_records[position].clone();
        let mut witness = Witness::new(WitnessInstance(2));
        if let Some(weakness) = self.weakness {
            witness = witness.weakened(weakness);
        }
        witness.load(vm(), old);
        self.witness = witness;
    }
}
