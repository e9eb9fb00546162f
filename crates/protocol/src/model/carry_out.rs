//! What the drivers do with the machines' commands, in one step each.

use romulus_types::{Epoch, Session, Time};

use super::world::{BASE, Connection, Guest, LIE, ToPrimary, World, host};
use crate::{
    BackupCommand, BackupEvent, BackupMessage, ImageStatus, Mode, PrimaryCommand, PrimaryEvent,
    PrimaryMessage, Weakness, hand_over_nonce, takeover_nonce,
};

impl World {
    /// Hands an event, or a timeout when there is none, to the primary `elapsed_ns` after [`BASE`], and does what it says.
    pub(crate) fn run_primary(&mut self, elapsed_ns: u64, event: Option<PrimaryEvent>) {
        let now = BASE.after_ns(elapsed_ns);
        if let Some(primary) = &mut self.primary {
            match event {
                Some(event) => primary.handle(now, event),
                None => primary.handle_timeout(now),
            }
        }
        while let Some(command) = self.primary.as_mut().and_then(crate::Primary::poll_command) {
            self.do_for_primary(now, command);
        }
        if let Some(primary) = &mut self.primary {
            primary.normalise(elapsed_ns, BASE);
        }
    }

    fn do_for_primary(&mut self, now: Time, command: PrimaryCommand) {
        match command {
            PrimaryCommand::Remember(remembered) => self.primary_disk = Some(remembered),
            PrimaryCommand::AskWitness(request) => {
                self.requests.insert(request);
            }
            PrimaryCommand::Connect {
                session,
                term,
                instance,
            } => {
                self.budget.sessions -= 1;
                let connection = Connection {
                    hello: Some((term, instance)),
                    primary_up: true,
                    backup_up: false,
                    control: [].into(),
                    checkpoints: [].into(),
                    answers: [].into(),
                };
                self.connections.insert(session, connection);
            }
            PrimaryCommand::Disconnect(session) => {
                if let Some(connection) = self.connections.get_mut(&session) {
                    connection.primary_up = false;
                }
            }
            PrimaryCommand::Send(_, PrimaryMessage::Heartbeat { .. }) => {}
            PrimaryCommand::Send(session, message) => {
                if let Some(connection) = self.connections.get_mut(&session) {
                    connection.control.push_back(message);
                }
            }
            PrimaryCommand::StartFirstCopy(session) => {
                self.tell_primary(now, PrimaryEvent::FirstCopyDone(session))
            }
            // Carried out by an action of its own, any time later.
            PrimaryCommand::Capture { .. } => {}
            PrimaryCommand::Release(epoch) => self.release(epoch),
            PrimaryCommand::OpenGate => self.gate_open = true,
            PrimaryCommand::StopGuest | PrimaryCommand::SuspendGuest => {
                if self.guest == Guest::Running {
                    self.guest = Guest::Stopped;
                }
            }
            PrimaryCommand::ResumeGuest => {
                if self.guest == Guest::Stopped {
                    self.guest = Guest::Running;
                }
            }
            PrimaryCommand::DrainSockets => self.tell_primary(now, PrimaryEvent::Drained),
            PrimaryCommand::Report(_) => {}
            PrimaryCommand::Finish => {
                // The connection ends once what was queued is sent: its end at the backup comes when it comes.
                for connection in self.connections.values_mut() {
                    connection.primary_up = false;
                }
            }
        }
    }

    fn tell_primary(&mut self, now: Time, event: PrimaryEvent) {
        if let Some(primary) = &mut self.primary {
            primary.handle(now, event);
        }
    }

    fn release(&mut self, epoch: Epoch) {
        let session = self
            .primary
            .as_ref()
            .and_then(crate::Primary::session)
            .expect("released in a session");
        if self.durable.get(&session).is_none_or(|durable| *durable < epoch) {
            self.violate("released before the commit");
        }
        let covers = self.covers.get(&(session, epoch)).copied().unwrap_or(u8::MAX);
        self.late_answer |= self.active_covers.is_some();
        self.seen = self.seen.max(covers);
    }

    /// The driver makes the capture that the primary asked for.
    pub(crate) fn capture(&mut self) {
        let Some(primary) = &self.primary else { return };
        let session = primary.session().expect("captured in a session");
        let epoch = primary.captured().next();
        let outstanding = primary.outstanding().expect("asked for");
        self.budget.captures -= 1;
        self.covers.insert((session, epoch), self.interval);
        self.interval += 1;
        if outstanding.0 {
            self.gate_open = false;
        }
        if outstanding.1 {
            self.guest = Guest::Stopped;
        }
        if let Some(connection) = self.connections.get_mut(&session) {
            connection.checkpoints.push_back(epoch);
        }
        self.run_primary(0, Some(PrimaryEvent::Captured(session, epoch, BASE)));
    }

