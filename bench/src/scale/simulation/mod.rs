//! The fleet on one clock.
//!
//! ```text
//!   pace (pair.rs) ─► capture ─► encode ─► [16 frames] ─► send ─► [window] ─► host's link ─► backup's link
//!        ▲            guest      thread                  thread                                   │
//!        │            stands     a VM                    a VM                                     ▼
//!        └──────────── answer ◄── send ◄── commit, then apply ◄── verify ◄── decode ◄─ [32] ◄─ receive
//!                               agent's     thread a VM at the agent                           agent's one thread
//!                               one thread                                                     for connections
//! ```
//!
//! In brackets: what may wait there. Whoever has no room waits, back to the capture: then the protocol's machine has as many epochs
//! in flight as it may, and the epoch stretches.
//!
//! Invariants: the same shape, costs and seed give the same figures; nothing is committed that was not sent, in order, and nothing is
//! acknowledged that was not committed.

mod way;

use std::collections::{BTreeMap, VecDeque};

use romulus_guest_core::random::Random;

use super::cores::{Cores, LOW, PoolId, Started, ThreadId, URGENT};
use super::pair::{Pair, Wish};
use super::shape::{Costs, Part, Shape};
use super::tally::{Outcome, Tally};

/// Frames that wait for the connection, at most; as the replicator has it.
const SINK_MAX: usize = 16;
/// Frames that wait for a VM's store, at most; as the agent has it.
const STORE_MAX: usize = 32;

/// Index of a VM.
type Vm = usize;

#[derive(Clone, Copy, Debug)]
enum Happens {
    /// The machine's own deadline.
    Deadline(Vm),
    /// A capture's time has come.
    CaptureDue(Vm, u64),
    Done(ThreadId),
    /// The first bit of a part reaches the backup's link, which the last one leaves at the earliest so.
    OnTheLink(Vm, Part, u64),
    Arrived(Vm, Part),
    HeartbeatArrived(Vm, u64),
    /// An answer of the backup reaches the primary: newest commit, heartbeat.
    Answered(Vm, u64, u64),
    /// A guest has its own work to do.
    GuestWorks(Vm),
}

/// What follows from a thread's work.
#[derive(Clone, Copy, Debug)]
enum Then {
    Captured(Vm, u64, u64),
    Encoded(Vm, Part),
    Sent(Vm, Part),
    Received(Vm, Part),
    Stored(Vm, Part),
    Committed(Vm, u64),
    Acknowledged(Vm, u64),
    Applied(Vm, u64),
    Nothing,
}

/// One VM, at both ends.
struct Member {
    pair: Pair,
    random: Random,
    /// The machine's deadline that is in the calendar.
    deadline_ns: Option<u64>,
    host: usize,
    backup: usize,
    /// Of the vCPU and of the capture, of the encoder, of the replicator's main thread, of the store at the agent.
    guest: ThreadId,
    capture: ThreadId,
    encoder: ThreadId,
    sender: ThreadId,
    store: ThreadId,
    /// Of the agent's.
    connection: ThreadId,
    /// Since when the guest runs.
    runs_ns: u64,
    to_encode: VecDeque<Part>,
    sink: VecDeque<Part>,
    /// Sent and not yet read by the store's side.
    window_bytes: u64,
    unread: VecDeque<Part>,
    /// Frames that wait for the store or are with it.
    at_store: usize,
    /// Pages of the checkpoint that is coming in.
    incoming_pages: u64,
    committed: u64,
    acknowledged: u64,
    answers_ns: u64,
    gone: bool,
}

/// A link in one direction.
#[derive(Default)]
struct Link {
    free_ns: u64,
    busy_ns: u64,
}

impl Link {
    /// Takes something from `now_ns` on, for so long: when its first bit goes.
    fn take(&mut self, now_ns: u64, duration_ns: u64) -> u64 {
        let begins_ns = self.free_ns.max(now_ns);
        self.free_ns = begins_ns + duration_ns;
        self.busy_ns += duration_ns;
        begins_ns
    }

    /// Time that it was busy until now: what waits for it is still to come.
    fn busy_until(&self, now_ns: u64) -> u64 {
        self.busy_ns - self.free_ns.saturating_sub(now_ns)
    }
}

/// The whole of it.
pub(super) struct Simulation<'a> {
    shape: &'a Shape,
    costs: &'a Costs,
    now_ns: u64,
    /// By time, and in the order in which they were written in.
    calendar: BTreeMap<(u64, u64), Happens>,
    entries: u64,
    cores: Cores<Then>,
    host_pools: Vec<PoolId>,
    agent_pools: Vec<PoolId>,
    connections: Vec<ThreadId>,
    out: Vec<Link>,
    into: Vec<Link>,
    members: Vec<Member>,
    tally: Tally,
}

