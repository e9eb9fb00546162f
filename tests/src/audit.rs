//! Output commit, judged from outside and by content: each frame that left the primary's host while its gate was closed was
//! sent by the guest before the barrier of an epoch that the backup had committed by then.
//!
//! ```text
//!   guest ── tap0 ──► gate ──► tap0 again ── bridge ──► the switch's port
//!            sent ▲                                 left ▲           (sniffers)
//!
//!   sent at s ─► first barrier after s: epoch e ─► commit of e at c ─► left at l      wanted: c ≤ l
//! ```
//!
//! Barriers are those that the replicator logs, commits those that the agent logs (`log.level = "info,epochs=debug"`). A frame
//! that was held is seen twice at the tap; one that got through the gate unheld is seen once, just before it left, and so
//! counts as sent then.

use std::collections::{BTreeMap, HashMap};

use crate::Stamp;
use crate::sniffer::Frame;
use crate::timeline::Event;

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Frames that left while a gate was closed.
    pub gated_frames: usize,
    /// Of these, frames whose epoch was not committed when they left, and frames that the guest never sent.
    pub uncommitted_frames: usize,
    /// The first of them: when the guest sent it, if it did, and when it left.
    pub first_uncommitted: Option<(Option<Stamp>, Stamp)>,
}

/// One session's epochs.
#[derive(Debug, Default)]
struct Session {
    /// When the gate closed, if it did.
    closed: Option<Stamp>,
    /// When it was opened again, if it was.
    opened: Option<Stamp>,
    /// Epochs by the times of their barriers.
    barriers: BTreeMap<Stamp, u64>,
    /// When an epoch was committed.
    commits: HashMap<u64, Stamp>,
}

impl Session {
    fn is_closed_at(&self, at: Stamp) -> bool {
        self.closed.is_some_and(|closed| closed <= at) && self.opened.is_none_or(|opened| at < opened)
    }

    /// Whether what was sent then was allowed to leave at `left`.
    fn allows(&self, sent: Stamp, left: Stamp) -> bool {
        if self.closed.is_some_and(|closed| sent < closed) {
            return true;
        }
        let epoch = self.barriers.range(sent..).next().map(|(_, epoch)| *epoch);
        let committed = epoch.and_then(|epoch| self.commits.get(&epoch));
        committed.is_some_and(|at| *at <= left)
    }
}

/// Judges all frames of a run.
#[must_use]
pub fn audit(sent: &[Frame], left: &[Frame], events: &[Event]) -> Audit {
    let sessions = sessions(events);
    let mut seen: HashMap<u64, Vec<Stamp>> = HashMap::new();
    for frame in sent {
        seen.entry(frame.hash).or_default().push(frame.at);
    }
    let mut audit = Audit::default();
    for frame in left {
        let sent_at = take_sent(seen.entry(frame.hash).or_default(), frame.at);
        let Some(session) = sessions.iter().find(|session| session.is_closed_at(frame.at)) else {
            continue;
        };
        audit.gated_frames += 1;
        if !sent_at.is_some_and(|sent| session.allows(sent, frame.at)) {
            audit.uncommitted_frames += 1;
            audit.first_uncommitted.get_or_insert((sent_at, frame.at));
        }
    }
    audit
}

/// Takes the two sightings of a frame that left out of those at the tap, and says when the guest sent it: at the earliest of
/// them. The latest one before it left is its way out of the gate.
fn take_sent(seen: &mut Vec<Stamp>, left: Stamp) -> Option<Stamp> {
    let way_out = seen.iter().rposition(|at| *at <= left)?;
    let out = seen.remove(way_out);
    if way_out == 0 {
        return Some(out);
    }
    Some(seen.remove(0))
}

/// When what an event tells of happened: a barrier may be logged much later, by a replicator that stood still meanwhile, after it has
/// opened the gate again.
fn happened(event: &Event) -> Stamp {
    let at = field(event, "at_us").and_then(|micros| micros.parse().ok());
    at.map_or(event.at, Stamp::from_micros)
}

