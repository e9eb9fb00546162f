//! Cores, and the threads that take turns on them: one piece of work at a time, threads of a higher class first.
//!
//! ```text
//!   thread: work, work, …  ─► ready, by class ─► a free core ─► done ─► at the end of the line again
//! ```
//!
//! Nobody is interrupted: pieces of work are short. A thread does one piece at a time, in its order.

use std::collections::VecDeque;

/// Threads that a guest or everybody waits for.
pub(super) const URGENT: usize = 0;
/// Threads that compute, which the daemons give a lower priority.
pub(super) const LOW: usize = 1;
const CLASSES: usize = 2;

/// Index of a pool.
pub(super) type PoolId = usize;
/// Index of a thread.
pub(super) type ThreadId = usize;

struct Pool {
    cores: u64,
    free: u64,
    ready: [VecDeque<ThreadId>; CLASSES],
    busy_ns: u64,
}

struct Thread<T> {
    pool: PoolId,
    class: usize,
    work: VecDeque<(u64, T)>,
    /// Ready or on a core.
    scheduled: bool,
    busy_ns: u64,
}

/// All pools and threads. `T` says what follows from a piece of work.
pub(super) struct Cores<T> {
    pools: Vec<Pool>,
    threads: Vec<Thread<T>>,
}

/// A thread is on a core now, for so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Started {
    pub(super) thread: ThreadId,
    pub(super) duration_ns: u64,
}

impl<T> Cores<T> {
    pub(super) fn new() -> Self {
        Self {
            pools: Vec::new(),
            threads: Vec::new(),
        }
    }

    pub(super) fn add_pool(&mut self, cores: u64) -> PoolId {
        self.pools.push(Pool {
            cores,
            free: cores,
            ready: Default::default(),
            busy_ns: 0,
        });
        self.pools.len() - 1
    }

    pub(super) fn add_thread(&mut self, pool: PoolId, class: usize) -> ThreadId {
        self.threads.push(Thread {
            pool,
            class,
            work: VecDeque::new(),
            scheduled: false,
            busy_ns: 0,
        });
        self.threads.len() - 1
    }

    /// Whether a thread has nothing to do.
    pub(super) fn is_idle(&self, thread: ThreadId) -> bool {
        self.threads[thread].work.is_empty()
    }

    /// Gives a thread something to do after all else that it has.
    pub(super) fn push(&mut self, thread: ThreadId, duration_ns: u64, then: T) -> Option<Started> {
        self.threads[thread].work.push_back((duration_ns, then));
        self.schedule(thread)
    }

    /// Gives a thread something to do before all else that waits.
    pub(super) fn push_first(&mut self, thread: ThreadId, duration_ns: u64, then: T) -> Option<Started> {
        self.threads[thread].work.push_front((duration_ns, then));
        self.schedule(thread)
    }

    fn schedule(&mut self, id: ThreadId) -> Option<Started> {
        let thread = &mut self.threads[id];
        if thread.scheduled {
            return None;
        }
        thread.scheduled = true;
        let pool = &mut self.pools[thread.pool];
        pool.ready[thread.class].push_back(id);
        self.start_next(self.threads[id].pool)
    }

    fn start_next(&mut self, pool: PoolId) -> Option<Started> {
        let pool = &mut self.pools[pool];
        if pool.free == 0 {
            return None;
        }
        let thread = pool.ready.iter_mut().find_map(VecDeque::pop_front)?;
        pool.free -= 1;
        let (duration_ns, _) = self.threads[thread].work.front().expect("it has work");
        Some(Started {
            thread,
            duration_ns: *duration_ns,
        })
    }

    /// A thread is done with its piece of work, and leaves its core. To be followed by [`Cores::next`].
    pub(super) fn done(&mut self, id: ThreadId) -> (u64, T) {
        let thread = &mut self.threads[id];
        let (duration_ns, then) = thread.work.pop_front().expect("it was on a core");
        thread.busy_ns += duration_ns;
        thread.scheduled = false;
        let pool = &mut self.pools[thread.pool];
        pool.free += 1;
        pool.busy_ns += duration_ns;
        (duration_ns, then)
    }

    /// Puts a thread that is done at the end of the line, if it has more to do, and starts whoever is next.
    pub(super) fn next(&mut self, id: ThreadId) -> Option<Started> {
        let thread = &mut self.threads[id];
        if !thread.scheduled && !thread.work.is_empty() {
            thread.scheduled = true;
            self.pools[thread.pool].ready[thread.class].push_back(id);
        }
        self.start_next(self.threads[id].pool)
    }

    /// Time that the cores of a pool were busy, and how many there are.
    pub(super) fn pool_busy_ns(&self, pool: PoolId) -> (u64, u64) {
        (self.pools[pool].busy_ns, self.pools[pool].cores)
    }

    /// Time that a thread was busy.
    pub(super) fn thread_busy_ns(&self, thread: ThreadId) -> u64 {
        self.threads[thread].busy_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_take_turns_and_a_higher_class_goes_first() {
        let mut cores = Cores::new();
        let pool = cores.add_pool(1);
        let [low, other, urgent] = [LOW, LOW, URGENT].map(|class| cores.add_thread(pool, class));
        let started = cores.push(low, 5, "low 1").unwrap();
        assert_eq!((started.thread, started.duration_ns), (low, 5));
        for (thread, word) in [(low, "low 2"), (other, "other"), (urgent, "urgent")] {
            assert_eq!(cores.push(thread, 1, word), None, "the core is taken");
        }
        let mut order = Vec::new();
        let mut running = Some(started);
        while let Some(Started { thread, .. }) = running {
            order.push(cores.done(thread).1);
            running = cores.next(thread);
        }
        assert_eq!(order, ["low 1", "urgent", "other", "low 2"]);
        assert_eq!((cores.pool_busy_ns(pool), cores.thread_busy_ns(low)), ((8, 1), 6));
    }

    #[test]
    fn what_comes_first_is_done_before_all_else_that_waits() {
        let mut cores = Cores::new();
        let pool = cores.add_pool(2);
        let thread = cores.add_thread(pool, LOW);
        cores.push(thread, 1, 1).unwrap();
        cores.push(thread, 1, 3);
        assert_eq!(cores.done(thread), (1, 1));
        // What follows from a piece of work comes before what waits already.
        cores.push_first(thread, 1, 2).unwrap();
        assert_eq!(cores.next(thread), None, "a thread is on one core at a time");
        assert_eq!(cores.done(thread), (1, 2));
        cores.next(thread).unwrap();
        assert_eq!(cores.done(thread), (1, 3));
        assert!(cores.is_idle(thread));
    }
}
