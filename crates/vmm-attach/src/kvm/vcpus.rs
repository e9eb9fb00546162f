//! Run control: the threads that run the vCPUs, and how all of them are stopped and let go.
//!
//! ```text
//!            ┌──────────── stop() ────────────┐
//!            ▼                                │
//!   born ► still ──── run() ────► running ────┘──► ended (the handler said so)
//!          waits on a             KVM_RUN, handler,
//!          condition variable     KVM_RUN, ...
//! ```
//!
//! Invariants: a still vCPU has completed the input or output that its last exit asked for (a `KVM_RUN` that
//! does not enter the guest), so its registers are whole; its fd is locked by nobody. A kick cannot be missed:
//! the flag is set before the signal is sent, and a vCPU clears its flag before it looks whether to stop.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use romulus_host_sys::kvm::{
    RunPage, allow_kicks, current_thread_id, kick_thread, settle_timers, with_kick_pending,
};
use romulus_host_sys::{SysError, monotonic_ns};

use super::lapic;
use crate::server::Stopped;

/// No moment yet.
const NEVER: u64 = u64::MAX;

/// Why vCPUs could not be started, stopped or looked at.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The kernel refused something.
    #[error("vCPU {vcpu}: {source}")]
    Kernel {
        /// The vCPU.
        vcpu: usize,
        /// What it said.
        source: SysError,
    },
    /// No thread could be had.
    #[error("no thread for vCPU {vcpu}: {source}")]
    Thread {
        /// The vCPU.
        vcpu: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A vCPU did not stop in time; all run on. Its handler of exits takes too long, or the host is overloaded.
    #[error("{running} vCPUs did not stop within {limit_ms} ms; the guest runs on")]
    Stuck {
        /// How many were still running.
        running: usize,
        /// The limit.
        limit_ms: u64,
    },
    /// The guest is not stopped, or was let go in the meantime.
    #[error("vCPU {0} runs; it can be read and written while it is stopped")]
    NotStopped(usize),
    /// There is no such vCPU.
    #[error("there is no vCPU {0}")]
    Unknown(usize),
    /// No vCPU entered the guest in time.
    #[error("no vCPU entered the guest within {limit_ms} ms")]
    NotEntered {
        /// The limit.
        limit_ms: u64,
    },
}

/// What a vCPU does after its exit was handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Runs on.
    Run,
    /// Never runs again: the guest is off, or cannot go on.
    End,
}

/// The vCPUs of a machine with their threads. Born still; ended when dropped.
#[derive(Debug)]
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    vcpus: Vec<Vcpu>,
    /// What `gate.stop` says, to look at between two entries into the guest.
    stop: AtomicBool,
    gate: Mutex<Gate>,
    /// A vCPU came to stand, or entered.
    changed: Condvar,
    /// They may run, or have to end.
    go: Condvar,
    /// When the first vCPU went on after it was let go last.
    gone_on_at_ns: AtomicU64,
    /// Somebody waits for the first entry.
    entry_awaited: AtomicBool,
    ring_full: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Debug)]
struct Vcpu {
    fd: Mutex<VcpuFd>,
    page: RunPage,
    thread_id: AtomicI32,
    /// See [`Vcpus::timer_delivered`].
    timer_delivered: AtomicBool,
}

