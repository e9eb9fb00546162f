//! What happened in a fleet, and what was full.
//!
//! Keeps the books, too: at no time was more committed than had arrived, more arrived than was sent, more sent than captured.

use std::collections::VecDeque;

use super::shape::{Part, Shape};
use super::simulation::Used;
use crate::stats::float;

/// An epoch that begins later than this after it was due is late; as the replicator's status has it.
const LATE_NS: u64 = 2_000_000;
/// From so much of a part's time on, it is full: what comes at random waits for ever longer before it is all taken.
const FULL: f64 = 0.9;
/// What is at work all of the time does not keep up, even if what waits has not come back to the guests yet.
const ALWAYS: f64 = 0.995;
/// So many epochs must begin on time.
const ON_TIME_MIN: f64 = 0.95;

/// One VM's.
#[derive(Clone, Debug, Default)]
struct Member {
    /// When the last capture began.
    began_ns: Option<u64>,
    /// Captured and not yet known to be committed: epoch, pages, when the guest ran again.
    in_flight: VecDeque<(u64, u64, u64)>,
    /// When the last byte of a checkpoint came.
    arrived: VecDeque<(u64, u64)>,
    captured_pages: u64,
    sent_pages: u64,
    arrived_pages: u64,
    committed_pages: u64,
    /// Newest epoch that its primary knows to be committed, and newest whose output has left.
    answered: u64,
    released: u64,
}

/// Of a whole fleet.
#[derive(Debug)]
pub(super) struct Tally {
    members: Vec<Member>,
    epoch_ns: u64,
    watched: bool,
    begun: u64,
    on_time: u64,
    lags_ns: Vec<u64>,
    acks_ns: Vec<u64>,
    pages: u64,
    staged_pages: u64,
    staged_pages_max: u64,
    given_up: u64,
}

/// A part of the fleet that can be full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    HostLink,
    HostCores,
    Encoder,
    Sender,
    BackupLink,
    Connections,
    AgentCores,
    Store,
}

impl Place {
    /// For people.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::HostLink => "a host's link",
            Self::HostCores => "a host's cores",
            Self::Encoder => "a VM's encoder",
            Self::Sender => "a replicator's connection",
            Self::BackupLink => "the backup's link",
            Self::Connections => "the agent's thread for connections",
            Self::AgentCores => "the agent's cores",
            Self::Store => "a VM's thread at the agent",
        }
    }
}

/// How a fleet fared.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outcome {
    /// Epochs that began, and how many of them on time, as a part.
    pub(super) epochs: u64,
    pub(super) on_time: f64,
    /// From the resumed guest until its primary knows of the commit, and releases its output: sorted.
    pub(super) lags_ns: Vec<u64>,
    /// At the agent: from the last byte to the acknowledgement, sorted.
    pub(super) acks_ns: Vec<u64>,
    /// Pages that were committed.
    pub(super) pages: u64,
    pub(super) watched_ns: u64,
    /// How much of its time each place was at work: the busiest of its kind.
    pub(super) used: Vec<(Place, f64)>,
    /// The agents' threads together, and the one for connections alone.
    pub(super) agent_ns: u64,
    pub(super) connections_ns: u64,
    /// Most that was staged at all agents at the same time.
    pub(super) staged_pages_max: u64,
    /// VMs whose primary gave the backup up.
    pub(super) given_up: u64,
}

impl Tally {
    pub(super) fn new(vms: u64, epoch_ns: u64) -> Self {
        Self {
            members: (0..vms).map(|_| Member::default()).collect(),
            epoch_ns,
            watched: false,
            begun: 0,
            on_time: 0,
            lags_ns: Vec::new(),
            acks_ns: Vec::new(),
            pages: 0,
            staged_pages: 0,
            staged_pages_max: 0,
            given_up: 0,
        }
    }

    /// From now on it counts.
    pub(super) fn watch(&mut self) {
        self.watched = true;
        self.staged_pages_max = self.staged_pages;
    }