fn sessions(events: &[Event]) -> Vec<Session> {
    let mut names: Vec<String> = Vec::new();
    let mut sessions: Vec<Session> = Vec::new();
    let mut in_order: Vec<(Stamp, &Event)> = events.iter().map(|event| (happened(event), event)).collect();
    in_order.sort_by_key(|(at, _)| *at);
    for (at, event) in in_order {
        if event.name == "gate_opens" {
            for session in &mut sessions {
                if session.closed.is_some() {
                    session.opened.get_or_insert(at);
                }
            }
            continue;
        }
        if !["barrier", "commit"].contains(&event.name.as_str()) {
            continue;
        }
        let (Some(name), Some(epoch)) = (field(event, "session"), field(event, "epoch")) else {
            continue;
        };
        let Ok(epoch) = epoch.parse() else { continue };
        let position = names.iter().position(|known| known == name).unwrap_or_else(|| {
            names.push(name.to_owned());
            sessions.push(Session::default());
            sessions.len() - 1
        });
        let session = &mut sessions[position];
        if event.name == "commit" {
            session.commits.insert(epoch, at);
            continue;
        }
        session.barriers.insert(at, epoch);
        if field(event, "closes") == Some("true") {
            session.closed = Some(at);
        }
    }
    sessions
}

fn field<'e>(event: &'e Event, name: &str) -> Option<&'e str> {
    event.detail.split(' ').find_map(|part| {
        let (key, value) = part.split_once('=')?;
        (key == name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sniffer::Kind;

    fn frames(list: &[(u64, u64)]) -> Vec<Frame> {
        let frame = |(at, hash): &(u64, u64)| Frame {
            at: Stamp::from_micros(*at),
            bytes: 60,
            kind: Kind::Guest,
            hash: *hash,
        };
        list.iter().map(frame).collect()
    }

    fn event(at: u64, name: &str, detail: &str) -> Event {
        Event {
            at: Stamp::from_micros(at),
            source: "test".to_owned(),
            vm: String::new(),
            name: name.to_owned(),
            detail: detail.to_owned(),
        }
    }

    /// The gate closes at 100; epochs end at 100, 200, 300; the first two are committed at 150 and 250.
    fn epochs() -> Vec<Event> {
        vec![
            event(104, "barrier", "session=a epoch=1 closes=true at_us=100"),
            event(150, "commit", "session=a epoch=1"),
            event(203, "barrier", "session=a epoch=2 closes=false at_us=200"),
            event(250, "commit", "session=a epoch=2"),
            event(303, "barrier", "session=a epoch=3 closes=false at_us=300"),
        ]
    }

    fn judged(sent: &[(u64, u64)], left: &[(u64, u64)]) -> (usize, usize) {
        let audit = audit(&frames(sent), &frames(left), &epochs());
        (audit.gated_frames, audit.uncommitted_frames)
    }

    #[test]
    fn a_frame_may_leave_once_the_epoch_in_which_it_was_sent_is_committed() {
        assert_eq!(judged(&[(120, 7), (260, 7)], &[(261, 7)]), (1, 0));
        assert_eq!(
            judged(&[(120, 7), (240, 7)], &[(241, 7)]),
            (1, 1),
            "before the commit"
        );
        assert_eq!(
            judged(&[(220, 7), (320, 7)], &[(321, 7)]),
            (1, 1),
            "of an epoch never committed"
        );
        assert_eq!(
            judged(&[(320, 7), (340, 7)], &[(341, 7)]),
            (1, 1),
            "after the last barrier"
        );
    }

    #[test]
    fn what_was_sent_before_the_gate_closed_or_left_before_is_free() {
        assert_eq!(judged(&[(50, 7)], &[(51, 7)]), (0, 0));
        assert_eq!(judged(&[(99, 7)], &[(101, 7)]), (1, 0));
        let mut opened = epochs();
        opened.push(event(400, "gate_opens", ""));
        let audit = audit(&frames(&[(350, 7)]), &frames(&[(410, 7)]), &opened);
        assert_eq!(audit, Audit::default());
    }

    #[test]
    fn a_gate_that_was_opened_before_its_closing_was_logged_is_open() {
        let late = vec![
            event(400, "gate_opens", ""),
            event(450, "barrier", "session=a epoch=1 closes=true at_us=100"),
        ];
        let judge = |left| audit(&frames(&[(350, 7)]), &frames(&[(left, 7)]), &late);
        assert_eq!(judge(410), Audit::default());
        assert_eq!(judge(390).uncommitted_frames, 1);
    }

    #[test]
    fn a_frame_that_got_around_the_gate_or_that_nobody_sent_is_found() {
        assert_eq!(
            judged(&[(120, 7)], &[(121, 7)]),
            (1, 1),
            "it went straight through"
        );
        assert_eq!(judged(&[], &[(260, 9)]), (1, 1), "the guest never sent it");
    }

    #[test]
    fn equal_frames_leave_in_the_order_in_which_they_were_sent() {
        // Two are held, both are seen again on their way out, the second before its commit.
        let sent = [(120, 7), (220, 7), (260, 7), (270, 7)];
        assert_eq!(judged(&sent, &[(261, 7), (271, 7)]), (2, 1));
    }
}
