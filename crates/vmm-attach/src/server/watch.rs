//! Lets the guest go when a stop is over its limit, whatever the client and the thread that serves it do.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use romulus_host_sys::monotonic_ns;

use super::Events;
use super::desk::Desk;

/// The desk, and how to wake the watch.
pub(crate) struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl Shared {
    pub(crate) fn new(desk: Desk) -> Self {
        Self {
            desk: Mutex::new(desk),
            changed: Condvar::new(),
        }
    }

    /// Works at the desk, and sees to it that the watch is awake in time for whatever was done there.
    pub(crate) fn at_desk<T>(&self, work: impl FnOnce(&mut Desk) -> T) -> T {
        let mut desk = self.lock();
        let done = work(&mut desk);
        if desk
            .phase
            .deadline_ns()
            .is_some_and(|until_ns| until_ns < desk.watch_until_ns)
        {
            self.changed.notify_all();
        }
        done
    }

    pub(crate) fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// A panic elsewhere must not keep the guest from being let go.
    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread.
pub(crate) fn run(shared: &Shared, events: &Events) {
    let mut desk = shared.lock();
    while !desk.closing {
        let now_ns = monotonic_ns();
        if let Some(event) = desk.expire(now_ns) {
            events.post(event);
        }
        desk.watch_until_ns = desk.next_look_ns(now_ns);
        let sleep = Duration::from_nanos(desk.watch_until_ns.saturating_sub(now_ns));
        desk = shared
            .changed
            .wait_timeout(desk, sleep)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}
