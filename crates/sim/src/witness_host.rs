//! The witness and its durable store, for one VM or for many.

use std::collections::BTreeMap;

use romulus_protocol::{Record, Witness, WitnessReply, WitnessRequest};
use romulus_types::{VmId, WitnessInstance};

const INSTANCE: WitnessInstance = WitnessInstance(1);

/// The witness's host.
pub(crate) struct WitnessHost {
    machine: Option<Witness>,
    /// What lies on its disk.
    records: BTreeMap<VmId, Record>,
}

impl Default for WitnessHost {
    fn default() -> Self {
        Self {
            machine: Some(Witness::new(INSTANCE)),
            records: BTreeMap::new(),
        }
    }
}

impl WitnessHost {
    /// The record of a VM.
    pub(crate) fn record(&self, vm: &VmId) -> Option<Record> {
        self.records.get(vm).cloned()
    }

    /// The process dies.
    pub(crate) fn crash(&mut self) {
        self.machine = None;
    }

    /// It starts, if it is down, with what lies on the disk.
    pub(crate) fn start(&mut self) {
        if self.machine.is_none() {
            let mut machine = Witness::new(INSTANCE);
            for (vm, record) in &self.records {
                machine.load(vm.clone(), record.clone());
            }
            self.machine = Some(machine);
        }
    }

    /// Its answer, and the record that it wrote for it; none while it is down.
    pub(crate) fn handle(&mut self, request: &WitnessRequest) -> Option<(WitnessReply, Option<Record>)> {
        let (reply, changed) = self.machine.as_mut()?.handle(request);
        if let Some(record) = &changed {
            self.records.insert(request.vm.clone(), record.clone());
        }
        Some((reply, changed))
    }
}
