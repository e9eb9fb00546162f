//! What a tour is doing: where its time goes, and what it was at when it takes too long.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The step that a tour is at, and the time that each of them took so far. Clones share it.
#[derive(Clone)]
pub struct Steps(Arc<Mutex<Now>>);

struct Now {
    hop: usize,
    step: &'static str,
    since: Instant,
    spent: BTreeMap<&'static str, Duration>,
}

impl Steps {
    /// Nothing was done yet.
    pub fn new() -> Self {
        Steps(Arc::new(Mutex::new(Now {
            hop: 0,
            step: "start",
            since: Instant::now(),
            spent: BTreeMap::new(),
        })))
    }

    /// A hop begins.
    pub fn hop(&self, hop: usize) {
        self.lock().hop = hop;
    }

    /// A step begins, and the one before it is over.
    pub fn to(&self, step: &'static str) {
        let mut now = self.lock();
        let took = now.since.elapsed();
        let before = now.step;
        *now.spent.entry(before).or_default() += took;
        (now.step, now.since) = (step, Instant::now());
    }

    /// The hop, and how long its step takes by now.
    pub fn at(&self) -> (usize, Duration) {
        let now = self.lock();
        (now.hop, now.since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = self.lock();
        writeln!(
            f,
            "hop {}, for {:.1} s at: {}",
            now.hop,
            now.since.elapsed().as_secs_f64(),
            now.step
        )?;
        let hops = now.hop.max(1) as f64;
        let mut spent: Vec<_> = now.spent.iter().collect();
        spent.sort_by_key(|(_, time)| std::cmp::Reverse(**time));
        for (step, time) in spent {
            writeln!(f, "{:8.2} ms a hop  {step}", time.as_secs_f64() * 1e3 / hops)?;
        }
        Ok(())
    }
}