#[derive(Debug)]
struct Gate {
    stop: bool,
    /// vCPUs that stand still or have ended.
    still: usize,
    shutdown: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

impl Vcpus {
    /// Starts a thread for each vCPU, standing still. `make_handler` is asked once for each, by its index, for
    /// what handles its exits: every exit of `KVM_RUN` except interruptions and full dirty rings, or the error
    /// that `KVM_RUN` ended with. A handler runs on the vCPU's thread and must not take long, as a stop waits
    /// for it.
    ///
    /// # Errors
    /// [`VcpuError::Kernel`], [`VcpuError::Thread`].
    pub fn spawn<H>(fds: Vec<VcpuFd>, mut make_handler: impl FnMut(usize) -> H) -> Result<Self, VcpuError>
    where
        H: FnMut(Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Next + Send + 'static,
    {
        let kernel = |vcpu| move |source| VcpuError::Kernel { vcpu, source };
        allow_kicks().map_err(kernel(0))?;
        let mut vcpus = Vec::with_capacity(fds.len());
        for (index, fd) in fds.into_iter().enumerate() {
            vcpus.push(Vcpu {
                page: RunPage::map(&fd).map_err(kernel(index))?,
                fd: Mutex::new(fd),
                thread_id: AtomicI32::new(0),
                timer_delivered: AtomicBool::new(false),
            });
        }
        let gate = Gate {
            stop: true,
            still: 0,
            shutdown: false,
        };
        let shared = Arc::new(Shared {
            vcpus,
            stop: AtomicBool::new(true),
            gate: Mutex::new(gate),
            changed: Condvar::new(),
            go: Condvar::new(),
            gone_on_at_ns: AtomicU64::new(NEVER),
            entry_awaited: AtomicBool::new(false),
            ring_full: OnceLock::new(),
        });
        let mut all = Self {
            shared,
            threads: Vec::new(),
        };
        for index in 0..all.shared.vcpus.len() {
            let (shared, handler) = (Arc::clone(&all.shared), make_handler(index));
            let thread = std::thread::Builder::new().name(format!("vcpu-{index}"));
            let thread = thread.spawn(move || shared.thread(index, handler));
            all.threads
                .push(thread.map_err(|source| VcpuError::Thread { vcpu: index, source })?);
        }
        let mut gate = all.shared.lock();
        while gate.still < all.threads.len() {
            gate = all
                .shared
                .changed
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(gate);
        Ok(all)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.shared.vcpus.len()
    }

    /// Stops all vCPUs; when they stand still already, that is told.
    ///
    /// # Errors
    /// [`VcpuError::Stuck`] when one does not stop within `limit`; then all run on.
    pub fn stop(&self, limit: Duration) -> Result<Stopped, VcpuError> {
        let started = monotonic_ns();
        let shared = &*self.shared;
        let mut gate = shared.lock();
        if !gate.stop {
            gate.stop = true;
            shared.stop.store(true, Ordering::SeqCst);
            drop(gate);
            for vcpu in &shared.vcpus {
                vcpu.page.set_immediate_exit(true);
                kick_thread(vcpu.thread_id.load(Ordering::Relaxed));
            }
            gate = shared.lock();
        }
        let all = shared.vcpus.len();
        let (gate, _) = shared
            .changed
            .wait_timeout_while(gate, limit, |gate| gate.still < all)
            .unwrap_or_else(PoisonError::into_inner);
        if gate.still < all {
            let running = all - gate.still;
            shared.release(gate);
            let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            return Err(VcpuError::Stuck { running, limit_ms });
        }
        let stopped_at_ns = monotonic_ns();
        Ok(Stopped {
            stopped_at_ns,
            kick_ns: stopped_at_ns - started,
        })
    }

    /// Lets all vCPUs run. Returns the moment, on CLOCK_MONOTONIC, in nanoseconds.
    pub fn run(&self) -> u64 {
        let shared = &*self.shared;
        shared.release(shared.lock());
        // One that was waiting for a core may have taken ours: it runs since then, and not since we are back.
        monotonic_ns().min(shared.gone_on_at_ns.load(Ordering::SeqCst))
    }

    /// Lets all vCPUs run and waits until the first of them is about to enter the guest. Returns that moment, on
    /// CLOCK_MONOTONIC, in nanoseconds.
    ///
    /// # Errors
    /// [`VcpuError::NotEntered`].
    pub fn run_and_wait_entry(&self, limit: Duration) -> Result<u64, VcpuError> {
        let shared = &*self.shared;
        shared.entry_awaited.store(true, Ordering::SeqCst);
        shared.release(shared.lock());
        let gone_on = || Some(shared.gone_on_at_ns.load(Ordering::SeqCst)).filter(|at| *at != NEVER);
        let waited = shared
            .changed
            .wait_timeout_while(shared.lock(), limit, |_| gone_on().is_none());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        gone_on().ok_or(VcpuError::NotEntered { limit_ms })
    }

    /// Whether they were told to stand still.
    pub fn stopped(&self) -> bool {
        self.shared.lock().stop
    }

    /// Gives the fd of a vCPU that stands still.
    ///
    /// # Errors
    /// [`VcpuError::NotStopped`], [`VcpuError::Unknown`].
    pub fn with<R>(&self, index: usize, use_it: impl FnOnce(&VcpuFd) -> R) -> Result<R, VcpuError> {
        let vcpu = self.shared.vcpus.get(index).ok_or(VcpuError::Unknown(index))?;
        if !self.stopped() {
            return Err(VcpuError::NotStopped(index));
        }
        // Never waits: a vCPU that was let go just now holds its lock until the next stop.
        match vcpu.fd.try_lock() {
            Ok(fd) => Ok(use_it(&fd)),
            Err(TryLockError::Poisoned(fd)) => Ok(use_it(&fd.into_inner())),
            Err(TryLockError::WouldBlock) => Err(VcpuError::NotStopped(index)),
        }
    }

    /// Whether the LAPIC's timer of a vCPU that stands still is a one-shot timer that has expired, and whose interrupt had
    /// reached the LAPIC when the vCPU came to stand: then it must not be started anew elsewhere. Any other timer must,
    /// one that expires while the vCPU stands still among them.
    ///
    /// # Panics
    /// When there is no such vCPU.
    pub fn timer_delivered(&self, index: usize) -> bool {
        self.shared.vcpus[index].timer_delivered.load(Ordering::SeqCst)
    }

    /// Says what harvests the dirty rings when one is full: it runs on that vCPU's thread, and the vCPU goes on after it.
    /// Without it the handler of exits gets to see `KVM_EXIT_DIRTY_RING_FULL`.
    ///
    /// # Panics
    /// When it was said before.
    pub fn on_ring_full(&self, harvest: Box<dyn Fn() + Send + Sync>) {
        let set = self.shared.ring_full.set(harvest);
        assert!(set.is_ok(), "a machine has one tracker");
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        let shared = &*self.shared;
        shared.lock().shutdown = true;
        shared.stop.store(true, Ordering::SeqCst);
        shared.go.notify_all();
        for vcpu in &shared.vcpus {
            vcpu.page.set_immediate_exit(true);
            kick_thread(vcpu.thread_id.load(Ordering::Relaxed));
        }
        for thread in self.threads.drain(..) {
            // A handler that panicked has said so; there is nothing else to do about it here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, mut gate: MutexGuard<'_, Gate>) {
        gate.stop = false;
        self.gone_on_at_ns.store(NEVER, Ordering::SeqCst);
        self.stop.store(false, Ordering::SeqCst);
        drop(gate);
        self.go.notify_all();
    }

    /// The life of a vCPU's thread.
    fn thread<H>(&self, index: usize, mut handler: H)
    where
        H: FnMut(Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Next,
    {
        let vcpu = &self.vcpus[index];
        vcpu.thread_id.store(current_thread_id(), Ordering::Relaxed);
        // Counts as still from its end on, however it ends, a panic of the handler included.
        let _ended = Ended(self);
        while self.stand() {
            let mut fd = vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
            if self.run(&mut fd, &vcpu.page, &mut handler) == Next::End {
                return;
            }
            match self.deliver_timer(&mut fd, &vcpu.page, &mut handler) {
                Ok(delivered) => vcpu.timer_delivered.store(delivered, Ordering::SeqCst),
                Err(Next::Run) => vcpu.timer_delivered.store(false, Ordering::SeqCst),
                Err(Next::End) => return,
            }
        }
    }

    /// Stands still until it may run; false when it has to end.
    fn stand(&self) -> bool {
        let mut gate = self.lock();
        gate.still += 1;
        if gate.still == self.vcpus.len() {
            self.changed.notify_all();
        }
        while gate.stop && !gate.shutdown {
            gate = self.go.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.still -= 1;
        if self.gone_on_at_ns.fetch_min(monotonic_ns(), Ordering::SeqCst) == NEVER {
            self.changed.notify_all();
        }
        let runs = !gate.shutdown;
        drop(gate);
        // Whoever waits is often woken on this very core, which a guest that never waits keeps for milliseconds: it goes first.
        if self.entry_awaited.swap(false, Ordering::SeqCst) {
            std::thread::yield_now();
        }
        runs
    }

    /// Runs until it has to stand still (`Next::Run`) or never runs again.
    fn run<H>(&self, fd: &mut VcpuFd, page: &RunPage, handler: &mut H) -> Next
    where
        H: FnMut(Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Next,
    {
        page.set_immediate_exit(false);
        while !self.stop.load(Ordering::SeqCst) {
            if let Step::Exit(Next::End) | Step::Failed(Next::End) = self.step(fd, handler) {
                return Next::End;
            }
        }
        page.set_immediate_exit(true);
        // Completes the input or output of the last exit without entering the guest. One instruction can take
        // several exits.
        self.until_interrupted(fd, handler)
    }

    /// One `KVM_RUN`, with what its handler says.
    fn step<H>(&self, fd: &mut VcpuFd, handler: &mut H) -> Step
    where
        H: FnMut(Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Next,
    {
        match fd.run() {
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) if self.ring_full.get().is_some() => {
                self.ring_full.get().expect("looked at just now")();
                Step::Exit(Next::Run)
            }
            Ok(exit) => Step::Exit(handler(Ok(exit))),
            Err(error) if interrupted(error) => Step::Interrupted,
            Err(error) => Step::Failed(handler(Err(error))),
        }
    }

    fn until_interrupted<H>(&self, fd: &mut VcpuFd, handler: &mut H) -> Next
    where
        H: FnMut(Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Next,
    {
        loop {
            match self.step(fd, handler) {
                Step::Interrupted => return Next::Run,
                Step::Exit(Next::Run) => {}
                Step::Exit(Next::End) => return Next::End,
                Step::Failed(next) => return next,
            }
        }
    }

    /// Finds out whether the one-shot timer of the vCPU, which has just come to stand, has expired, and has its interrupt
    /// delivered to the LAPIC then. Costs one look at the LAPIC, and more only when the registers leave a doubt.
    fn deliver_timer<H>(&self, fd: &mut VcpuFd, page: &RunPage, handler: &mut H) -> Result<bool, Next>
    where
        H: FnMut(Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Next,
    {
        // Without a LAPIC of the kernel's there is no timer. Whoever saves the vCPU is told when this fails.
        let Ok(lapic) = fd.get_lapic() else {
            return Ok(false);
        };
        if !lapic::expired(&lapic) {
            return Ok(false);
        }
        if lapic::requested(&lapic) {
            return Ok(true);
        }
        if timers_need_entry() {
            return Ok(lapic::in_service(&lapic));
        }
        settle_timers();
        page.set_immediate_exit(false);
        let ran = with_kick_pending(fd, |fd| self.until_interrupted(fd, handler));
        page.set_immediate_exit(true);
        match ran {
            Ok(Next::Run) => Ok(true),
            Ok(Next::End) => Err(Next::End),
            Err(error) => {
                tracing::warn!(%error, "a timer of the guest may fire twice after a takeover");
                Ok(false)
            }
        }
    }
}

/// What one `KVM_RUN` came to.
enum Step {
    /// It did not enter the guest, or was made to leave it.
    Interrupted,
    /// An exit, handled.
    Exit(Next),
    /// An error, told to the handler.
    Failed(Next),
}

/// Whether KVM may have left a timer to the processor (the preemption timer of VMX): that one expires at an entry into the
/// guest and not before, so a `KVM_RUN` that does not enter says nothing about it.
fn timers_need_entry() -> bool {
    const VMX: u32 = 1 << 5;
    std::arch::x86_64::__cpuid(1).ecx & VMX != 0
}

/// `KVM_RUN` ended because of a signal, the flag, or because the vCPU waits for a start-up message.
fn interrupted(error: kvm_ioctls::Error) -> bool {
    [libc::EINTR, libc::EAGAIN].contains(&error.errno())
}

struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.lock().still += 1;
        self.0.changed.notify_all();
    }
}
