//! Whose guest is started when many have to be: a dead host takes all its VMs along.
//!
//! At most `starts_max` starts are under way. Of the VMs that wait the one of the highest priority is next, and among equals
//! the one that came first. VMs of one host are not missed at the same moment: a start that would take the last place waits
//! for VMs of a higher priority that are about to come, those of the same primary that are silent as well, but for no
//! longer than one suspicion timeout. A start that takes longer than [`PLACE_HELD_MAX`] loses its place, but goes on: one
//! standby that hangs must not keep the other guests from running.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use romulus_types::{HostId, VmId};

/// A start that takes longer does not keep others waiting.
const PLACE_HELD_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether those who are about to come are still silent.
const LOOK: Duration = Duration::from_millis(5);

/// Shared by all VMs of the agent.
#[derive(Clone)]
pub struct Starts(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Where a VM stands in the queue: the highest priority first, then the one that came first.
type Place = (Reverse<u16>, u64);

struct State {
    starts_max: usize,
    suspicion: Duration,
    tickets: u64,
    waiting: BTreeSet<Place>,
    running: BTreeMap<u64, Instant>,
    vms: BTreeMap<VmId, Known>,
}

/// What is known of a VM besides.
struct Known {
    priority: u16,
    /// Who ran it last; not known after a restart of the agent.
    primary: Option<HostId>,
    /// The last sign of its primary while it is protected; none: it is not about to be started.
    heard: Option<Instant>,
}

/// A start that is under way; dropped, it makes room for the next.
pub struct Turn {
    starts: Starts,
    ticket: u64,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.starts.lock().running.remove(&self.ticket);
        self.starts.0.changed.notify_all();
    }
}

impl State {
    fn arrive(&mut self, priority: u16) -> Place {
        self.tickets += 1;
        let place = (Reverse(priority), self.tickets);
        self.waiting.insert(place);
        place
    }

    /// Takes the place if it is this one's turn.
    fn try_start(&mut self, vm: &VmId, place: Place, arrived: Instant, now: Instant) -> bool {
        let running = self
            .running
            .values()
            .filter(|began| now.saturating_duration_since(**began) < PLACE_HELD_MAX)
            .count();
        if running >= self.starts_max || self.waiting.first() != Some(&place) {
            return false;
        }
        let waited = now.saturating_duration_since(arrived);
        if waited < self.suspicion && running + 1 + self.about_to_come(vm, place, now) > self.starts_max {
            return false;
        }
        self.waiting.remove(&place);
        self.running.insert(place.1, now);
        true
    }

    /// VMs of a higher priority whose primary, the same one, is silent.
    fn about_to_come(&self, vm: &VmId, (Reverse(priority), _): Place, now: Instant) -> usize {
        let primary = self.vms.get(vm).and_then(|known| known.primary.as_ref());
        let comes = |known: &&Known| {
            let silent = |heard| now.saturating_duration_since(heard) >= self.suspicion / 2;
            known.priority > priority
                && known.heard.is_some_and(silent)
                && (primary.is_none() || known.primary.as_ref() == primary)
        };
        self.vms.values().filter(comes).count()
    }
}

