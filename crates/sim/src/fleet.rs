//! Many VMs of several primaries on one agent: what the VMs share fails for all of them at once.
//!
//! ```text
//!   host 0: VM, VM, VM … ─┐                 ┌─ one agent: it dies and starts for all VMs in the same moment
//!   host 1: VM, VM, VM … ─┼── one clock ────┼─ one host of the backup, with the memory of all images
//!   …                    ─┘                 └─ one witness with a record for each VM
//! ```
//!
//! Each VM is a [`World`] of its own with its own plan and checkers; they run in step on one clock. A generation of VMs lives
//! through its rough time and is judged in the end, then the next one follows at the same witness, until as many faults have
//! happened as were asked for. Kept of the planned faults of what is shared is a part only: with 50 VMs there are 50 plans, and
//! an agent that dies every 20 ms would never protect anything.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use romulus_types::{Time, VmId};

use crate::checks::Violation;
use crate::mistake::Mistake;
use crate::plan::{Fault, Line, Node};
use crate::random::Random;
use crate::witness_host::WitnessHost;
use crate::world::World;

/// VMs of one primary host.
const VMS_OF_A_HOST: usize = 10;

/// How many faults of each kind happened.
pub type FaultCounts = BTreeMap<&'static str, u64>;

/// How a fleet fared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FleetOutcome {
    /// Broken invariants, with the VM and the seed of its plan.
    pub violations: Vec<(String, u64, Violation)>,
    /// Planned faults that happened, by kind. One that struck many VMs counts once.
    pub faults: FaultCounts,
    /// VMs that lived through a generation.
    pub vms: u64,
    /// Of these were protected at some time.
    pub paired: u64,
    /// Of these were taken over.
    pub took_over: u64,
    /// Commits of all of them.
    pub commits: u64,
    /// Times the agent was started.
    pub agent_lives: u64,
    /// Images that were opened again with a commit in them.
    pub reopened: u64,
}

impl FleetOutcome {
    /// Faults of all kinds.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// Runs generations of `vms` VMs on one agent until at least `faults` faults have happened, or an invariant is broken.
///
/// # Panics
/// When `vms` is 0.
#[must_use]
pub fn run_fleet(seed: u64, vms: usize, faults: u64, mistake: Option<Mistake>) -> FleetOutcome {
    assert!(vms > 0, "a fleet has VMs");
    let mut outcome = FleetOutcome::default();
    let mut random = Random::new(seed);
    let witness = Rc::new(RefCell::new(WitnessHost::default()));
    let mut generation = 0;
    while outcome.violations.is_empty() && (generation == 0 || outcome.fault_count() < faults) {
        let mut fleet = Fleet::new(generation, vms, &mut random, &witness, mistake);
        fleet.run(&mut outcome);
        generation += 1;
    }
    outcome
}

struct Fleet {
    worlds: Vec<World>,
    seeds: Vec<u64>,
    names: Vec<VmId>,
    /// The next thing that happens to each VM.
    next: BTreeSet<(Time, usize)>,
    random: Random,
}

impl Fleet {
    fn new(
        generation: u64,
        vms: usize,
        random: &mut Random,
        witness: &Rc<RefCell<WitnessHost>>,
        mistake: Option<Mistake>,
    ) -> Self {
        let seeds: Vec<u64> = (0..vms).map(|_| random.next()).collect();
        let names: Vec<VmId> = (0..vms)
            .map(|vm| VmId::new(format!("vm-{generation}-{vm}")).expect("a name"))
            .collect();
        let worlds = seeds
            .iter()
            .zip(&names)
            .map(|(seed, name)| World::new(name.clone(), *seed, keep, Rc::clone(witness), mistake, false))
            .collect();
        Self {
            worlds,
            seeds,
            names,
            next: BTreeSet::new(),
            random: random.fork(),
        }
    }

    fn run(&mut self, outcome: &mut FleetOutcome) {
        outcome.agent_lives += 1;
        for vm in 0..self.worlds.len() {
            self.worlds[vm].start();
            self.queue(vm);
        }
        while let Some((now, vm)) = self.next.pop_first() {
            self.step(now, vm, outcome);
        }
        for (vm, world) in self.worlds.iter_mut().enumerate() {
            world.look_back();
            let reached = world.reached();
            outcome.vms += 1;
            outcome.paired += u64::from(reached.paired);
            outcome.took_over += u64::from(reached.took_over);
            outcome.commits += reached.commits;
            outcome.reopened += reached.reopened;
            if let Some(violation) = world.violation() {
                let broken = (self.names[vm].to_string(), self.seeds[vm], violation);
                outcome.violations.push(broken);
            }
        }
    }

    fn queue(&mut self, vm: usize) {
        if let Some(at) = self.worlds[vm].next_at() {
            self.next.insert((at, vm));
        }
    }

    fn step(&mut self, now: Time, vm: usize, outcome: &mut FleetOutcome) {
        let step = self.worlds[vm].step();
        if let Some(fault) = step.fault {
            *outcome.faults.entry(fault.kind()).or_default() += 1;
            self.share(now, vm, fault);
        }
        let up = self.worlds[vm].agent_is_up();
        if up != step.agent_was_up {
            outcome.agent_lives += u64::from(up);
            self.others(now, vm, |_| true, |world| world.agent_is(up, now));
        }
        self.queue(vm);
    }

    /// What one VM's plan does to something that others have as well.
    fn share(&mut self, now: Time, vm: usize, fault: Fault) {
        let host = vm / VMS_OF_A_HOST;
        let same_host = |other: usize| other / VMS_OF_A_HOST == host;
        match fault {
            Fault::LoseBackupHost { .. } => {
                self.others(now, vm, |_| true, |world| world.lose_backup_host(now))
            }
            Fault::Stall {
                node: Node::Backup | Node::Witness,
                ..
            }
            | Fault::SlowWitness { .. }
            | Fault::Cut {
                line: Line::BackupWitness,
                ..
            } => self.others(now, vm, |_| true, |world| world.share(fault, now)),
            // Half of them: a guest can die alone, and a line can be slow for one connection.
            Fault::CrashPrimaryHost | Fault::CutLink { .. } | Fault::SlowLink { .. } | Fault::Cut { .. }
                if self.random.chance(500) =>
            {
                self.others(now, vm, same_host, |world| world.share(fault, now));
            }
            _ => {}
        }
    }

    fn others(
        &mut self,
        now: Time,
        vm: usize,
        which: impl Fn(usize) -> bool,
        mut what: impl FnMut(&mut World),
    ) {
        for other in (0..self.worlds.len()).filter(|other| *other != vm && which(*other)) {
            let Some(at) = self.worlds[other].next_at() else {
                continue;
            };
            debug_assert!(at >= now, "one clock");
            self.next.remove(&(at, other));
            what(&mut self.worlds[other]);
            self.queue(other);
        }
    }
}

/// Whether a fault that one of many plans has may happen: those of what all share are many times as likely as in a world alone.
fn keep(fault: &Fault, random: &mut Random) -> bool {
    let permille = match fault {
        Fault::LoseBackupHost { .. } => 30,
        Fault::CrashBackup { .. } | Fault::CrashWitness { .. } => 150,
        Fault::Stall {
            node: Node::Backup | Node::Witness,
            ..
        }
        | Fault::SlowWitness { .. } => 100,
        Fault::CrashPrimaryHost => 300,
        Fault::CutLink { .. } | Fault::Cut { .. } | Fault::SlowLink { .. } => 300,
        _ => 1000,
    };
    random.chance(permille)
}
