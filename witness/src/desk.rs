//! Where requests are answered, one at a time: the record machine, and the store behind it.
//!
//! Invariant: an answer that makes a record leaves only after the record is durable. When it cannot be made durable
//! nothing is answered any more, and the process ends.

use std::sync::{Mutex, PoisonError};

use romulus_protocol::{Answer, Ask, Record, Witness, WitnessReply, WitnessRequest};
use romulus_types::{VmId, WitnessInstance};

use crate::store::{Store, StoreError};

/// Answers requests. All methods block on the disk.
#[derive(Debug)]
pub(crate) struct Desk {
    inner: Mutex<Inner>,
    vms_max: usize,
}

#[derive(Debug)]
struct Inner {
    witness: Witness,
    store: Store,
    /// The store failed: what is on disk is not known.
    failed: bool,
}

impl Desk {
    pub(crate) fn new(store: Store, records: Vec<(VmId, Record)>, vms_max: usize) -> Self {
        let witness = with_records(store.instance(), records);
        Self {
            inner: Mutex::new(Inner {
                witness,
                store,
                failed: false,
            }),
            vms_max,
        }
    }

    /// Answers; `None` when the store failed earlier. `request.host` must have been checked.
    ///
    /// # Errors
    /// The store fails now. Nobody may be answered and the process must end.
    pub(crate) fn answer(&self, request: &WitnessRequest) -> Result<Option<WitnessReply>, StoreError> {
        let mut inner = self.lock();
        if inner.failed {
            return Ok(None);
        }
        if self.is_full_for(&inner.witness, request) {
            let answer = Answer::UnknownVm;
            return Ok(Some(WitnessReply {
                vm: request.vm.clone(),
                nonce: request.nonce,
                answer,
            }));
        }
        let (reply, record) = inner.witness.handle(request);
        if let Some(record) = record
            && let Err(error) = inner.store.write(&request.vm, &record)
        {
            inner.failed = true;
            return Err(error);
        }
        Ok(Some(reply))
    }

    fn is_full_for(&self, witness: &Witness, request: &WitnessRequest) -> bool {
        request.ask == Ask::Register
            && witness.record(&request.vm).is_none()
            && witness.records().count() >= self.vms_max
    }

    /// Removes a VM's record.
    pub(crate) fn forget(&self, vm: &VmId) -> Result<(), StoreError> {
        let mut inner = self.lock();
        inner.store.forget(vm)?;
        let rest = inner.witness.records().filter(|(name, _)| *name != vm);
        let rest = rest
            .map(|(name, record)| (name.clone(), record.clone()))
            .collect();
        inner.witness = with_records(inner.store.instance(), rest);
        Ok(())
    }

    /// The store failed: nobody is answered any more.
    pub(crate) fn failed(&self) -> bool {
        self.lock().failed
    }

    pub(crate) fn instance(&self) -> WitnessInstance {
        self.lock().store.instance()
    }

    pub(crate) fn records(&self) -> Vec<(VmId, Record)> {
        self.lock()
            .witness
            .records()
            .map(|(vm, record)| (vm.clone(), record.clone()))
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn with_records(instance: WitnessInstance, records: Vec<(VmId, Record)>) -> Witness {
    let mut witness = Witness::new(instance);
    for (vm, record) in records {
        witness.load(vm, record);
    }
    witness
}

#[cfg(test)]
mod tests {
    use super::*;
    use romulus_types::{HostId, Nonce};

    fn register(vm: &str, nonce: u128) -> WitnessRequest {
        let (vm, host) = (VmId::new(vm).unwrap(), HostId::new("a").unwrap());
        WitnessRequest {
            vm,
            host,
            nonce: Nonce(nonce),
            ask: Ask::Register,
        }
    }

    fn desk(dir: &std::path::Path, vms_max: usize) -> Desk {
        let (store, records) = Store::open(dir).unwrap();
        Desk::new(store, records, vms_max)
    }

    #[test]
    fn no_more_vms_than_allowed_are_registered() {
        let dir = tempfile::tempdir().unwrap();
        crate::store::init(dir.path()).unwrap();
        let desk = desk(dir.path(), 2);
        let granted = |vm, nonce| {
            let reply = desk.answer(&register(vm, nonce)).unwrap().unwrap();
            matches!(reply.answer, Answer::Granted(_))
        };
        assert!(granted("a", 1) && granted("b", 2) && !granted("c", 3));
        assert!(granted("a", 1), "a repeated request gets its answer, full or not");
        desk.forget(&VmId::new("a").unwrap()).unwrap();
        assert!(granted("c", 4));
        assert_eq!(desk.records().len(), 2);
    }

    #[test]
    fn after_a_failed_write_nobody_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        crate::store::init(dir.path()).unwrap();
        let desk = desk(dir.path(), 10);
        // A folder in the file's place makes the rename fail, for root as well.
        std::fs::create_dir_all(dir.path().join("vms/web/x")).unwrap();
        assert!(desk.answer(&register("web", 1)).is_err());
        assert!(desk.answer(&register("web", 1)).unwrap().is_none());
        assert!(desk.answer(&register("db", 2)).unwrap().is_none());
    }
}