impl Starts {
    /// At most `starts_max` at a time; primaries are suspected after `suspicion`.
    pub fn new(starts_max: usize, suspicion: Duration) -> Self {
        assert!(starts_max > 0, "a checked setting");
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                starts_max,
                suspicion,
                tickets: 0,
                waiting: BTreeSet::new(),
                running: BTreeMap::new(),
                vms: BTreeMap::new(),
            }),
            changed: Condvar::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VM of this agent.
    pub fn add(&self, vm: &VmId, priority: u16) {
        let known = Known {
            priority,
            primary: None,
            heard: None,
        };
        self.lock().vms.insert(vm.clone(), known);
    }

    /// It is not this agent's any more.
    pub fn remove(&self, vm: &VmId) {
        self.lock().vms.remove(vm);
    }

    /// Who runs the VM.
    pub fn followed(&self, vm: &VmId, primary: &HostId) {
        if let Some(known) = self.lock().vms.get_mut(vm) {
            known.primary = Some(primary.clone());
        }
    }

    /// The last sign of the primary of a VM that would be started without one; none when it would not.
    pub fn heard(&self, vm: &VmId, at: Option<Instant>) {
        if let Some(known) = self.lock().vms.get_mut(vm) {
            known.heard = at;
        }
    }

    /// Waits for this VM's turn.
    pub fn take(&self, vm: &VmId) -> Turn {
        let arrived = Instant::now();
        let mut state = self.lock();
        let priority = state.vms.get_mut(vm).map_or(0, |known| {
            // It has come: nobody waits for it any more.
            known.heard = None;
            known.priority
        });
        let place = state.arrive(priority);
        self.0.changed.notify_all();
        while !state.try_start(vm, place, arrived, Instant::now()) {
            let waited = self.0.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        // The one behind may have a place, too.
        self.0.changed.notify_all();
        drop(state);
        Turn {
            starts: self.clone(),
            ticket: place.1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const SUSPICION: Duration = Duration::from_millis(150);
    const LONG: Duration = Duration::from_secs(60);

    fn vm(name: &str) -> VmId {
        VmId::new(name).expect("a name")
    }

    fn host(name: &str) -> HostId {
        HostId::new(name).expect("a name")
    }

    /// VMs of host "p" by priority, all of them last heard at `heard`.
    fn starts(starts_max: usize, vms: &[(&str, u16)], heard: Instant) -> Starts {
        let starts = Starts::new(starts_max, SUSPICION);
        for (name, priority) in vms {
            starts.add(&vm(name), *priority);
            starts.followed(&vm(name), &host("p"));
            starts.heard(&vm(name), Some(heard));
        }
        starts
    }

    fn arrive(state: &mut State, name: &str) -> Place {
        let known = state.vms.get_mut(&vm(name)).expect("one of them");
        known.heard = None;
        let priority = known.priority;
        state.arrive(priority)
    }

    #[test]
    fn a_lower_priority_waits_for_one_that_is_silent_as_well_and_no_longer_than_the_timeout() {
        let died = Instant::now();
        let missed = died + SUSPICION;
        let starts = starts(1, &[("low", 1), ("high", 9)], died);
        let mut state = starts.lock();
        let low = arrive(&mut state, "low");
        assert!(!state.try_start(&vm("low"), low, missed, missed));
        let high = arrive(&mut state, "high");
        assert!(!state.try_start(&vm("low"), low, missed, missed));
        assert!(state.try_start(&vm("high"), high, missed, missed));
        assert!(!state.try_start(&vm("low"), low, missed, missed + SUSPICION));
        state.running.clear();
        assert!(state.try_start(&vm("low"), low, missed, missed));

        let starts = super::tests::starts(1, &[("low", 1), ("high", 9)], died);
        let mut state = starts.lock();
        let low = arrive(&mut state, "low");
        assert!(state.try_start(&vm("low"), low, missed, missed + SUSPICION));
    }

    #[test]
    fn nobody_waits_for_a_vm_that_is_heard_or_of_another_host_or_where_there_is_room_for_both() {
        let died = Instant::now();
        let missed = died + SUSPICION;
        let vms = [("low", 1), ("high", 9)];
        let alive = starts(1, &vms, died);
        alive.heard(&vm("high"), Some(missed));
        let elsewhere = starts(1, &vms, died);
        elsewhere.followed(&vm("high"), &host("q"));
        let unprotected = starts(1, &vms, died);
        unprotected.heard(&vm("high"), None);
        let gone = starts(1, &vms, died);
        gone.remove(&vm("high"));
        for starts in [alive, elsewhere, unprotected, gone, starts(2, &vms, died)] {
            let mut state = starts.lock();
            let low = arrive(&mut state, "low");
            assert!(state.try_start(&vm("low"), low, missed, missed));
        }
    }

    #[test]
    fn a_start_that_hangs_gives_its_place_to_the_next() {
        let now = Instant::now();
        let starts = starts(1, &[("hung", 9), ("next", 1)], now);
        let mut state = starts.lock();
        let hung = arrive(&mut state, "hung");
        assert!(state.try_start(&vm("hung"), hung, now, now));
        let next = arrive(&mut state, "next");
        assert!(!state.try_start(&vm("next"), next, now, now + PLACE_HELD_MAX / 2));
        assert!(state.try_start(&vm("next"), next, now, now + PLACE_HELD_MAX));
    }

    #[test]
    fn those_who_wait_start_in_the_order_of_their_priorities_and_one_at_a_time() {
        const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
        let starts = Starts::new(1, SUSPICION);
        let first = starts.take(&vm("first"));
        let (started, order) = mpsc::channel();
        let threads: Vec<_> = NAMES
            .iter()
            .zip([3, 5, 1, 4, 2])
            .map(|(name, priority)| {
                starts.add(&vm(name), priority);
                let (starts, started) = (starts.clone(), started.clone());
                std::thread::spawn(move || {
                    let turn = starts.take(&vm(name));
                    let running = starts.lock().running.len();
                    started.send((*name, running)).expect("somebody listens");
                    drop(turn);
                })
            })
            .collect();
        while starts.lock().waiting.len() < NAMES.len() {
            std::thread::yield_now();
        }
        drop(first);
        let seen: Vec<_> = NAMES
            .iter()
            .map(|_| order.recv_timeout(LONG).expect("all of them start"))
            .collect();
        assert_eq!(seen, [("b", 1), ("d", 1), ("a", 1), ("e", 1), ("c", 1)]);
        threads
            .into_iter()
            .for_each(|thread| thread.join().expect("no panic"));
    }
}
