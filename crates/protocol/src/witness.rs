//! The witness's record machine: compare-and-set on the record of each VM.
//!
//! ```text
//!            Register (operator)              primary
//!  unknown ─────────────────────► Alone(h) ───────────► Paired(h, b, session, first epoch)
//!  Ended ───────────────────────►  ▲  │ h: Alone(h) again, Alone(other), Ended     │
//!                                  │  └──────────────────────────────────────┐    │ h: Alone(h), Alone(b), Ended
//!                                  └──────────────────────────────────────────────┘ b: Alone(b)
//! ```
//!
//! - A change names the instance and the term that its asker believes current; each change makes the next term.
//! - A request whose nonce made the present record gets `Granted` again, and changes nothing.
//! - A record that another instance made (the store was restored from a copy) answers nothing but an operator's `Register`.
//! - `Alone(h) → Alone(h)` is allowed: the new term voids whatever an earlier life of `h` still has under way.

use std::collections::BTreeMap;

use romulus_types::{HostId, Term, VmId, WitnessInstance};

use crate::record::{Answer, Ask, Mode, Record, WitnessReply, WitnessRequest};
use crate::weakness::Weakness;

/// Most VMs of one witness. A further `Register` is answered with `UnknownVm`.
pub const WITNESS_VMS_MAX: usize = 100_000;

/// The records of all VMs of one witness. No I/O: the driver makes durable what [`Witness::handle`] gives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Witness {
    instance: WitnessInstance,
    records: BTreeMap<VmId, Record>,
    weakness: Option<Weakness>,
}

impl Witness {
    /// A witness without records. `instance` names the life of its store: a store restored from a copy needs a new one.
    #[must_use]
    pub fn new(instance: WitnessInstance) -> Self {
        Self {
            instance,
            records: BTreeMap::new(),
            weakness: None,
        }
    }

    /// Plants a mistake, for the simulator and the model only.
    #[must_use]
    pub fn weakened(mut self, weakness: Weakness) -> Self {
        self.weakness = Some(weakness);
        self
    }

    /// Hands in a record from the store, before the first request.
    pub fn load(&mut self, vm: VmId, record: Record) {
        self.records.insert(vm, record);
    }

    /// The life of this witness's store.
    #[must_use]
    pub fn instance(&self) -> WitnessInstance {
        self.instance
    }

    /// The record of a VM, for status.
    #[must_use]
    pub fn record(&self, vm: &VmId) -> Option<&Record> {
        self.records.get(vm)
    }

    /// All records, for status.
    pub fn records(&self) -> impl Iterator<Item = (&VmId, &Record)> {
        self.records.iter()
    }

    /// Answers a request. When a record comes with the reply, **it is made durable before the reply is sent**; a driver
    /// that can't do so ends instead of replying. The driver has checked that `request.host` is who asks.
    pub fn handle(&mut self, request: &WitnessRequest) -> (WitnessReply, Option<Record>) {
        let answer = self.answer(request);
        let changed = match &answer {
            Answer::Granted(record) if self.records.get(&request.vm) != Some(record) => Some(record.clone()),
            _ => None,
        };
        if let Some(record) = &changed {
            let last = self.records.insert(request.vm.clone(), record.clone());
            assert!(
                last.is_none_or(|last| last.term < record.term),
                "a change makes a higher term"
            );
        }
        (
            WitnessReply {
                vm: request.vm.clone(),
                nonce: request.nonce,
                answer,
            },
            changed,
        )
    }

    fn answer(&self, request: &WitnessRequest) -> Answer {
        let record = self.records.get(&request.vm);
        if request.ask == Ask::Register {
            return self.register(request, record);
        }
        let Some(record) = record else {
            return Answer::UnknownVm;
        };
        let checked = self.weakness != Some(Weakness::TrustAnyWitness);
        if checked && record.instance != self.instance {
            return Answer::WrongInstance(self.instance);
        }
        let Ask::Change { instance, term, mode } = &request.ask else {
            return Answer::Current(record.clone());
        };
        if checked && *instance != self.instance {
            return Answer::WrongInstance(self.instance);
        }
        if record.nonce == request.nonce {
            return Answer::Granted(record.clone());
        }
        if *term != record.term || !may_change(&record.mode, &request.host, mode) {
            return Answer::Refused(record.clone());
        }
        Answer::Granted(self.next_record(Some(record), mode.clone(), request))
    }

    fn register(&self, request: &WitnessRequest, record: Option<&Record>) -> Answer {
        match record {
            Some(record) if record.instance == self.instance => {
                if record.nonce == request.nonce {
                    return Answer::Granted(record.clone());
                }
                if record.mode != Mode::Ended {
                    return Answer::Refused(record.clone());
                }
            }
            None if self.records.len() >= WITNESS_VMS_MAX => return Answer::UnknownVm,
            _ => {}
        }
        let mode = Mode::Alone {
            host: request.host.clone(),
        };
        Answer::Granted(self.next_record(record, mode, request))
    }

    fn next_record(&self, last: Option<&Record>, mode: Mode, request: &WitnessRequest) -> Record {
        let term = last.map_or(Term(0), |record| record.term).next();
        Record {
            instance: self.instance,
            term,
            mode,
            nonce: request.nonce,
        }
    }
}