    pub(super) fn captured(&mut self, vm: usize, (began_ns, ended_ns): (u64, u64), epoch: u64, pages: u64) {
        let member = &mut self.members[vm];
        if let Some(last_ns) = member.began_ns.replace(began_ns).filter(|_| self.watched) {
            self.begun += 1;
            self.on_time += u64::from(began_ns - last_ns <= self.epoch_ns + LATE_NS);
        }
        let newest = member
            .in_flight
            .back()
            .map_or(member.answered, |(epoch, ..)| *epoch);
        assert!(epoch > newest, "epochs are captured in order");
        member.captured_pages += pages;
        member.in_flight.push_back((epoch, pages, ended_ns));
    }

    pub(super) fn sent(&mut self, vm: usize, pages: u64) {
        let member = &mut self.members[vm];
        member.sent_pages += pages;
        assert!(
            member.sent_pages <= member.captured_pages,
            "what is sent was captured"
        );
    }

    /// All of a part is at the agent.
    pub(super) fn arrived(&mut self, vm: usize, now_ns: u64, part: Part) {
        let member = &mut self.members[vm];
        member.arrived_pages += part.pages;
        assert!(member.arrived_pages <= member.sent_pages, "what arrives was sent");
        if part.last {
            member.arrived.push_back((part.epoch, now_ns));
        }
    }

    pub(super) fn staged(&mut self, pages: u64) {
        self.staged_pages += pages;
        self.staged_pages_max = self.staged_pages_max.max(self.staged_pages);
    }

    pub(super) fn applied(&mut self, pages: u64) {
        assert!(pages <= self.staged_pages, "what is applied was staged");
        self.staged_pages -= pages;
    }

    pub(super) fn committed(&mut self, vm: usize, now_ns: u64, epoch: u64, pages: u64) {
        let member = &mut self.members[vm];
        member.committed_pages += pages;
        assert!(
            member.committed_pages <= member.arrived_pages,
            "what is committed has arrived"
        );
        let captured = member.in_flight.iter().find(|(captured, ..)| *captured == epoch);
        let (_, captured_pages, ended_ns) = captured.expect("what is committed is in flight");
        assert_eq!(
            *captured_pages, pages,
            "all of a checkpoint is committed, or nothing"
        );
        assert!(*ended_ns <= now_ns, "a commit comes after its capture");
        self.pages += if self.watched { pages } else { 0 };
    }

    /// The acknowledgement leaves the agent.
    pub(super) fn acknowledged(&mut self, vm: usize, now_ns: u64, epoch: u64) {
        let arrived = self.members[vm].arrived.pop_front();
        let (_, arrived_ns) = arrived
            .filter(|(arrived, _)| *arrived == epoch)
            .expect("it arrived");
        if self.watched {
            self.acks_ns.push(now_ns - arrived_ns);
        }
    }

    /// The primary knows that this epoch is committed: now output may leave.
    pub(super) fn answered(&mut self, vm: usize, now_ns: u64, epoch: u64) {
        let member = &mut self.members[vm];
        assert!(epoch >= member.answered, "answers do not go back");
        member.answered = epoch;
        while let Some((_, _, ended_ns)) = member.in_flight.pop_front_if(|(captured, ..)| *captured <= epoch)
        {
            if self.watched {
                self.lags_ns.push(now_ns - ended_ns);
            }
        }
    }

    /// The output of all epochs up to this one leaves.
    pub(super) fn released(&mut self, vm: usize, epoch: u64) {
        let member = &mut self.members[vm];
        assert!(epoch > member.released, "output leaves once");
        assert!(
            epoch <= member.answered,
            "output leaves when its epoch is known to be committed"
        );
        member.released = epoch;
    }

    pub(super) fn given_up(&mut self) {
        self.given_up += 1;
    }

