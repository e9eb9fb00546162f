//! What the image holds: every checkpoint is the guest's memory at that moment, byte for byte, and outlives the agent.

use romulus_protocol::ImageStatus;
use romulus_types::{Epoch, Session};

use super::{Checks, Violation};
use crate::guest::Memory;

/// Checkpoints that are remembered for comparing.
const CHECKPOINTS_KEPT: usize = 32;

impl Checks {
    /// The guest stood still with this memory.
    pub(crate) fn captured(&mut self, session: Session, epoch: Epoch, memory: Memory) {
        self.checkpoints.insert((session, epoch), memory);
        while self.checkpoints.len() > CHECKPOINTS_KEPT {
            // Sessions are in no order: of the others the oldest goes first.
            let oldest = self.checkpoints.keys().find(|(of, _)| *of != session);
            let key = *oldest
                .or_else(|| self.checkpoints.keys().next())
                .expect("there are many");
            if Some(key) == self.committed {
                break;
            }
            self.checkpoints.remove(&key);
        }
    }

    /// The backup has made a checkpoint durable. `memory` is what its image now says.
    pub(crate) fn committed(&mut self, session: Session, epoch: Epoch, memory: Option<&Memory>) {
        self.reached.commits += 1;
        self.committed = Some((session, epoch));
        if let Some(memory) = memory {
            self.compare(session, epoch, memory);
        }
        if let Some(captured) = self.checkpoints.get(&(session, epoch)) {
            self.covered.insert(session, captured.counter());
        }
    }

    /// The image was marked, overwritten or lost with its host: nothing is promised any more.
    pub(crate) fn given_up(&mut self) {
        self.committed = None;
    }

    /// The agent was started again and found this.
    pub(crate) fn reopened(&mut self, status: ImageStatus, memory: Option<&Memory>) {
        let found = match status {
            ImageStatus::Consumed => return,
            ImageStatus::Unusable => None,
            ImageStatus::Committed { session, epoch } => Some((session, epoch)),
        };
        if let Some(committed) = self.committed
            && found.is_none_or(|found| found.0 != committed.0 || found.1 < committed.1)
        {
            self.violate(Violation::CommitLost { found, committed });
        }
        if let (Some((session, epoch)), Some(memory)) = (found, memory) {
            self.reached.reopened += 1;
            self.compare(session, epoch, memory);
            // Durable in the midst of the crash: nobody had heard of it yet.
            self.committed = Some((session, epoch));
            if let Some(captured) = self.checkpoints.get(&(session, epoch)) {
                self.covered.insert(session, captured.counter());
            }
        }
    }

    /// The guest is started at the backup from this memory.
    pub(crate) fn activated(&mut self, status: ImageStatus, asked: Session, memory: Option<&Memory>) {
        self.reached.took_over = true;
        if std::mem::replace(&mut self.activated, true) {
            self.violate(Violation::ActivatedTwice);
        }
        match (status, memory) {
            (ImageStatus::Committed { session, epoch }, Some(memory)) if session == asked => {
                self.compare(session, epoch, memory);
                let forgotten = self.seen().find(|output| !memory.remembers(*output));
                if let Some(output) = forgotten {
                    self.violate(Violation::OutputLost {
                        counter: output.counter,
                    });
                }
            }
            _ => self.violate(Violation::ActivatedWithoutCommit),
        }
    }

    /// A checkpoint can't be used.
    pub(crate) fn invalid(&mut self, epoch: Epoch, reason: String) {
        if !self.spoilt {
            self.violate(Violation::Invalid { epoch, reason });
        }
    }

    fn compare(&mut self, session: Session, epoch: Epoch, memory: &Memory) {
        let Some(captured) = self.checkpoints.get(&(session, epoch)) else {
            return;
        };
        if let Some(page) = captured.differs_from(memory) {
            self.violate(Violation::WrongMemory { page, epoch });
        }
    }
}