/// Runs a fleet for the time that its shape has.
pub(super) fn simulate(shape: &Shape, costs: &Costs) -> Outcome {
    let mut simulation = Simulation::new(shape, costs);
    simulation.run_until(shape.warm_ns);
    let before = simulation.used();
    simulation.tally.watch();
    simulation.run_until(shape.warm_ns + shape.watched_ns);
    let after = simulation.used();
    simulation.tally.outcome(shape, &before, &after)
}

/// What was used since the beginning, in nanoseconds of each part of the fleet.
#[derive(Clone, Debug, Default)]
pub(super) struct Used {
    pub(super) out_ns: Vec<u64>,
    pub(super) into_ns: Vec<u64>,
    /// With the number of cores.
    pub(super) hosts_ns: Vec<(u64, u64)>,
    pub(super) agents_ns: Vec<(u64, u64)>,
    pub(super) connections_ns: Vec<u64>,
    pub(super) encoders_ns: Vec<u64>,
    pub(super) senders_ns: Vec<u64>,
    pub(super) stores_ns: Vec<u64>,
}

impl<'a> Simulation<'a> {
    pub(super) fn new(shape: &'a Shape, costs: &'a Costs) -> Self {
        let mut cores = Cores::new();
        let hosts = if shape.one_machine {
            1
        } else {
            shape.vms.div_ceil(shape.vms_a_host)
        };
        let host_pools: Vec<PoolId> = (0..hosts).map(|_| cores.add_pool(shape.host_cores)).collect();
        let agent_pools: Vec<PoolId> = if shape.one_machine {
            vec![host_pools[0]; index(shape.backups)]
        } else {
            (0..shape.backups)
                .map(|_| cores.add_pool(shape.agent_cores))
                .collect()
        };
        let connections: Vec<ThreadId> = agent_pools
            .iter()
            .flat_map(|pool| vec![*pool; index(shape.connection_threads)])
            .map(|pool| cores.add_thread(pool, URGENT))
            .collect();
        let mut simulation = Self {
            shape,
            costs,
            now_ns: 0,
            calendar: BTreeMap::new(),
            entries: 0,
            cores,
            out: host_pools.iter().map(|_| Link::default()).collect(),
            into: agent_pools.iter().map(|_| Link::default()).collect(),
            host_pools,
            agent_pools,
            connections,
            members: Vec::new(),
            tally: Tally::new(shape.vms, shape.epoch_ns),
        };
        let mut random = Random::new(shape.seed);
        for vm in 0..shape.vms {
            simulation.add(vm, &mut random);
        }
        simulation
    }

    /// Another VM, which begins at some time of the first epoch.
    fn add(&mut self, vm: u64, random: &mut Random) {
        let shape = self.shape;
        let begins_ns = random.below(shape.epoch_ns);
        let host = if shape.one_machine {
            0
        } else {
            index(vm / shape.vms_a_host)
        };
        let backup = index(vm % shape.backups);
        let of_backup = index(vm / shape.backups % shape.connection_threads);
        let (at_host, at_agent) = (self.host_pools[host], self.agent_pools[backup]);
        let mut wishes = Vec::new();
        let member = Member {
            pair: Pair::begin(vm, begins_ns, shape.epoch_ns, shape.in_flight_max, &mut wishes),
            random: Random::new(random.number()),
            deadline_ns: None,
            host,
            backup,
            guest: self.cores.add_thread(at_host, URGENT),
            capture: self.cores.add_thread(at_host, URGENT),
            encoder: self.cores.add_thread(at_host, LOW),
            sender: self.cores.add_thread(at_host, URGENT),
            store: self.cores.add_thread(at_agent, LOW),
            connection: self.connections[backup * index(shape.connection_threads) + of_backup],
            runs_ns: begins_ns,
            to_encode: VecDeque::new(),
            sink: VecDeque::new(),
            window_bytes: 0,
            unread: VecDeque::new(),
            at_store: 0,
            incoming_pages: 0,
            committed: 0,
            acknowledged: 0,
            answers_ns: 0,
            gone: false,
        };
        self.members.push(member);
        let vm = self.members.len() - 1;
        self.grant(vm, &wishes);
        if shape.guest_ns > 0 {
            self.at(begins_ns, Happens::GuestWorks(vm));
        }
    }

    fn at(&mut self, at_ns: u64, what: Happens) {
        self.entries += 1;
        self.calendar.insert((at_ns.max(self.now_ns), self.entries), what);
    }

    pub(super) fn run_until(&mut self, end_ns: u64) {
        while let Some(entry) = self.calendar.first_entry() {
            let (at_ns, _) = *entry.key();
            if at_ns >= end_ns {
                break;
            }
            assert!(at_ns >= self.now_ns, "time goes on");
            self.now_ns = at_ns;
            let what = entry.remove();
            self.happen(what);
        }
        self.now_ns = end_ns;
    }