/// Whether `host` may make this change.
fn may_change(from: &Mode, host: &HostId, to: &Mode) -> bool {
    match (from, to) {
        (Mode::Alone { host: owner }, Mode::Paired { primary, backup, .. }) => {
            owner == host && primary == host && backup != host
        }
        (Mode::Alone { host: owner }, Mode::Alone { .. } | Mode::Ended) => owner == host,
        (Mode::Paired { primary, backup, .. }, Mode::Alone { host: next }) => {
            (host == primary && (next == primary || next == backup)) || (host == backup && next == backup)
        }
        (Mode::Paired { primary, .. }, Mode::Ended) => host == primary,
        (Mode::Paired { .. }, Mode::Paired { .. }) | (Mode::Ended, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use romulus_types::{Epoch, Nonce, Session};

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn alone(name: &str) -> Mode {
        Mode::Alone { host: host(name) }
    }

    fn paired() -> Mode {
        Mode::Paired {
            primary: host("a"),
            backup: host("b"),
            session: Session(1),
            first_epoch: Epoch(1),
        }
    }

    fn request(name: &str, nonce: u128, ask: Ask) -> WitnessRequest {
        WitnessRequest {
            vm: VmId::new("vm").unwrap(),
            host: host(name),
            nonce: Nonce(nonce),
            ask,
        }
    }

    fn change(name: &str, nonce: u128, term: u64, mode: Mode) -> WitnessRequest {
        let instance = WitnessInstance(9);
        request(
            name,
            nonce,
            Ask::Change {
                instance,
                term: Term(term),
                mode,
            },
        )
    }

    fn witness_with(mode: Mode) -> Witness {
        let mut witness = Witness::new(WitnessInstance(9));
        let record = Record {
            instance: WitnessInstance(9),
            term: Term(5),
            mode,
            nonce: Nonce(0),
        };
        witness.load(VmId::new("vm").unwrap(), record);
        witness
    }

    #[test]
    fn only_the_named_hosts_may_change_a_record_and_only_as_the_design_says() {
        let modes = [alone("a"), alone("b"), alone("c"), paired(), Mode::Ended];
        let mut allowed = Vec::new();
        for (from, to, asker) in modes
            .iter()
            .flat_map(|from| modes.iter().map(move |to| (from, to)))
            .flat_map(|(from, to)| ["a", "b", "c"].map(|asker| (from, to, asker)))
        {
            let mut witness = witness_with(from.clone());
            let (reply, durable) = witness.handle(&change(asker, 1, 5, to.clone()));
            if let Answer::Granted(record) = &reply.answer {
                assert_eq!(durable.as_ref(), Some(record));
                assert_eq!(record.term, Term(6));
                allowed.push((from.clone(), to.clone(), asker));
            } else {
                assert_eq!(durable, None);
            }
        }
        let mut expected = vec![
            (paired(), alone("a"), "a"),
            (paired(), alone("b"), "a"),
            (paired(), alone("b"), "b"),
            (paired(), Mode::Ended, "a"),
            (alone("a"), paired(), "a"),
        ];
        for owner in ["a", "b", "c"] {
            for to in [alone("a"), alone("b"), alone("c"), Mode::Ended] {
                expected.push((alone(owner), to, owner));
            }
        }
        expected.sort();
        allowed.sort();
        assert_eq!(allowed, expected);
    }

    #[test]
    fn one_of_two_askers_gets_the_record_and_a_repetition_gets_the_same_answer() {
        let mut witness = witness_with(paired());
        let (first, durable) = witness.handle(&change("b", 1, 5, alone("b")));
        assert!(matches!(first.answer, Answer::Granted(_)) && durable.is_some());
        let (second, _) = witness.handle(&change("a", 2, 5, alone("a")));
        assert!(matches!(second.answer, Answer::Refused(record) if record.mode == alone("b")));
        assert_eq!(witness.handle(&change("b", 1, 5, alone("b"))), (first, None));
    }

    #[test]
    fn a_restored_store_answers_nothing_but_an_operator() {
        let mut witness = Witness::new(WitnessInstance(10));
        let old = Record {
            instance: WitnessInstance(9),
            term: Term(5),
            mode: paired(),
            nonce: Nonce(1),
        };
        witness.load(VmId::new("vm").unwrap(), old);
        let wrong = Answer::WrongInstance(WitnessInstance(10));
        assert_eq!(witness.handle(&change("b", 1, 5, alone("b"))).0.answer, wrong);
        assert_eq!(witness.handle(&request("b", 3, Ask::Read)).0.answer, wrong);
        let (reply, durable) = witness.handle(&request("a", 4, Ask::Register));
        let record = durable.expect("an operator's word makes a record");
        assert_eq!((record.term, &record.mode), (Term(6), &alone("a")));
        assert_eq!(reply.answer, Answer::Granted(record));
    }

    #[test]
    fn registering_never_takes_a_vm_from_a_host_that_has_it() {
        let mut witness = Witness::new(WitnessInstance(9));
        assert_eq!(
            witness.handle(&request("a", 1, Ask::Read)).0.answer,
            Answer::UnknownVm
        );
        assert!(witness.handle(&request("a", 2, Ask::Register)).1.is_some());
        assert!(matches!(
            witness.handle(&request("b", 3, Ask::Register)).0.answer,
            Answer::Refused(_)
        ));
        assert!(witness.handle(&change("a", 4, 1, Mode::Ended)).1.is_some());
        assert!(witness.handle(&request("b", 5, Ask::Register)).1.is_some());
    }
}
