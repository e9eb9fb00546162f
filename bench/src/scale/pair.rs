//! One VM's primary: the real protocol machine, which says when to capture, with the real record machine behind it.
//!
//! What is simulated is a pair that works: memory is copied, the witness answers at once, and a standby has loaded the first
//! checkpoint as soon as it is committed. A machine that gives its backup up is told as such, and plays no part from then on.

use romulus_protocol::{
    BackupMessage, Notice, Primary, PrimaryCommand, PrimaryConfig, PrimaryEvent, PrimaryMessage, Witness,
};
use romulus_types::{Epoch, HostId, Session, Time, VmId, WitnessInstance};

/// As the replicator's defaults have it.
const HEARTBEAT_NS: u64 = 30_000_000;
const SUSPICION_NS: u64 = 150_000_000;
const RETRY_NS: u64 = 100_000_000;
const HOLD_NS_MAX: u64 = 10_000_000_000;
const MUTE_NS_MAX: u64 = 60_000_000_000;

/// What the machine wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// A capture, not before this.
    Capture { epoch: u64, at_ns: u64 },
    /// The backup is to answer this heartbeat.
    Heartbeat { sent_ns: u64 },
    /// Output up to this epoch leaves.
    Release { epoch: u64 },
    /// The backup was given up.
    GivenUp,
}

/// The machine of one VM.
pub(super) struct Pair {
    primary: Primary,
    witness: Witness,
    session: Session,
    proven: bool,
}

impl Pair {
    /// Begins a session at `now_ns`.
    pub(super) fn begin(
        number: u64,
        now_ns: u64,
        epoch_ns: u64,
        in_flight_max: u64,
        wishes: &mut Vec<Wish>,
    ) -> Self {
        let name = |text: &str| HostId::new(text).expect("a name");
        let config = PrimaryConfig {
            vm: VmId::new(format!("vm-{number}")).expect("a name"),
            host: name("primary"),
            backup: name("backup"),
            register: true,
            epoch_ns,
            heartbeat_interval_ns: HEARTBEAT_NS,
            // As the replicator has it: earlier than the backup.
            suspicion_ns: SUSPICION_NS / 4 * 3,
            release_age_ns_max: SUSPICION_NS,
            retry_ns: RETRY_NS,
            epochs_in_flight_max: in_flight_max,
            hold_ns_max: HOLD_NS_MAX,
            mute_ns_max: MUTE_NS_MAX,
        };
        let now = Time::from_ns(now_ns);
        let mut pair = Self {
            primary: Primary::new(config, None, u128::from(number) + 1, now),
            witness: Witness::new(WitnessInstance(1)),
            session: Session(0),
            proven: false,
        };
        pair.carry_out(now, wishes);
        pair
    }

    /// A capture was taken, and the guest runs again.
    pub(super) fn captured(&mut self, now_ns: u64, epoch: u64, wishes: &mut Vec<Wish>) {
        // As it was asked for: no guest is idle.
        let event = PrimaryEvent::Captured(self.session, Epoch(epoch), Time::default());
        self.handle(now_ns, event, wishes);
    }

    /// The backup said how far it is, in answer to the heartbeat that was sent at `answers_ns`.
    pub(super) fn answered(&mut self, now_ns: u64, committed: u64, answers_ns: u64, wishes: &mut Vec<Wish>) {
        let message = BackupMessage::Alive {
            committed: Epoch(committed),
            answers: Time::from_ns(answers_ns),
        };
        self.handle(now_ns, PrimaryEvent::Peer(self.session, message), wishes);
        if committed > 0 && !self.proven {
            self.proven = true;
            let loaded = BackupMessage::StandbyLoaded {
                epoch: Epoch(committed),
            };
            self.handle(now_ns, PrimaryEvent::Peer(self.session, loaded), wishes);
        }
    }

    /// Time has passed.
    pub(super) fn time(&mut self, now_ns: u64, wishes: &mut Vec<Wish>) {
        let now = Time::from_ns(now_ns);
        self.primary.handle_timeout(now);
        self.carry_out(now, wishes);
    }

    /// When [`Pair::time`] is to be called at the latest.
    pub(super) fn next_ns(&self) -> Option<u64> {
        self.primary.poll_timeout().map(|at| at.ns)
    }

