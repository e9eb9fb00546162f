//! The gate itself: a thread that reads what the guest sends, and the calls that decide when it leaves.
//!
//! ```text
//!   prepare ──► close ──► barrier(k) release(k) barrier(k+1) … ──┬─► open_and_remove   (granted: speak alone)
//!      │                                                        ├─► discard           (refused: never speak again)
//!      └── drop: no trace                                       └─► drop, crash       (mute: fails closed)
//! ```
//!
//! Locks, in this order: `writer` (who writes to the relay, so that frames leave in order), then `held` (the queue).
//! `barrier` takes only `held`, which nobody keeps for longer than a batch of reads: it is called while the guest stands still.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{JoinHandle, Thread};
use std::time::Instant;

use romulus_host_sys::tap::{Tap, VNET_HEADER_BYTES};
use romulus_types::{Epoch, Time};
use rustix::buffer::spare_capacity;
use rustix::event::{self, EventfdFlags, PollFd, PollFlags, Timespec};

use crate::error::GateError;
use crate::learn::{LearntAddress, LearntTable};
use crate::plumbing::{self, Plumbing};
use crate::queue::{Chunk, HeldQueue};
use crate::stats::GateStats;

/// Frames that the relay thread reads before it lets go of the lock.
const BATCH_FRAMES: usize = 16;
/// When frames come, the relay thread waits for this long before it reads them: waking it for every frame would take time from the
/// guest, and make it more likely that a barrier finds the queue locked by a thread that is not running; and a thread that
/// reads while the guest sends takes turns with it at the same memory. A barrier finds what came in such a time, at most.
const REST: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};
/// How long `open_and_remove` waits for frames that were on their way when the filter went.
const LINGER: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// What to gate, and how much to hold.
#[derive(Clone, Debug)]
pub struct GateOptions {
    /// Name of the guest's tap, in the network namespace of the caller.
    pub tap: String,
    /// Name for the relay tap; by default the kernel numbers it, `romgate0` and so on.
    pub relay_name: Option<String>,
    /// Most bytes held. What comes when it is reached is dropped and counted, as on a slow wire: it is never sent early.
    pub held_bytes_max: usize,
    /// Most frames held.
    pub held_frames_max: usize,
    /// Unparked each time frames were read that are held: for whoever waits for [`Gate::holds_output`].
    pub unparks: Option<Thread>,
}

impl GateOptions {
    /// The gate of `tap` with default limits: 64 MiB and 65,536 frames.
    pub fn new(tap: impl Into<String>) -> Self {
        Self {
            tap: tap.into(),
            relay_name: None,
            held_bytes_max: 64 << 20,
            held_frames_max: 65_536,
            unparks: None,
        }
    }
}

/// A packet gate on one tap. See the [crate] for what it does.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    plumbing: Mutex<Plumbing>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    relay: Tap,
    wake: OwnedFd,
    stop: AtomicBool,
    unparks: Option<Thread>,
    start: Instant,
    writer: Mutex<()>,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    queue: HeldQueue,
    learnt: LearntTable,
    /// Why the relay cannot be read any more.
    lost: Option<rustix::io::Errno>,
}

/// Taking a lock that a panicking thread held means that an invariant of ours is broken: give up, which mutes the guest.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panicked with this lock")
}