    pub(super) fn outcome(mut self, shape: &Shape, before: &Used, after: &Used) -> Outcome {
        // What has waited for long and waits on has a lag that is at least so long.
        let end_ns = shape.warm_ns + shape.watched_ns;
        let long_ns = shape.epoch_ns * shape.in_flight_max;
        let waiting = self.members.iter().flat_map(|member| &member.in_flight);
        let ages = waiting.map(|(_, _, ended_ns)| end_ns - ended_ns);
        self.lags_ns.extend(ages.filter(|age_ns| *age_ns > long_ns));
        if self.lags_ns.is_empty() {
            // Nothing came back in all the time.
            self.lags_ns.push(shape.watched_ns);
        }
        self.lags_ns.sort_unstable();
        self.acks_ns.sort_unstable();
        // A VM that captures nothing for the whole time is late, too.
        let silent =
            (self.members.iter()).filter(|member| member.began_ns.is_none_or(|at| at < shape.warm_ns));
        let missed = silent.count() as u64 * (shape.watched_ns / shape.epoch_ns);
        let begun = self.begun + missed;
        let spent =
            |of: fn(&Used) -> &Vec<u64>| of(after).iter().sum::<u64>() - of(before).iter().sum::<u64>();
        Outcome {
            epochs: begun,
            on_time: if begun == 0 {
                0.0
            } else {
                float(self.on_time) / float(begun)
            },
            lags_ns: self.lags_ns,
            acks_ns: self.acks_ns,
            pages: self.pages,
            watched_ns: shape.watched_ns,
            used: used(shape.watched_ns, before, after),
            agent_ns: spent(|used| &used.connections_ns) + spent(|used| &used.stores_ns),
            connections_ns: spent(|used| &used.connections_ns),
            staged_pages_max: self.staged_pages_max,
            given_up: self.given_up,
        }
    }
}

fn used(watched_ns: u64, before: &Used, after: &Used) -> Vec<(Place, f64)> {
    let one = |of: fn(&Used) -> &Vec<u64>| {
        let parts = of(before).iter().zip(of(after));
        parts
            .map(|(before, after)| float(after - before))
            .fold(0.0, f64::max)
            / float(watched_ns)
    };
    let cores = |of: fn(&Used) -> &Vec<(u64, u64)>| {
        let parts = of(before).iter().zip(of(after));
        let each = parts.map(|((before, cores), (after, _))| float(after - before) / float(*cores));
        each.fold(0.0, f64::max) / float(watched_ns)
    };
    vec![
        (Place::HostLink, one(|used| &used.out_ns)),
        (Place::HostCores, cores(|used| &used.hosts_ns)),
        (Place::Encoder, one(|used| &used.encoders_ns)),
        (Place::Sender, one(|used| &used.senders_ns)),
        (Place::BackupLink, one(|used| &used.into_ns)),
        (Place::Connections, one(|used| &used.connections_ns)),
        (Place::AgentCores, cores(|used| &used.agents_ns)),
        (Place::Store, one(|used| &used.stores_ns)),
    ]
}

impl Outcome {
    /// The epochs begin on time, no VM lost its backup, and no queue grows for ever.
    pub(super) fn holds(&self) -> bool {
        self.on_time >= ON_TIME_MIN && self.given_up == 0 && self.busiest().1 < ALWAYS
    }

    /// The place that is the busiest, and how much of its time.
    pub(super) fn busiest(&self) -> (Place, f64) {
        let mut busiest = (Place::HostLink, 0.0);
        for place in &self.used {
            if place.1 > busiest.1 {
                busiest = *place;
            }
        }
        busiest
    }

    /// What is in the way, for people.
    pub(super) fn limit(&self) -> String {
        let (place, part) = self.busiest();
        let words = format!("{} ({:.0} %)", place.words(), part * 100.0);
        match (part >= FULL, self.holds()) {
            (true, _) => words,
            (false, true) => format!("nothing; busiest is {words}"),
            (false, false) => {
                format!("none is full: the way of a checkpoint is too long; busiest is {words}")
            }
        }
    }

    /// In milliseconds; `None` when there is none.
    pub(super) fn lag_ms(&self, quantile: f64) -> Option<f64> {
        at(&self.lags_ns, quantile).map(|ns| float(ns) / 1e6)
    }

    /// In microseconds; `None` when there is none.
    pub(super) fn ack_us(&self, quantile: f64) -> Option<f64> {
        at(&self.acks_ns, quantile).map(|ns| float(ns) / 1e3)
    }
}

/// The nearest rank of sorted values.
fn at(sorted: &[u64], quantile: f64) -> Option<u64> {
    let rank = super::shape::whole((float(sorted.len() as u64) * quantile).ceil()).max(1);
    sorted.get(usize::try_from(rank - 1).ok()?).copied()
}
