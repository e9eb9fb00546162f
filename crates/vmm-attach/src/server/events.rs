//! What the VMM tells its client unasked. Posting never waits, from whatever thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::proto::Event;

/// Most events that wait for a client. One that lets more come together is disconnected.
pub const EVENTS_MAX: usize = 64;

/// The way of the VMM's events to whichever client is attached. A clone is the same way.
#[derive(Clone, Debug)]
pub struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    waiting: Mutex<Waiting>,
    /// How often the machine changed.
    changes: AtomicU64,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Event>,
    lost: bool,
}

impl Events {
    /// A new way.
    ///
    /// # Errors
    /// The kernel's: no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            waiting: Mutex::new(Waiting::default()),
            changes: AtomicU64::new(0),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
    }

    /// Tells the client, if there is one. After [`Event::MachineChanged`] nothing is captured until a client has connected anew.
    pub fn post(&self, event: Event) {
        if event == Event::MachineChanged {
            self.0.changes.fetch_add(1, Ordering::SeqCst);
        }
        let mut waiting = self.waiting();
        if waiting.events.len() < EVENTS_MAX {
            waiting.events.push_back(event);
        } else {
            waiting.lost = true;
        }
        drop(waiting);
        self.wake();
    }

    /// How often the machine changed so far.
    pub(crate) fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::SeqCst)
    }

    /// Wakes the server.
    pub(crate) fn wake(&self) {
        // It can fail only when it has been woken 2^64 times already.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    /// What is readable after a wake.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    /// Takes what waits; `None` when some of it was lost.
    pub(crate) fn take(&self) -> Option<VecDeque<Event>> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0.wake, &mut count);
        let waiting = std::mem::take(&mut *self.waiting());
        (!waiting.lost).then_some(waiting.events)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
