//! The packet gates of all of the guest's taps, moved as one.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

use net_buffer::{Gate, GateError, GateOptions, GateStats, LearntAddress};
use romulus_hypervisor::fault;
use romulus_telemetry::{BOUNDS, Buckets, Samples, catalogue};
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
    open: Arc<RwLock<Open>>,
}

/// The gates that there are, and what those before them counted.
#[derive(Default)]
struct Open {
    gates: Vec<Gate>,
    past: GateStats,
}

impl Open {
    /// Takes the gates away without opening them.
    fn clear(&mut self) {
        for gate in self.gates.drain(..) {
            self.past.add_counts(&gate.stats());
        }
    }
}

impl Gates {
    /// No gate yet: the guest speaks freely.
    pub fn new(limits: GateLimits) -> Self {
        Self {
            limits,
            open: Arc::default(),
        }
    }

    fn open(&self) -> RwLockReadGuard<'_, Open> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_mut(&self) -> RwLockWriteGuard<'_, Open> {
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
                self.open_mut().clear();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Makes ready all but the last filter on each tap, for a new session: epochs begin anew, so gates do. They unpark the thread that
    /// called when output comes.
    ///
    /// # Errors
    /// [`GateError`] of the first tap that can't be gated; none is ready then.
    pub fn prepare(&self) -> Result<(), GateError> {
        let mut open = self.open_mut();
        open.clear();
        let mut made = Vec::with_capacity(self.limits.taps.len());
        for tap in &self.limits.taps {
            made.push(Gate::prepare(&GateOptions {
                held_bytes_max: self.limits.held_bytes_max,
                held_frames_max: self.limits.held_frames_max,
                unparks: Some(thread::current()),
                ..GateOptions::new(tap)
            })?);
        }
        open.gates = made;
        Ok(())
    }

    /// The barrier of `epoch`, while the guest is stopped and drained; with `close`, nothing leaves from here on.
    ///
    /// # Errors
    /// [`GateError`] when a gate failed: the checkpoint must not count.
    pub fn barrier(&self, epoch: Epoch, close: bool) -> Result<(), GateError> {
        for gate in self.open().gates.iter() {
            if close {
                fault::point("replicator.before_close");
                gate.close()?;
                fault::point("replicator.after_close");
            }
            gate.barrier(epoch)?;
        }
        Ok(())
    }

    /// Whether output of the running epoch is held.
    pub fn hold_output(&self) -> bool {
        self.open().gates.iter().any(Gate::holds_output)
    }

    /// The frames of all epochs up to `epoch` leave.
    ///
    /// # Errors
    /// [`GateError`] when a gate failed.
    pub fn release(&self, epoch: Epoch) -> Result<(), GateError> {
        self.open().gates.iter().try_for_each(|gate| gate.release(epoch))
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
        let mut open = self.open_mut();
        let Open { gates, past } = &mut *open;
        for gate in gates.drain(..) {
            note(gate.open_and_remove().map(|counted| past.add_counts(&counted)));
        }
        drop(open);
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
        self.open().gates.iter().try_for_each(Gate::check)
    }

    /// What is held is dropped; the gates stay closed.
    pub fn discard(&self) {
        self.open().gates.iter().for_each(Gate::discard);
    }

    /// The addresses that the guest was heard to use.
    pub fn learnt(&self) -> Vec<LearntAddress> {
        self.open().gates.iter().flat_map(Gate::learnt).collect()
    }

    /// What they hold and have counted.
    pub fn figures(&self) -> GateFigures {
        let open = self.open();
        let figures = |gate: &Gate| (gate.tap_name(), gate.is_closed(), gate.stats());
        GateFigures {
            gates: open.gates.iter().map(figures).collect(),
            past: open.past.clone(),
        }
    }
}

/// What the gates hold and have counted, as of one moment.
#[derive(Default)]
pub struct GateFigures {
    /// Each gate that there is: its tap, whether it is closed, and its counters.
    gates: Vec<(String, bool, GateStats)>,
    /// The counters of those that were there before.
    past: GateStats,
}

impl GateFigures {
    /// For the status.
    pub fn json(&self) -> Vec<Value> {
        let gates = self.gates.iter();
        gates
            .map(|(tap, closed, stats)| figures(tap, *closed, stats))
            .collect()
    }

