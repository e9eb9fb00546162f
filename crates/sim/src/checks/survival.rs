//! In the end, with everything healed and restarted, the VM runs where the record says, unless what it needs is gone.

use romulus_protocol::{ImageStatus, Mode, Record};
use romulus_types::Time;

use super::{Checks, Violation};
use crate::plan::MS;

/// Somebody has spoken within this time.
const LATELY_NS: u64 = 250 * MS;

/// How the parts are in the end.
pub(crate) struct Outlook<'a> {
    pub(crate) now: Time,
    pub(crate) record: Option<&'a Record>,
    /// The guest's process on the primary's host is there, and no operator has paused it.
    pub(crate) guest_there: bool,
    /// A replicator is there that wants to protect it.
    pub(crate) protecting: bool,
    /// It was protected at some time after everything was healed. A link that is too slow for the guest's writes may have
    /// ended that again.
    pub(crate) paired_since_heal: bool,
    pub(crate) survivor_runs: bool,
    pub(crate) image: ImageStatus,
    pub(crate) backup_host_lost: bool,
}

impl Checks {
    /// Looks at the end of a run.
    pub(crate) fn look_back(&mut self, outlook: &Outlook<'_>) {
        let Some(record) = outlook.record else { return };
        let spoke = self
            .last_output
            .is_some_and(|at| outlook.now.since_ns(at) < LATELY_NS);
        let lost = match &record.mode {
            Mode::Alone { host } if host.as_str() == "p" && outlook.guest_there => match spoke {
                false => Some("the primary is alone, and its guest does not speak"),
                true => (outlook.protecting && !outlook.paired_since_heal)
                    .then_some("the guest is not protected, though nothing stands in the way"),
            },
            Mode::Alone { host } if host.as_str() == "p" => None,
            Mode::Alone { .. } => (!outlook.survivor_runs && !outlook.backup_host_lost)
                .then_some("the backup was granted the record, and did not activate the guest"),
            Mode::Paired {
                session, first_epoch, ..
            } => {
                let could = matches!(outlook.image, ImageStatus::Committed { session: held, epoch }
                    if held == *session && epoch >= *first_epoch);
                if outlook.guest_there {
                    (!spoke).then_some("the primary is paired, and its guest does not speak")
                } else {
                    could.then_some("the guest is gone, and the backup did not take over")
                }
            }
            Mode::Ended => None,
        };
        if let Some(what) = lost {
            self.violate(Violation::VmLost(what));
        }
    }
}
