//! The VMM's end: makes a machine attachable over a Unix socket.
//!
//! ```text
//!   client ══ socket ══ thread "attach": frames, descriptors, one request after the other
//!                                │ holds the desk while the machine is asked, never while it writes to the socket
//!                               desk ── Machine (the VMM)
//!                                │
//!                       thread "attach-watch": sleeps until a pause or a halt is over its limit, and lets the guest go
//! ```
//!
//! Invariants: a guest stands still only while a client holds a pause within its limit, or a halt that it keeps, or has
//! stopped it for good; when the connection ends, however it ends, the guest runs. Nothing that comes from a client makes this panic
//! or keeps more than one message of memory.

mod bind;
mod desk;
mod events;
mod machine;
mod options;
mod phase;
mod session;
mod watch;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

pub use bind::bind;
pub use events::{EVENTS_MAX, Events};
pub use machine::{Description, Machine, MachineError, StateWriter, Stopped};
pub use options::ServeOptions;

use crate::memfd;
use crate::proto::Role;
use desk::Desk;
use phase::Phase;
use watch::Shared;

/// A server that runs. When this is dropped it ends: events that were posted before are sent, for which a client has
/// [`ServeOptions::write_limit`], and a guest that the client held runs. So a VMM that ends because its guest did posts that and drops this.
#[derive(Debug)]
pub struct ServerHandle {
    shared: Arc<Shared>,
    events: Events,
    threads: Vec<JoinHandle<()>>,
}

/// Starts to serve clients, one at a time. `role` is [`Role::Running`] for a VMM with a guest, and [`Role::Empty`] for a standby.
///
/// # Errors
/// The kernel's: no memory, descriptor or thread left.
///
/// # Panics
/// With another role: a VMM does not begin with those.
pub fn serve(
    listener: UnixListener,
    role: Role,
    machine: Arc<dyn Machine>,
    options: ServeOptions,
) -> io::Result<ServerHandle> {
    let phase = match role {
        Role::Running => Phase::Running,
        Role::Empty => Phase::Empty,
        other => panic!("a VMM begins empty or running, not {other:?}"),
    };
    listener.set_nonblocking(true)?;
    let state = File::from(memfd::sealed("romulus-state", options.state_bytes_max)?);
    let events = options.events.clone();
    let shared = Arc::new(Shared::new(Desk::new(machine, options.clone(), phase, state)));
    let mut handle = ServerHandle {
        shared: Arc::clone(&shared),
        events,
        threads: Vec::new(),
    };
    let watched = Arc::clone(&shared);
    let events = handle.events.clone();
    let watch = thread::Builder::new()
        .name("attach-watch".into())
        .spawn(move || watch::run(&watched, &events))?;
    handle.threads.push(watch);
    let server = thread::Builder::new()
        .name("attach".into())
        .spawn(move || session::run(&listener, &shared, &options))?;
    handle.threads.push(server);
    Ok(handle)
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.shared.close();
        self.events.wake();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the attach server panicked");
            }
        }
    }
}
