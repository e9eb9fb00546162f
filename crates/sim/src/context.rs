//! What all parts of a run share: the clock, what happens next, the network, chance and the checkers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use bytes::Bytes;
use romulus_protocol::{GuestEvent, PrimaryOrder, Record};
use romulus_types::{Epoch, Session, Time, VmId};

use crate::checks::Checks;
use crate::mistake::Mistake;
use crate::network::Network;
use crate::plan::{Fault, Moment, Node, Plan, When};
use crate::random::Random;

/// For the replicator.
#[derive(Debug)]
pub(crate) enum PrimaryWork {
    Timer(Time),
    Control(Session, Bytes),
    End(Session),
    Reply(Bytes),
    Copy(Session, u64),
    CaptureBegins(Session, Epoch),
    CaptureEnds(Session, Epoch),
    Drained,
    Guest(GuestEvent),
    Order(PrimaryOrder),
}

/// For the agent.
#[derive(Debug)]
pub(crate) enum BackupWork {
    Timer(Time),
    Hello(Session, Bytes),
    Control(Session, Bytes),
    Data(Session, Bytes),
    End(Session),
    Reply(Bytes),
    StandbyTried(Session, Epoch),
    Surveyed(Session, Vec<Bytes>),
    Drained,
    Failover,
    /// Starts a guest from the commit, once more when a standby failed; so many tries are left.
    Activate(Session, u8),
}

/// Something that happens. Work for a process carries the number of its life and dies with it.
#[derive(Debug)]
pub(crate) enum Event {
    Primary(u32, PrimaryWork),
    Backup(u32, BackupWork),
    Witness(Bytes),
    GuestRuns,
    SurvivorRuns,
    Fault(Fault),
    BackupCrashesAtLast(u32, u64),
    Restart(Node),
    GuestResumes,
    Heal,
}

impl Event {
    /// The process that has to do it, if it is for one.
    pub(crate) fn node(&self) -> Option<Node> {
        match self {
            Self::Primary(..) => Some(Node::Primary),
            Self::Backup(..) => Some(Node::Backup),
            Self::Witness(_) => Some(Node::Witness),
            _ => None,
        }
    }
}

struct Queued {
    at: Time,
    order: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// The shared part of a run.
pub(crate) struct Context {
    pub(crate) vm: VmId,
    pub(crate) now: Time,
    queue: BinaryHeap<Reverse<Queued>>,
    order: u64,
    /// The order of the event that came last.
    popped: u64,
    pub(crate) random: Random,
    pub(crate) plan: Plan,
    pub(crate) network: Network,
    pub(crate) checks: Checks,
    pub(crate) mistake: Option<Mistake>,
    /// The witness's record as it is: for the checkers alone.
    pub(crate) record: Option<Record>,
    pub(crate) flip_next: bool,
    aimed: Vec<(Moment, u64, u64, Fault)>,
    trace: Option<Vec<String>>,
}

impl Context {
    pub(crate) fn new(
        vm: VmId,
        seed: u64,
        keep: impl Fn(&Fault, &mut Random) -> bool,
        mistake: Option<Mistake>,
        tracing: bool,
    ) -> Self {
        let mut random = Random::new(seed);
        let mut plan = Plan::from_seed(&mut random);
        plan.faults.retain(|(_, fault)| keep(fault, &mut random));
        let network = Network::new(&plan, random.fork());
        let mut context = Self {
            vm,
            now: Time::from_ns(1),
            queue: BinaryHeap::new(),
            order: 0,
            popped: 0,
            random,
            plan,
            network,
            checks: Checks::default(),
            mistake,
            record: None,
            flip_next: false,
            aimed: Vec::new(),
            trace: tracing.then(Vec::new),
        };
        for (when, fault) in context.plan.faults.clone() {
            match when {
                When::At(ns) => context.at(Time::from_ns(ns), Event::Fault(fault)),
                When::After {
                    moment,
                    nth,
                    delay_ns,
                } => context.aimed.push((moment, nth, delay_ns, fault)),
            }
        }
        context
    }

    pub(crate) fn at(&mut self, at: Time, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Queued {
            at: at.max(self.now),
            order: self.order,
            event,
        }));
    }

    pub(crate) fn after(&mut self, ns: u64, event: Event) {
        self.at(self.now.after_ns(ns), event);
    }

    /// When the next event is.
    pub(crate) fn next_at(&self) -> Option<Time> {
        self.queue.peek().map(|Reverse(queued)| queued.at)
    }

    /// The next event; the clock moves to it.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let Reverse(queued) = self.queue.pop()?;
        self.now = queued.at;
        self.popped = queued.order;
        Some(queued.event)
    }

    /// The event that came last is to happen later, at its old place among others of that time: one that waits twice must not be
    /// overtaken by one that waits once.
    pub(crate) fn postpone(&mut self, at: Time, event: Event) {
        let order = self.popped;
        self.queue.push(Reverse(Queued { at, order, event }));
    }

    /// A step of the pair's life at which faults may be aimed.
    pub(crate) fn moment(&mut self, moment: Moment) {
        let now = self.now;
        let mut due = Vec::new();
        self.aimed.retain_mut(|(aimed, nth, delay_ns, fault)| {
            if *aimed != moment {
                return true;
            }
            *nth -= 1;
            if *nth == 0 {
                due.push((now.after_ns(*delay_ns), *fault));
            }
            *nth > 0
        });
        for (at, fault) in due {
            self.at(at, Event::Fault(fault));
        }
    }

    /// No more faults.
    pub(crate) fn disarm(&mut self) {
        self.aimed.clear();
    }

    pub(crate) fn is_planted(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    pub(crate) fn tell(&mut self, who: &str, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let us = self.now.ns / 1000;
            trace.push(format!("{:>5}.{:03} {who:<8} {}", us / 1000, us % 1000, what()));
        }
    }

    pub(crate) fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }

    /// What arrives of a frame: all of it, but a planned fault may flip a bit.
    pub(crate) fn carry(&mut self, bytes: Bytes) -> Bytes {
        if !std::mem::take(&mut self.flip_next) {
            return bytes;
        }
        let mut spoilt = bytes.to_vec();
        let position = usize::try_from(self.random.within(0, spoilt.len() as u64)).expect("below a length");
        spoilt[position] ^= 1 << self.random.within(0, 8);
        self.checks.spoilt = true;
        Bytes::from(spoilt)
    }
}