    /// As [`World::run_primary`], for the backup.
    pub(crate) fn run_backup(&mut self, elapsed_ns: u64, event: Option<BackupEvent>) {
        let now = BASE.after_ns(elapsed_ns);
        if let Some(backup) = &mut self.backup {
            match event {
                Some(event) => backup.handle(now, event),
                None => backup.handle_timeout(now),
            }
        }
        while let Some(command) = self.backup.as_mut().and_then(crate::Backup::poll_command) {
            self.do_for_backup(now, command);
        }
        if let Some(backup) = &mut self.backup {
            backup.normalise(elapsed_ns, BASE);
        }
    }

    fn do_for_backup(&mut self, now: Time, command: BackupCommand) {
        match command {
            BackupCommand::Remember(remembered) => self.backup_disk = Some(remembered),
            BackupCommand::AskWitness(request) => {
                let about_hello = self
                    .backup
                    .as_ref()
                    .is_some_and(|backup| backup.awaits_word(request.nonce));
                if about_hello && !self.budget.slow_words {
                    let reply = self.witness.handle(&request).0;
                    self.tell_backup(now, BackupEvent::Witness(reply));
                } else {
                    self.requests.insert(request);
                }
            }
            BackupCommand::MarkUnusable => self.mark_unusable(),
            BackupCommand::Accept(LIE) => self.violate("a host that the record does not name was let in"),
            BackupCommand::Accept(session) => {
                // The first page overwrites what was there.
                self.image_covers = 0;
                if let Some(connection) = self.connections.get_mut(&session) {
                    connection.answers.push_back(ToPrimary::Accepted);
                }
            }
            BackupCommand::Refuse(session, _) => {
                if let Some(connection) = self.connections.get_mut(&session) {
                    connection.backup_up = false;
                    connection.answers.push_back(ToPrimary::Refused);
                }
            }
            BackupCommand::Disconnect(session) => {
                if let Some(connection) = self.connections.get_mut(&session) {
                    connection.backup_up = false;
                }
            }
            BackupCommand::Send(session, message) => self.answer(session, message),
            BackupCommand::TryStandby(session, epoch) => {
                self.tell_backup(now, BackupEvent::StandbyLoaded(session, epoch));
            }
            BackupCommand::Activate { session, epoch, .. } => self.activate(session, epoch),
            BackupCommand::DrainSockets => self.tell_backup(now, BackupEvent::Drained),
            BackupCommand::StopGuest => {
                if self.record().mode == (Mode::Alone { host: host("b") }) {
                    self.violate("the guest that the record names was stopped");
                }
                self.active_covers = None;
            }
            BackupCommand::Report(_) => {}
        }
    }

    fn tell_backup(&mut self, now: Time, event: BackupEvent) {
        if let Some(backup) = &mut self.backup {
            backup.handle(now, event);
        }
    }

    fn answer(&mut self, session: Session, mut message: BackupMessage) {
        if let BackupMessage::Alive { answers, .. } = &mut message {
            *answers = BASE;
            if self.backup.as_ref().is_some_and(crate::Backup::is_past_return)
                && self.weakness != Some(Weakness::AckAfterTakeover)
            {
                self.violate("acknowledged with a takeover asked for");
            }
        }
        if let Some(connection) = self.connections.get_mut(&session)
            && connection.primary_up
        {
            connection.answers.push_back(ToPrimary::Message(message));
        }
    }

    fn mark_unusable(&mut self) {
        let record = self.record();
        if let (Mode::Alone { host }, ImageStatus::Committed { session, .. }) = (&record.mode, self.image)
            && host.as_str() == "b"
            && (record.nonce == takeover_nonce(session) || self.granted_by_any_nonce())
                | (record.nonce == hand_over_nonce(session))
        {
            self.violate("the commit that the guest is to go on from was thrown away");
        }
        self.image = ImageStatus::Unusable;
    }

    /// With the planted [`Weakness::NewNonceForEachTry`] the nonce does not tell what a grant was for.
    fn granted_by_any_nonce(&self) -> bool {
        self.weakness == Some(Weakness::NewNonceForEachTry)
    }

    fn activate(&mut self, session: Session, epoch: Epoch) {
        match self.image {
            ImageStatus::Committed {
                session: held,
                epoch: last,
            } if held == session && last >= epoch => {}
            _ => self.violate("activated without a commit, or from another one"),
        }
        if self.active_covers.is_some() {
            self.violate("activated twice");
        }
        self.active_covers = Some(self.image_covers);
        if self.weakness != Some(Weakness::ActivateTwice) {
            self.image = ImageStatus::Consumed;
        }
    }

    /// A checkpoint arrives complete: the image makes it durable, then the machine hears of it.
    pub(crate) fn verify(&mut self, session: Session, epoch: Epoch) {
        if self.image != ImageStatus::Consumed {
            self.image = ImageStatus::Committed { session, epoch };
            self.image_covers = self.covers[&(session, epoch)];
        }
        self.durable.insert(session, epoch);
        // All ages are forgotten.
        self.run_backup(0, Some(BackupEvent::Verified(session, epoch, BASE)));
    }
}
