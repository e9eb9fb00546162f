//! What clients see: output commit, and one voice.

use romulus_protocol::{Mode, Record, Remembered};
use romulus_types::{Epoch, Session, Time};

use super::{Checks, Violation};
use crate::guest::{LOG_SLOTS, Output};

impl Checks {
    /// A frame left the primary's host. A client counts as having seen it.
    pub(crate) fn left_primary(&mut self, now: Time, record: Option<&Record>, output: Output) {
        match record.map(|record| &record.mode) {
            Some(Mode::Paired { session, .. }) => {
                if self
                    .covered
                    .get(session)
                    .is_none_or(|covered| *covered < output.counter)
                {
                    self.violate(Violation::OutputBeforeCommit {
                        counter: output.counter,
                    });
                }
            }
            Some(Mode::Alone { host }) if host.as_str() != "p" => {
                self.violate(Violation::PrimarySpokeInBackupsTerm);
            }
            Some(Mode::Alone { .. } | Mode::Ended) | None => {}
        }
        self.see(now, output);
    }

    /// A frame left the backup's host.
    pub(crate) fn left_backup(&mut self, now: Time, record: Option<&Record>, output: Output) {
        match record.map(|record| &record.mode) {
            Some(Mode::Alone { host }) if host.as_str() == "b" => {}
            _ => self.violate(Violation::BackupSpokeUngranted),
        }
        if let Some(seen) = self.seen.iter().find(|seen| seen.counter == output.counter) {
            let counter = seen.counter;
            self.violate(Violation::OutputLost { counter });
        }
        self.see(now, output);
    }

    fn see(&mut self, now: Time, output: Output) {
        self.reached.outputs += 1;
        self.last_output = Some(now);
        self.seen.push_back(output);
        if self.seen.len() as u64 > LOG_SLOTS / 2 {
            self.seen.pop_front();
        }
    }

    /// What clients have seen lately.
    pub(super) fn seen(&self) -> impl Iterator<Item = Output> {
        self.seen.iter().copied()
    }

    /// The backup sent an answer.
    pub(crate) fn said(&mut self, session: Session, committed: Epoch, takeover_asked: bool) {
        self.said.insert(session, committed);
        if takeover_asked {
            self.violate(Violation::AckWhileUnresolved);
        }
    }

    /// The backup accepted the session of a host that lied.
    pub(crate) fn liar_let_in(&mut self) {
        self.violate(Violation::LiarLetIn);
    }

    /// The backup remembers what it believes of the record.
    pub(crate) fn remembered(&mut self, record: Option<&Record>, remembered: &Remembered) {
        if record.is_none_or(|record| record.term < remembered.term) {
            self.violate(Violation::FalseTerm);
        }
    }

    /// The primary let an epoch leave.
    pub(crate) fn released(&mut self, session: Session, epoch: Epoch) {
        if self.said.get(&session).is_none_or(|said| *said < epoch) {
            self.violate(Violation::ReleaseBeforeAck { epoch });
        }
    }
}
