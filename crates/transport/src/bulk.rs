//! A second thread for connections with much to do.
//!
//! All tasks of a daemon share one thread, which has to answer within milliseconds and is raised above others for it. A connection that takes a
//! good part of that thread would have all others wait, and keep a core from whoever else needs it. So its tasks move to a thread of
//! ordinary work until it is quiet again:
//!
//! ```text
//!   thread of the endpoint   socket, new connections, quiet connections, drivers      answers soon
//!        │ ▲
//!        ▼ │ tasks of one connection, all of them: quinn's own, and what is spawned for it
//!   "bulk"                   busy connections                                         takes turns
//! ```
//!
//! All tasks of a connection move, because they share quinn's lock on it: one that has to answer soon must never wait for a thread that
//! may not run just now. A connection at rest costs nothing more than without all this.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use rustix::time::{ClockId, clock_gettime};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tracing::{debug, warn};

/// For so long work is added up before it is judged.
const WINDOW: Duration = Duration::from_millis(50);
/// A connection that takes more of a core than this moves to the second thread…
const BUSY_PERCENT: u32 = 10;
/// … and back when it takes less.
const QUIET_PERCENT: u32 = 4;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Which thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The endpoint's.
    Prompt,
    Bulk,
}

/// The two threads. The second begins when a connection first needs it, and ends with the last clone of this.
#[derive(Clone, Debug)]
pub struct Bulk(Arc<Threads>);

#[derive(Debug)]
struct Threads {
    prompt: Handle,
    /// None where it could not be started: then all stay.
    bulk: OnceLock<Option<Handle>>,
    begin: fn(),
    ended: Arc<Notify>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.ended.notify_one();
    }
}

impl Bulk {
    /// Beside the thread of the runtime that this is called in. The second one calls `begin` first, to set its priority.
    pub fn new(begin: fn()) -> Self {
        Self(Arc::new(Threads {
            prompt: Handle::current(),
            bulk: OnceLock::new(),
            begin,
            ended: Arc::new(Notify::new()),
        }))
    }

    fn handle(&self, place: Place) -> Option<&Handle> {
        match place {
            Place::Prompt => Some(&self.0.prompt),
            Place::Bulk => self.0.bulk.get_or_init(|| self.start()).as_ref(),
        }
    }

    fn start(&self) -> Option<Handle> {
        let (begin, ended) = (self.0.begin, Arc::clone(&self.0.ended));
        let started = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .and_then(|runtime| {
                let handle = runtime.handle().clone();
                std::thread::Builder::new().name("bulk".into()).spawn(move || {
                    begin();
                    runtime.block_on(ended.notified());
                })?;
                Ok(handle)
            });
        started
            .inspect_err(
                |error| warn!(%error, "no thread for connections with much to do: they stay where all are"),
            )
            .ok()
    }
}

/// What the tasks of one connection do, and where.
#[derive(Debug)]
pub(crate) struct Load {
    threads: Bulk,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    place: Place,
    window: Window,
}

impl Load {
    pub(crate) fn new(threads: &Bulk) -> Arc<Self> {
        Arc::new(Self {
            threads: threads.clone(),
            now: Mutex::new(Now {
                place: Place::Prompt,
                window: Window::new(Instant::now()),
            }),
        })
    }

    /// Runs a task of this connection, wherever that is.
    pub(crate) fn spawn(self: &Arc<Self>, task: Task) {
        let load = Arc::clone(self);
        let place = load.place();
        Placed { task, place, load }.start();
    }

    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self) -> Place {
        self.now().place
    }

    /// A task took so much of the thread at `place`.
    fn took(&self, place: Place, work: Duration) {
        let mut now = self.now();
        if now.place != place {
            return;
        }
        let Some(percent) = now.window.add(work, Instant::now()) else {
            return;
        };
        let next = after(place, percent);
        if next != place && self.threads.handle(next).is_some() {
            debug!(percent, ?next, "a connection moves");
            now.place = next;
        }
    }
}

/// Where a connection belongs that took so much of a core where it is.
fn after(place: Place, percent: u32) -> Place {
    match place {
        Place::Prompt if percent > BUSY_PERCENT => Place::Bulk,
        Place::Bulk if percent < QUIET_PERCENT => Place::Prompt,
        stays => stays,
    }
}

/// Work of the last [`WINDOW`], or of the time since there was some.
#[derive(Debug)]
struct Window {
    began: Instant,
    work: Duration,
}

impl Window {
    fn new(began: Instant) -> Self {
        let work = Duration::ZERO;
        Self { began, work }
    }

    /// Per cent of the window that was worked, once it is over.
    fn add(&mut self, work: Duration, now: Instant) -> Option<u32> {
        self.work += work;
        let passed = now.saturating_duration_since(self.began);
        if passed < WINDOW {
            return None;
        }
        let percent = self.work.as_nanos() * 100 / passed.as_nanos();
        *self = Self::new(now);
        Some(u32::try_from(percent).unwrap_or(u32::MAX))
    }
}

/// A task that is polled where its connection is.
struct Placed {
    task: Task,
    place: Place,
    load: Arc<Load>,
}

impl Placed {
    fn start(self) {
        let threads = self.load.threads.clone();
        let handle = threads.handle(self.place);
        handle.expect("nobody moves where there is no thread").spawn(self);
    }
}

impl Future for Placed {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let place = self.load.place();
        if place != self.place {
            // Its wakers point here until it is polled there, which comes at once.
            let task = std::mem::replace(&mut self.task, Box::pin(std::future::ready(())));
            let load = Arc::clone(&self.load);
            Self { task, place, load }.start();
            return Poll::Ready(());
        }
        let began = Stamp::now(place);
        let polled = self.task.as_mut().poll(context);
        self.load.took(place, began.elapsed());
        polled
    }
}

/// When a poll began, by the clock that tells work at a place: the second thread is made to wait by others, the first hardly ever, and
/// time is cheaper to ask for than work.
enum Stamp {
    Time(Instant),
    Work(Duration),
}

impl Stamp {
    fn now(place: Place) -> Self {
        match place {
            Place::Prompt => Self::Time(Instant::now()),
            Place::Bulk => Self::Work(thread_work()),
        }
    }

    fn elapsed(&self) -> Duration {
        match self {
            Self::Time(began) => began.elapsed(),
            Self::Work(began) => thread_work().saturating_sub(*began),
        }
    }
}

fn thread_work() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// tokio as quinn needs it, where connections have a [`Load`].
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Of the connection that is being made.
    next: Mutex<Option<Weak<Load>>>,
    making: Mutex<()>,
}

impl Places {
    /// Has `make` make a connection whose tasks are counted as `load`'s, if there is one. `make` must not wait.
    pub(crate) fn with<T>(&self, load: Option<&Arc<Load>>, make: impl FnOnce() -> T) -> T {
        let _one_at_a_time = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        *self.next() = load.map(Arc::downgrade);
        let made = make();
        *self.next() = None;
        made
    }

    fn next(&self) -> std::sync::MutexGuard<'_, Option<Weak<Load>>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runtime for Places {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, task: Task) {
        let load = self.next().as_ref().and_then(Weak::upgrade);
        match load {
            Some(load) => load.spawn(task),
            // The endpoint's own.
            None => TokioRuntime.spawn(task),
        }
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> std::io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[cfg(test)]
#[path = "bulk_tests.rs"]
mod tests;