impl Gate {
    /// Puts everything in place but the filter that closes the gate: the guest's output still flows freely.
    ///
    /// # Errors
    /// [`GateError::Stale`] and [`GateError::InUse`] when there is a gate already, [`GateError::RunsBefore`] when something
    /// would see the frames before us, and whatever the kernel refuses. Then nothing is left behind.
    pub fn prepare(options: &GateOptions) -> Result<Self, GateError> {
        let relay_name = options.relay_name.as_deref().unwrap_or("romgate%d");
        let (plumbing, relay) = Plumbing::prepare(&options.tap, relay_name)?;
        let wake = event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| GateError::Thread(e.into()))?;
        let shared = Arc::new(Shared {
            relay,
            wake,
            stop: AtomicBool::new(false),
            unparks: options.unparks.clone(),
            start: Instant::now(),
            writer: Mutex::new(()),
            held: Mutex::new(Held {
                queue: HeldQueue::new(options.held_bytes_max, options.held_frames_max),
                learnt: LearntTable::default(),
                lost: None,
            }),
        });
        let reader = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("packet-gate".into())
            .spawn(move || reader.run())
            .map_err(GateError::Thread)?;
        Ok(Self {
            shared,
            plumbing: Mutex::new(plumbing),
            thread: Some(thread),
        })
    }

    /// Closes the gate: every frame that the guest sends from now on is held. One netlink message; to be called while the guest
    /// is stopped at a barrier, so that nothing is between held and not held.
    ///
    /// # Errors
    /// [`GateError::Netlink`]; the gate is open then.
    pub fn close(&self) -> Result<(), GateError> {
        lock(&self.plumbing).close()
    }

    /// Ends `epoch`: all that the guest has sent until now belongs to it, what comes later to the next one. To be called
    /// while the guest is stopped and its devices drained. Before [`Gate::close`] it only sets the number.
    ///
    /// # Errors
    /// [`GateError::RelayLost`]: the guest is mute.
    ///
    /// # Panics
    /// When a later epoch has begun already.
    pub fn barrier(&self, epoch: Epoch) -> Result<(), GateError> {
        let mut held = lock(&self.shared.held);
        while self.shared.read_batch(&mut held) {}
        held.queue.barrier(epoch);
        self.shared.check(&held)
    }

    /// Whether frames of the epoch that is running are held. What the guest has just sent may take until
    /// [`GateOptions::unparks`] is unparked, a millisecond, to be seen.
    pub fn holds_output(&self) -> bool {
        lock(&self.shared.held).queue.holds_current()
    }

    /// Sends what is held of the epochs up to and with `up_to`, in order.
    ///
    /// # Errors
    /// [`GateError::RelayLost`], [`GateError::Discarded`].
    ///
    /// # Panics
    /// When `up_to` has not ended by a barrier: that would be output before its commit.
    pub fn release(&self, up_to: Epoch) -> Result<(), GateError> {
        let _writer = lock(&self.shared.writer);
        {
            let held = lock(&self.shared.held);
            let current = held.queue.current();
            assert!(
                up_to < current,
                "release of epoch {up_to} while {current} is running"
            );
            self.refuse_discarded(&held)?;
        }
        self.shared.send(up_to)
    }

    /// Sends everything that is held, in order, and takes the gate away, without a trace. For a host that was granted to speak
    /// alone. A frame that the guest sends at this very moment may overtake one before it.
    ///
    /// # Errors
    /// [`GateError::Discarded`], [`GateError::RelayLost`], [`GateError::Netlink`]. The guest is mute then, and
    /// [`Gate::remove_stale`] can be tried.
    pub fn open_and_remove(mut self) -> Result<GateStats, GateError> {
        let everything = Epoch(u64::MAX);
        {
            let _writer = lock(&self.shared.writer);
            self.refuse_discarded(&lock(&self.shared.held))?;
            self.shared.read_all();
            self.shared.send(everything)?;
            lock(&self.plumbing).open()?;
            loop {
                self.shared.read_all();
                self.shared.send(everything)?;
                let mut relay = [PollFd::new(&self.shared.relay, PollFlags::IN)];
                if !matches!(event::poll(&mut relay, Some(&LINGER)), Ok(1..)) {
                    break;
                }
            }
        }
        lock(&self.plumbing).remove()?;
        self.stop_thread()?;
        Ok(self.stats())
    }

    /// Drops all that is held and all that comes, for good: the other host was granted to speak. The guest stays mute, also when
    /// this value is dropped.
    pub fn discard(&self) {
        lock(&self.shared.held).queue.discard();
    }

    /// The counters.
    pub fn stats(&self) -> GateStats {
        let dropped_by_kernel_frames = lock(&self.plumbing).kernel_drops();
        GateStats {
            dropped_by_kernel_frames,
            ..lock(&self.shared.held).queue.stats().clone()
        }
    }

    /// The guest's addresses, as far as its held frames have shown them.
    pub fn learnt(&self) -> Vec<LearntAddress> {
        lock(&self.shared.held).learnt.addresses()
    }

    /// Name of the guest's tap.
    pub fn tap_name(&self) -> String {
        lock(&self.plumbing).tap_name().to_owned()
    }

    /// Name of the relay tap.
    pub fn relay_name(&self) -> &str {
        self.shared.relay.name()
    }

    /// Whether output is held.
    pub fn is_closed(&self) -> bool {
        lock(&self.plumbing).is_closed()
    }

    /// Looks whether other programs have left the gate alone; to be called now and then (some 50 µs).
    ///
    /// # Errors
    /// [`GateError::FilterLost`] and [`GateError::RunsBefore`]: output can leave unheld. [`GateError::RelayLost`]: the guest is mute.
    pub fn check(&self) -> Result<(), GateError> {
        lock(&self.plumbing).check()?;
        self.shared.check(&lock(&self.shared.held))
    }

    /// Takes away what a gate on `tap` left when its process died, and so lets the guest speak again: only for a host that
    /// the witness's record lets speak. `false`: there was nothing. Filters and qdiscs of others are not touched.
    ///
    /// # Errors
    /// [`GateError::InUse`] when the other process is alive; [`GateError::NoSuchTap`]; what the kernel refuses.
    pub fn remove_stale(tap: &str) -> Result<bool, GateError> {
        plumbing::remove_stale(tap)
    }

    fn refuse_discarded(&self, held: &Held) -> Result<(), GateError> {
        if held.queue.is_discarded() {
            Err(GateError::Discarded { tap: self.tap_name() })
        } else {
            Ok(())
        }
    }

    fn stop_thread(&mut self) -> Result<(), GateError> {
        self.shared.stop.store(true, Ordering::Release);
        rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes()).map_err(|e| GateError::Thread(e.into()))?;
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the relay thread does not panic");
        }
        Ok(())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return; // joining could wait for a lock that this thread holds
        }
        if let Err(error) = self.stop_thread() {
            tracing::warn!(%error, "the gate's thread goes on until the process ends");
        }
    }
}

