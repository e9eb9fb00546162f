//! The packet gates of all of the guest's taps, moved as one.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use net_buffer::{Gate, GateError, GateOptions, GateStats, LearntAddress};
use romulus_hypervisor::fault;
use romulus_types::Epoch;
use serde_json::{Value, json};

/// What every gate is made with.
#[derive(Clone, Debug)]
pub struct GateLimits {
    /// The taps of the guest's network devices.
    pub taps: Vec<String>,
    /// Most bytes held by one gate.
    pub held_bytes_max: usize,
    /// Most frames held by one gate.
    pub held_frames_max: usize,
}

/// The gates, shared by the driver, the capture thread and the watch. Whoever asks the kernel (which may take long while
/// somebody else changes interfaces) shares them; they are taken alone only to be made and removed.
#[derive(Clone)]
pub struct Gates {
    limits: GateLimits,
    open: Arc<RwLock<Vec<Gate>>>,
}

impl Gates {
    /// No gate yet: the guest speaks freely.
    pub fn new(limits: GateLimits) -> Self {
        Self {
            limits,
            open: Arc::default(),
        }
    }

    fn gates(&self) -> RwLockReadGuard<'_, Vec<Gate>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn gates_mut(&self) -> RwLockWriteGuard<'_, Vec<Gate>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether every tap can be gated, said before anything is promised. A gate that an earlier life of ours left is
    /// no obstacle: it goes when the witness's record lets this host speak.
    ///
    /// # Errors
    /// [`GateError`] of the first tap that can't be gated.
    pub fn check_taps(&self) -> Result<(), GateError> {
        match self.prepare() {
            Ok(()) | Err(GateError::Stale { .. }) => {
                self.gates_mut().clear();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Makes ready all but the last filter on each tap, for a new session: epochs begin anew, so gates do.
    ///
    /// # Errors
    /// [`GateError`] of the first tap that can't be gated; none is ready then.
    pub fn prepare(&self) -> Result<(), GateError> {
        let mut gates = self.gates_mut();
        gates.clear();
        let mut made = Vec::with_capacity(self.limits.taps.len());
        for tap in &self.limits.taps {
            made.push(Gate::prepare(&GateOptions {
                held_bytes_max: self.limits.held_bytes_max,
                held_frames_max: self.limits.held_frames_max,
                ..GateOptions::new(tap)
            })?);
        }
        *gates = made;
        Ok(())
    }

    /// The barrier of `epoch`, while the guest is stopped and drained; with `close`, nothing leaves from here on.
    ///
    /// # Errors
    /// [`GateError`] when a gate failed: the checkpoint must not count.
    pub fn barrier(&self, epoch: Epoch, close: bool) -> Result<(), GateError> {
        for gate in self.gates().iter() {
            if close {
                fault::point("replicator.before_close");
                gate.close()?;
                fault::point("replicator.after_close");
            }
            gate.barrier(epoch)?;
        }
        Ok(())
    }

    /// The frames of all epochs up to `epoch` leave.
    ///
    /// # Errors
    /// [`GateError`] when a gate failed.
    pub fn release(&self, epoch: Epoch) -> Result<(), GateError> {
        self.gates().iter().try_for_each(|gate| gate.release(epoch))
    }

    /// Everything held leaves in order, the gates are removed, and so is what an earlier life left behind.
    ///
    /// # Errors
    /// [`GateError`] when a filter could not be removed: the guest is mute then, and the operator must know.
    pub fn open_and_remove(&self) -> Result<(), GateError> {
        let mut first_error = None;
        let mut note = |result: Result<(), GateError>| {
            if let Err(error) = result {
                first_error.get_or_insert(error);
            }
        };
        for gate in self.gates_mut().drain(..) {
            note(gate.open_and_remove().map(drop));
        }
        for tap in &self.limits.taps {
            note(Gate::remove_stale(tap).map(drop));
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Whether the closed gates still hold: another program may have removed a filter.
    ///
    /// # Errors
    /// [`GateError`] names what is missing; output may leave unheld.
    pub fn check(&self) -> Result<(), GateError> {
        self.gates().iter().try_for_each(Gate::check)
    }

    /// What is held is dropped; the gates stay closed.
    pub fn discard(&self) {
        self.gates().iter().for_each(Gate::discard);
    }

    /// The addresses that the guest was heard to use.
    pub fn learnt(&self) -> Vec<LearntAddress> {
        self.gates().iter().flat_map(Gate::learnt).collect()
    }

    /// Figures for `status`.
    pub fn status(&self) -> Vec<Value> {
        let gates = self.gates();
        gates.iter().map(|gate| figures(gate, &gate.stats())).collect()
    }
}

fn figures(gate: &Gate, stats: &GateStats) -> Value {
    let mean_ns = stats.hold.sum_ns.checked_div(stats.released_frames).unwrap_or(0);
    json!({
        "tap": gate.tap_name(),
        "closed": gate.is_closed(),
        "held_frames": stats.held_frames,
        "held_bytes": stats.held_bytes,
        "held_frames_peak": stats.held_frames_peak,
        "held_bytes_peak": stats.held_bytes_peak,
        "released_frames": stats.released_frames,
        "released_bytes": stats.released_bytes,
        "dropped_frames": stats.dropped_by_limit_frames + stats.dropped_by_kernel_frames,
        "discarded_frames": stats.discarded_frames,
        "hold_mean_us": mean_ns / 1000,
        "hold_max_us": stats.hold.max_ns / 1000,
    })
}