    /// As metrics: of all gates together.
    pub fn sample(&self, samples: &mut Samples, vm: &str, limits: &GateLimits) {
        let (mut all, mut held_frames, mut held_bytes) = (self.past.clone(), 0, 0);
        for (_, _, stats) in &self.gates {
            all.add_counts(stats);
            held_frames += stats.held_frames as u64;
            held_bytes += stats.held_bytes as u64;
        }
        let closed = !self.gates.is_empty() && self.gates.iter().all(|(_, closed, _)| *closed);
        let taps = limits.taps.len() as u64;
        for (definition, number) in [
            (&catalogue::GATE_CLOSED, u64::from(closed)),
            (&catalogue::HELD_FRAMES, held_frames),
            (&catalogue::HELD_BYTES, held_bytes),
            (
                &catalogue::HELD_FRAMES_LIMIT,
                taps * limits.held_frames_max as u64,
            ),
            (&catalogue::HELD_BYTES_LIMIT, taps * limits.held_bytes_max as u64),
            (&catalogue::RELEASED_FRAMES, all.released_frames),
            (&catalogue::RELEASED_BYTES, all.released_bytes),
        ] {
            samples.number(definition, &[vm], number);
        }
        for (cause, frames) in [
            ("limit", all.dropped_by_limit_frames),
            ("kernel", all.dropped_by_kernel_frames),
            ("refused", all.discarded_frames),
            ("write_failed", all.write_failed_frames),
        ] {
            samples.number(&catalogue::DROPPED_FRAMES, &[vm, cause], frames);
        }
        samples.number(&catalogue::MEMORY_BYTES, &[vm, "held_output"], held_bytes);
        samples.buckets(&catalogue::HOLD_SECONDS, &[vm], &hold_times(&all));
    }
}

/// The gate's bucket of 2⁴ µs, where those of metrics begin.
const FIRST_BUCKET: usize = 4;

/// The gate's buckets end at 2^i µs; those of metrics begin at 16 µs and end earlier.
fn hold_times(stats: &GateStats) -> Buckets {
    let mut counts = [0; BOUNDS + 1];
    for (position, frames) in stats.hold.frames_by_log2_us.iter().enumerate() {
        counts[position.saturating_sub(FIRST_BUCKET).min(BOUNDS)] += frames;
    }
    Buckets::of_durations(counts, stats.hold.sum_ns)
}

fn figures(tap: &str, closed: bool, stats: &GateStats) -> Value {
    let mean_ns = stats.hold.sum_ns.checked_div(stats.released_frames).unwrap_or(0);
    json!({
        "tap": tap,
        "closed": closed,
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

#[cfg(test)]
mod tests {
    use net_buffer::HOLD_BUCKETS;

    use super::*;

    #[test]
    fn hold_times_keep_their_bounds_as_metrics() {
        let mut stats = GateStats::default();
        // Up to 1 µs, 16 µs, 32 µs, 2^24 µs, and longer.
        for (bucket, frames) in [(0, 1), (4, 2), (5, 4), (24, 8), (HOLD_BUCKETS - 1, 16)] {
            stats.hold.frames_by_log2_us[bucket] = frames;
        }
        let found: Vec<_> = hold_times(&stats)
            .each()
            .filter(|(_, count)| *count > 0)
            .collect();
        let last = Some(16_000 << 20);
        assert_eq!(
            found,
            [(Some(16_000), 3), (Some(32_000), 4), (last, 8), (None, 16)]
        );
    }
}
