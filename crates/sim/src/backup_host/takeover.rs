//! The guest that the backup's host starts from a commit.

use romulus_types::Session;

use super::BackupHost;
use crate::context::{BackupWork, Context, Event};
use crate::mistake::Mistake;
use crate::plan::{MS, Moment};

/// Standbys that are started when one fails before it has read everything.
pub(super) const ACTIVATION_RETRIES_MAX: u8 = 3;

impl BackupHost {
    /// The activated guest runs a little.
    pub(crate) fn survivor_step(&mut self, context: &mut Context) {
        let Some(memory) = &mut self.survivor else { return };
        let output = memory.run(&mut context.random, |_| {});
        let record = context.record.clone();
        context.checks.left_backup(context.now, record.as_ref(), output);
        let pause_ns = context.random.within(MS, 3 * MS);
        context.after(pause_ns, Event::SurvivorRuns);
    }

    /// Marks the image and starts the guest, which is a process of its own: it does not die with the agent. A standby that
    /// fails before it has read everything leaves the image as it was, and another one is started.
    pub(super) fn activate(&mut self, context: &mut Context, session: Session, tries_left: u8) {
        self.takeover_asked = false;
        let fails = context.random.chance(context.plan.activation_fails_permille);
        if fails && !context.is_planted(Mistake::RetryAfterTheEnd) {
            if tries_left == 0 {
                // The operator's part: the agent is started again.
                return self.crash(context);
            }
            context.tell("backup", || {
                "a standby fails before it has read everything".to_owned()
            });
            let again_ns = context.random.within(MS, 20 * MS);
            let again = BackupWork::Activate(session, tries_left - 1);
            context.after(again_ns, Event::Backup(self.life, again));
            return context.moment(Moment::ActivationFails);
        }
        let status = self.store.status();
        if let Some(image) = self.store.image() {
            let _ = image.apply();
        }
        let memory = self.store.memory();
        context.checks.activated(status, session, memory.as_ref());
        self.store.mark_consumed();
        self.survivor = memory;
        context.after(MS, Event::SurvivorRuns);
        if fails && tries_left > 0 {
            let again = BackupWork::Activate(session, tries_left - 1);
            context.after(MS, Event::Backup(self.life, again));
        }
    }
}