impl Shared {
    /// The relay thread: reads as frames come, so that a barrier finds little left to read.
    fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [
                PollFd::new(&self.relay, PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match event::poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => (),
                Err(error) => return self.lose(error),
            }
            let relay = fds[0].revents();
            if relay.contains(PollFlags::IN) {
                // Only being told to stop ends the rest early; anything else shows in the next round.
                let _ = event::poll(&mut fds[1..], Some(&REST));
                self.read_all();
                if lock(&self.held).lost.is_some() {
                    return;
                }
                self.unparks.iter().for_each(Thread::unpark);
            } else if !relay.is_empty() {
                return self.lose(rustix::io::Errno::BADFD);
            }
        }
    }

    fn lose(&self, error: rustix::io::Errno) {
        tracing::error!(relay = self.relay.name(), %error, "the packet gate's relay failed; the guest is mute");
        lock(&self.held).lost = Some(error);
    }

    /// Reads some frames, at most [`BATCH_FRAMES`], and returns whether there may be more.
    fn read_batch(&self, held: &mut Held) -> bool {
        let Held { queue, learnt, lost } = held;
        let read = |bytes: &mut Vec<u8>| rustix::io::read(&self.relay, spare_capacity(bytes)).map(drop);
        let look = |frame: &[u8]| learnt.learn(frame.get(VNET_HEADER_BYTES..).unwrap_or_default());
        match queue.receive(self.now(), BATCH_FRAMES, read, look) {
            Ok(()) => true,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
            Err(error) => {
                *lost = Some(error);
                false
            }
        }
    }

    /// Reads all there is; between two batches a barrier can have the lock.
    fn read_all(&self) {
        while self.read_batch(&mut lock(&self.held)) {}
    }

    /// Writes out what is held up to `up_to`. The caller holds `writer`.
    fn send(&self, up_to: Epoch) -> Result<(), GateError> {
        loop {
            let now = self.now();
            let Some(chunk) = lock(&self.held).queue.take(up_to, now) else {
                break;
            };
            let failed = self.write(&chunk);
            lock(&self.held).queue.give_back(chunk, failed);
        }
        let (surplus, result) = {
            let mut held = lock(&self.held);
            (held.queue.surplus(), self.check(&held))
        };
        drop(surplus);
        result
    }

    /// Writes the frames of a chunk and returns how many the kernel did not take: lost, as on a wire.
    fn write(&self, chunk: &Chunk) -> u64 {
        let mut failed = 0;
        for frame in chunk.frames() {
            let result = loop {
                match rustix::io::write(&self.relay, frame) {
                    Err(rustix::io::Errno::INTR) => (),
                    other => break other,
                }
            };
            if let Err(error) = result {
                failed += 1;
                tracing::debug!(relay = self.relay.name(), %error, bytes = frame.len(), "a released frame was not taken");
            }
        }
        failed
    }

    fn check(&self, held: &Held) -> Result<(), GateError> {
        match held.lost {
            None => Ok(()),
            Some(error) => Err(GateError::RelayLost {
                relay: self.relay.name().to_owned(),
                source: io::Error::from(error),
            }),
        }
    }

    fn now(&self) -> Time {
        Time::from_ns(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}
