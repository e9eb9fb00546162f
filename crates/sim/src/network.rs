//! The lines between the parts: ordered streams that break, and datagrams to the witness that are lost, late and repeated.

use std::collections::BTreeMap;

use romulus_types::{Session, Time};

use crate::plan::{Line, MS, Plan};
use crate::random::Random;

/// After so long without a word a connection's end is noticed.
const IDLE_NS: u64 = 200 * MS;

/// A stream of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    ControlToBackup,
    DataToBackup,
    ControlToPrimary,
}

#[derive(Clone, Debug, Default)]
struct Connection {
    broken_at: Option<Time>,
    last_arrival: [Time; 3],
}

/// All lines.
#[derive(Debug)]
pub(crate) struct Network {
    random: Random,
    link_delay_ns: (u64, u64),
    witness_delay_ns: (u64, u64),
    loss_permille: u64,
    repeat_permille: u64,
    ns_per_byte: u64,
    cut_until: BTreeMap<Line, Time>,
    slow_link_until: Time,
    slow_witness_until: Time,
    connections: BTreeMap<Session, Connection>,
}

impl Network {
    pub(crate) fn new(plan: &Plan, random: Random) -> Self {
        Self {
            random,
            link_delay_ns: plan.link_delay_ns,
            witness_delay_ns: plan.witness_delay_ns,
            loss_permille: plan.witness_loss_permille,
            repeat_permille: plan.witness_repeat_permille,
            ns_per_byte: plan.ns_per_byte,
            cut_until: BTreeMap::new(),
            slow_link_until: Time::default(),
            slow_witness_until: Time::default(),
            connections: BTreeMap::new(),
        }
    }

    pub(crate) fn cut(&mut self, line: Line, until: Time) {
        let end = self.cut_until.entry(line).or_default();
        *end = (*end).max(until);
    }

    pub(crate) fn slow_link(&mut self, until: Time) {
        self.slow_link_until = until;
    }

    pub(crate) fn slow_witness(&mut self, until: Time) {
        self.slow_witness_until = until;
    }

    /// Everything is well from now on.
    pub(crate) fn heal(&mut self) {
        self.cut_until.clear();
        self.slow_link_until = Time::default();
        self.slow_witness_until = Time::default();
        self.loss_permille = 0;
    }

    fn cut_end(&self, line: Line) -> Time {
        self.cut_until.get(&line).copied().unwrap_or_default()
    }

    fn link_delay(&mut self, now: Time) -> u64 {
        let (low, high) = self.link_delay_ns;
        let delay = self.random.within(low, high);
        if now < self.slow_link_until {
            delay + 20 * MS
        } else {
            delay
        }
    }

    /// When a new connection's first message arrives, if it does.
    pub(crate) fn connect(&mut self, now: Time, session: Session) -> Option<Time> {
        if now < self.cut_end(Line::ToBackup) || now < self.cut_end(Line::ToPrimary) {
            return None;
        }
        self.connections.insert(session, Connection::default());
        let late = if self.random.chance(30) {
            self.random.within(0, 80 * MS)
        } else {
            0
        };
        Some(now.after_ns(self.link_delay(now) + late))
    }

    /// When something that is sent now arrives; `None` on a broken connection. A cut line only delays a stream.
    pub(crate) fn send(&mut self, now: Time, session: Session, stream: Stream, bytes: usize) -> Option<Time> {
        let line = if stream == Stream::ControlToPrimary {
            Line::ToPrimary
        } else {
            Line::ToBackup
        };
        let sent = now.max(self.cut_end(line));
        let delay_ns = self.link_delay(now) + bytes as u64 * self.ns_per_byte;
        let connection = self
            .connections
            .get_mut(&session)
            .filter(|connection| connection.broken_at.is_none())?;
        let last = &mut connection.last_arrival[stream as usize];
        // Data queues behind data; small messages do not wait for each other's bytes.
        let start = if stream == Stream::DataToBackup {
            sent.max(*last)
        } else {
            sent
        };
        *last = start.after_ns(delay_ns).max(*last);
        Some(*last)
    }

    /// Nothing more that is sent on it arrives, and what waited for its turn on the wire is lost with its sender.
    pub(crate) fn break_off(&mut self, now: Time, session: Session) {
        if let Some(connection) = self.connections.get_mut(&session) {
            connection.broken_at.get_or_insert(now);
        }
    }

    /// Whether what would arrive now was still waiting when its connection broke.
    pub(crate) fn lost(&self, now: Time, session: Session) -> bool {
        let broken_at = self
            .connections
            .get(&session)
            .and_then(|connection| connection.broken_at);
        broken_at.is_some_and(|at| now.since_ns(at) > self.link_delay_ns.1)
    }

    /// When the other end notices that a connection was ended.
    pub(crate) fn end_noticed(&mut self, now: Time, line: Line, silently: bool) -> Time {
        let idle = now.after_ns(self.random.within(IDLE_NS / 8, IDLE_NS));
        if silently {
            idle
        } else {
            now.max(self.cut_end(line))
                .after_ns(self.link_delay(now))
                .min(idle)
        }
    }

    /// When copies of a datagram arrive.
    pub(crate) fn datagram(&mut self, now: Time, line: Line) -> Vec<Time> {
        if now < self.cut_end(line) {
            return Vec::new();
        }
        let mut arrivals = Vec::new();
        let copies = 1 + u64::from(self.random.chance(self.repeat_permille));
        for _ in 0..copies {
            if !self.random.chance(self.loss_permille) {
                let (low, high) = self.witness_delay_ns;
                let slow = if now < self.slow_witness_until { 40 * MS } else { 0 };
                let late = if self.random.chance(20) { 150 * MS } else { 0 };
                arrivals.push(now.after_ns(self.random.within(low, high + slow + late)));
            }
        }
        arrivals
    }
}