    fn happen(&mut self, what: Happens) {
        match what {
            Happens::Deadline(vm) => self.on_deadline(vm),
            Happens::CaptureDue(vm, epoch) => self.on_capture_due(vm, epoch),
            Happens::Done(thread) => {
                let (duration_ns, then) = self.cores.done(thread);
                self.follow(duration_ns, then);
                let next = self.cores.next(thread);
                self.started(next);
            }
            Happens::OnTheLink(vm, part, ends_ns) => {
                let duration_ns = self.shape.wire_ns(part.bytes);
                let link = &mut self.into[self.members[vm].backup];
                let begins_ns = link.take(self.now_ns, duration_ns);
                let arrives_ns = ends_ns.max(begins_ns + duration_ns) + self.shape.round_trip_ns / 2;
                self.at(arrives_ns, Happens::Arrived(vm, part));
            }
            Happens::Arrived(vm, part) => {
                let cost_ns = self.costs.receive.of(part.last, part.pages, part.bytes);
                self.work(self.members[vm].connection, cost_ns, Then::Received(vm, part));
            }
            Happens::HeartbeatArrived(vm, sent_ns) => {
                let member = &mut self.members[vm];
                member.answers_ns = member.answers_ns.max(sent_ns);
                self.answer(vm);
            }
            Happens::Answered(vm, committed, answers_ns) => {
                let now_ns = self.now_ns;
                self.tally.answered(vm, now_ns, committed);
                self.with(vm, |pair, wishes| {
                    pair.answered(now_ns, committed, answers_ns, wishes)
                });
            }
            Happens::GuestWorks(vm) => {
                self.work(self.members[vm].guest, self.shape.guest_ns, Then::Nothing);
                self.at(self.now_ns + self.shape.epoch_ns, Happens::GuestWorks(vm));
            }
        }
    }

    fn on_deadline(&mut self, vm: Vm) {
        let now_ns = self.now_ns;
        // Another one, written in since, is meant.
        if self.members[vm].deadline_ns == Some(now_ns) {
            self.members[vm].deadline_ns = None;
            self.with(vm, |pair, wishes| pair.time(now_ns, wishes));
        }
    }

    /// Does something with a VM's machine, and what it wants then.
    fn with(&mut self, vm: Vm, act: impl FnOnce(&mut Pair, &mut Vec<Wish>)) {
        if self.members[vm].gone {
            return;
        }
        let mut wishes = Vec::new();
        act(&mut self.members[vm].pair, &mut wishes);
        self.grant(vm, &wishes);
    }

    fn grant(&mut self, vm: Vm, wishes: &[Wish]) {
        for wish in wishes {
            match *wish {
                Wish::Capture { epoch, at_ns } => self.at(at_ns, Happens::CaptureDue(vm, epoch)),
                Wish::Heartbeat { sent_ns } => {
                    let arrives_ns = self.now_ns.max(sent_ns) + self.shape.round_trip_ns / 2;
                    self.at(arrives_ns, Happens::HeartbeatArrived(vm, sent_ns));
                }
                Wish::Release { epoch } => self.tally.released(vm, epoch),
                Wish::GivenUp => {
                    self.members[vm].gone = true;
                    self.tally.given_up();
                    return;
                }
            }
        }
        let next_ns = self.members[vm].pair.next_ns();
        let written_ns = self.members[vm].deadline_ns;
        if let Some(next_ns) = next_ns.filter(|next| written_ns.is_none_or(|written| *next < written)) {
            let next_ns = next_ns.max(self.now_ns);
            self.members[vm].deadline_ns = Some(next_ns);
            self.at(next_ns, Happens::Deadline(vm));
        }
    }

    fn work(&mut self, thread: ThreadId, duration_ns: u64, then: Then) {
        let started = self.cores.push(thread, duration_ns, then);
        self.started(started);
    }

    fn started(&mut self, started: Option<Started>) {
        if let Some(Started { thread, duration_ns }) = started {
            self.at(self.now_ns + duration_ns, Happens::Done(thread));
        }
    }

    fn used(&self) -> Used {
        let threads = |of: fn(&Member) -> ThreadId| -> Vec<u64> {
            let busy_ns = |member| self.cores.thread_busy_ns(of(member));
            self.members.iter().map(busy_ns).collect()
        };
        let links = |links: &[Link]| links.iter().map(|link| link.busy_until(self.now_ns)).collect();
        let pools = |pools: &[PoolId]| pools.iter().map(|pool| self.cores.pool_busy_ns(*pool)).collect();
        Used {
            out_ns: links(&self.out),
            into_ns: links(&self.into),
            hosts_ns: pools(&self.host_pools),
            agents_ns: pools(&self.agent_pools),
            connections_ns: (self.connections.iter())
                .map(|thread| self.cores.thread_busy_ns(*thread))
                .collect(),
            encoders_ns: threads(|member| member.encoder),
            senders_ns: threads(|member| member.sender),
            stores_ns: threads(|member| member.store),
        }
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a fleet fits into memory")
}
