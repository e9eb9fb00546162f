//! The thread that serves the devices' queues: woken by the guest's doorbells and by frames on the taps.
//!
//! Every wait is edge-triggered: a queue that was woken is served until it has no request or the host has no input, and
//! either of them coming later wakes it again. A queue that gave up its turn early keeps a mark, so that nothing is lost
//! when the bus falls quiet in the middle.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use vm_memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::bus::Bus;

/// Mark of the event that has every queue looked at.
const LOOK: u64 = u64::MAX;
/// Descriptors that can wake the thread at once; more are taken the next time.
const EVENTS_MAX: usize = 16;

/// The running thread. It ends when this is dropped.
pub struct IoThread {
    end: Box<dyn Fn() + Send>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts to serve `bus`.
    ///
    /// # Errors
    /// The error of `epoll` or of starting a thread.
    pub fn start<M: GuestMemory + Send + 'static>(bus: Arc<Bus<M>>) -> io::Result<Self> {
        let mut turns = Turns {
            epoll: Epoll::new()?,
            queues: Vec::new(),
            waiting: Vec::new(),
        };
        for (device, wakes) in bus.wakes().iter().enumerate() {
            for (queue, kick) in wakes.kicks.iter().enumerate() {
                turns.watch(kick.as_raw_fd(), turns.queues.len() as u64)?;
                turns.queues.push((device, queue));
            }
        }
        bus.for_each_input(|device, input| {
            let first = turns.queues.iter().position(|(of, _)| *of == device);
            first.map_or(Ok(()), |index| turns.watch(input.as_raw_fd(), index as u64))
        })?;
        turns.watch(bus.look().as_raw_fd(), LOOK)?;
        turns.waiting = vec![false; turns.queues.len()];
        let served = bus.clone();
        let thread = std::thread::Builder::new()
            .name("devices".into())
            .spawn(move || turns.run(&served))?;
        Ok(IoThread {
            end: Box::new(move || bus.end()),
            thread: Some(thread),
        })
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        (self.end)();
        if let Some(thread) = self.thread.take() {
            // It panicked with the devices' lock held; whoever takes that lock says so.
            let _ = thread.join();
        }
    }
}

/// Which queues have something to do.
struct Turns {
    epoll: Epoll,
    /// Device and queue, by mark.
    queues: Vec<(usize, usize)>,
    waiting: Vec<bool>,
}

impl Turns {
    fn watch(&self, fd: i32, mark: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, mark);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    fn run<M: GuestMemory + Send>(mut self, bus: &Bus<M>) {
        loop {
            self.wait();
            for index in 0..self.queues.len() {
                if !self.waiting[index] {
                    continue;
                }
                let (device, queue) = self.queues[index];
                match bus.turn(device, queue) {
                    Some(more) => self.waiting[index] = more,
                    None => return,
                }
            }
            if self.queues.is_empty() {
                return;
            }
        }
    }

    /// Marks what has something to do; waits for it unless there is a mark already.
    fn wait(&mut self) {
        let timeout_ms = if self.waiting.contains(&true) { 0 } else { -1 };
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll on descriptors that are open failed: {error}"),
        };
        for event in &events[..count] {
            match usize::try_from(event.data())
                .ok()
                .and_then(|mark| self.waiting.get_mut(mark))
            {
                Some(waiting) => *waiting = true,
                None => self.waiting.fill(true),
            }
        }
    }
}