    /// Whether output is held until it is committed.
    #[cfg(test)]
    fn is_protected(&self) -> bool {
        self.primary.protection() == romulus_protocol::Protection::Protected
    }

    fn handle(&mut self, now_ns: u64, event: PrimaryEvent, wishes: &mut Vec<Wish>) {
        let now = Time::from_ns(now_ns);
        self.primary.handle(now, event);
        self.carry_out(now, wishes);
    }

    fn carry_out(&mut self, now: Time, wishes: &mut Vec<Wish>) {
        while let Some(command) = self.primary.poll_command() {
            let answer = match command {
                PrimaryCommand::AskWitness(request) => {
                    let (reply, _) = self.witness.handle(&request);
                    Some(PrimaryEvent::Witness(reply))
                }
                PrimaryCommand::Connect { session, .. } => {
                    self.session = session;
                    Some(PrimaryEvent::Connected(session))
                }
                PrimaryCommand::StartFirstCopy(session) => Some(PrimaryEvent::FirstCopyDone(session)),
                PrimaryCommand::DrainSockets => Some(PrimaryEvent::Drained),
                PrimaryCommand::Capture { epoch, at, .. } => {
                    wishes.push(Wish::Capture {
                        epoch: epoch.0,
                        at_ns: at.ns,
                    });
                    None
                }
                PrimaryCommand::Send(_, PrimaryMessage::Heartbeat { sent }) => {
                    wishes.push(Wish::Heartbeat { sent_ns: sent.ns });
                    None
                }
                PrimaryCommand::Release(epoch) => {
                    wishes.push(Wish::Release { epoch: epoch.0 });
                    None
                }
                PrimaryCommand::Report(Notice::BadPeer(why)) => {
                    panic!("the simulated backup is wrong: {why}")
                }
                PrimaryCommand::Disconnect(_) => {
                    wishes.push(Wish::GivenUp);
                    return;
                }
                _ => None,
            };
            if let Some(event) = answer {
                self.primary.handle(now, event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH_NS: u64 = 25_000_000;

    #[test]
    fn a_pair_gets_protected_and_captures_at_the_pace_of_the_protocol() {
        let mut wishes = Vec::new();
        let mut pair = Pair::begin(1, 0, EPOCH_NS, 2, &mut wishes);
        // It connects at its first deadline, which is now.
        assert_eq!(pair.next_ns(), Some(0));
        pair.time(0, &mut wishes);
        assert!(
            wishes.contains(&Wish::Capture { epoch: 1, at_ns: 0 }),
            "{wishes:?}"
        );
        let mut epoch = 0;
        while !pair.is_protected() {
            epoch += 1;
            assert!(epoch < 6, "a pair is made within a few checkpoints");
            let now_ns = EPOCH_NS * epoch;
            wishes.clear();
            pair.captured(now_ns, epoch, &mut wishes);
            pair.answered(now_ns + 1, epoch, now_ns, &mut wishes);
            let next = Wish::Capture {
                epoch: epoch + 1,
                at_ns: EPOCH_NS * epoch,
            };
            assert!(wishes.contains(&next) || epoch > 1, "{wishes:?}");
        }
        wishes.clear();
        for more in 1..=2 {
            pair.captured(EPOCH_NS * (epoch + more), epoch + more, &mut wishes);
        }
        let captures = |wishes: &[Wish]| {
            let captures = wishes.iter().filter(|wish| matches!(wish, Wish::Capture { .. }));
            captures.count()
        };
        assert_eq!(captures(&wishes), 1, "two in flight: the epoch stretches");
        let now_ns = EPOCH_NS * (epoch + 2);
        pair.answered(now_ns + 5, epoch + 1, now_ns, &mut wishes);
        assert_eq!(captures(&wishes), 2, "and goes on with the answer");
        assert!(wishes.contains(&Wish::Release { epoch: epoch + 1 }), "{wishes:?}");
    }

    #[test]
    fn a_backup_that_says_nothing_is_given_up() {
        let mut wishes = Vec::new();
        let mut pair = Pair::begin(1, 0, EPOCH_NS, 2, &mut wishes);
        while !wishes.contains(&Wish::GivenUp) {
            let now_ns = pair.next_ns().unwrap();
            assert!(now_ns < MUTE_NS_MAX);
            pair.time(now_ns, &mut wishes);
        }
    }
}
