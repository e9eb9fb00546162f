//! How much a guest got done so far, whoever counts it: a guest of the test VMM in its memory, a program in the Linux on its console, Redis in
//! what it answers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use romulus_e2e::benchmark::Benchmark;
use romulus_e2e::crowd::Crowd;
use romulus_e2e::guest;
use romulus_host_sys::{SharedView, monotonic_ns};

use super::stand::VM;
use super::task::REDIS;
use crate::measures::kvm::guest::progress_in;
use crate::measures::kvm::slices::Work;
use crate::measures::qemu::units_said;
use crate::run::Unable;
use crate::stats::float;

/// Guests say often what they have done; so long without a word and they do not live.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
const MEMORY_POLL: Duration = Duration::from_micros(50);
const CONSOLE_POLL: Duration = Duration::from_millis(1);

/// Who counts.
pub(super) enum Counter {
    /// A guest of the test VMM, which writes how far it is each half millisecond.
    Memory { view: SharedView, of: Work },
    /// A program in the Linux, after each of its rounds.
    Console { path: PathBuf, program: String },
    /// The Linux's Redis, of what clients have it do.
    Commands(Benchmark),
}

/// What was done by a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Done {
    /// On this host's CLOCK_MONOTONIC.
    pub(super) at_ns: u64,
    pub(super) units: u64,
}

impl Done {
    /// Host time for each unit since an earlier moment; infinite when nothing was done.
    pub(super) fn ns_a_unit_since(&self, before: &Self) -> f64 {
        float(self.at_ns.saturating_sub(before.at_ns)) / float(self.units.saturating_sub(before.units))
    }
}

impl Counter {
    /// Of a program in the Linux.
    pub(super) fn of_program(crowd: &Crowd, program: &str) -> Result<Self, Unable> {
        if program != REDIS {
            return Ok(Self::Console {
                path: guest::console(&crowd.lab),
                program: program.to_owned(),
            });
        }
        let mut benchmark =
            Benchmark::start(&crowd.lab).map_err(Unable::failed("starting redis-benchmark"))?;
        benchmark
            .ensure_it_goes_on(SILENCE_LIMIT)
            .map_err(Unable::failed("running redis-benchmark"))?;
        Ok(Self::Commands(benchmark))
    }

    /// Of a guest of the test VMM that dirties so.
    pub(super) fn of_memory(view: SharedView, dirty: &str) -> Self {
        Self::Memory {
            view,
            of: Work::of(dirty),
        }
    }

    /// The guest of the test VMM has been told to dirty otherwise.
    pub(super) fn set_dirty(&mut self, dirty: &str) {
        if let Self::Memory { of, .. } = self {
            *of = Work::of(dirty);
        }
    }

    /// What the guest has done, right after it has said so.
    pub(super) fn done(&mut self, crowd: &Crowd) -> Result<Done, Unable> {
        match self {
            Self::Memory { view, of } => next(MEMORY_POLL, || {
                let progress = progress_in(view)?;
                // Its clock goes on while it gets nothing done: that is news, too.
                Ok(progress.map(|progress| {
                    let units = match of {
                        Work::Units => progress.work_units,
                        Work::Pages => progress.pages_written,
                    };
                    (progress, units)
                }))
            }),
            Self::Console { path, program } => next(CONSOLE_POLL, || {
                let bytes =
                    std::fs::read(path.as_path()).map_err(Unable::failed("reading the guest's console"))?;
                let units = units_said(&String::from_utf8_lossy(&bytes), program);
                Ok(units.map_err(Unable::Wrong)?.map(|units| (units, units)))
            }),
            Self::Commands(benchmark) => {
                benchmark
                    .ensure_it_goes_on(SILENCE_LIMIT)
                    .map_err(Unable::failed("running redis-benchmark"))?;
                let (asked, units) = crowd
                    .commands_served(VM)
                    .map_err(Unable::failed("asking the guest what it has done"))?;
                Ok(Done {
                    at_ns: monotonic_ns().saturating_sub(nanos(asked.elapsed())),
                    units,
                })
            }
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Waits until something else is said than at first, and returns what then is done.
fn next<W: PartialEq>(
    poll: Duration,
    mut look: impl FnMut() -> Result<Option<(W, u64)>, Unable>,
) -> Result<Done, Unable> {
    let before = look()?.map(|(word, _)| word);
    let deadline = Instant::now() + SILENCE_LIMIT;
    loop {
        let at_ns = monotonic_ns();
        if let Some((word, units)) = look()?
            && Some(&word) != before.as_ref()
        {
            return Ok(Done { at_ns, units });
        }
        if Instant::now() > deadline {
            return Err(Unable::Wrong("the guest does not go on".to_owned()));
        }
        std::thread::sleep(poll);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_word_is_waited_for_and_time_is_told_by_unit() {
        let mut words = [7, 7, 7, 9].into_iter();
        let done = next(Duration::ZERO, || Ok(words.next().map(|word| (word, 10 * word)))).unwrap();
        assert_eq!(done.units, 90);
        let before = Done { at_ns: 100, units: 5 };
        let after = Done { at_ns: 700, units: 8 };
        assert!((after.ns_a_unit_since(&before) - 200.0).abs() < 1e-9);
        assert!(before.ns_a_unit_since(&before).is_nan() || before.ns_a_unit_since(&before).is_infinite());
        let idle = Done { at_ns: 700, units: 5 };
        assert!(idle.ns_a_unit_since(&before).is_infinite());
    }
}
