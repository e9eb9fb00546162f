//! Stopping a guest by having QEMU save its device state into a pipe that is too small for it.
//!
//! ```text
//!   us                                             QEMU
//!   open the FIFO, make it smaller than the state
//!   timer armed, xen-save-devices-state ─────────► stops the vCPUs, drains and flushes the disks
//!   it was opened ◄─────────────────────────────── opens the FIFO, makes the device state, writes; blocks, as the
//!   ... the guest stands still, what is to be      pipe is full
//!       done is done, while QEMU works ...
//!   pipe grown, read to its end ─────────────────► ends the save, lets the guest run by itself
//!   reply (STOP and RESUME carry QEMU's times) ◄── timer disarmed
//! ```
//!
//! *What holds the guest* is that QEMU can't finish: until we let it go, at most what the pipe takes has left it. So the guest
//! stood still all the time if the state, once it is complete, turns out to be longer than that. This is checked after every
//! pause; if it was shorter, what was done meanwhile does not count ([`CaptureError::LetGoEarly`]). The pipe is as large as the
//! last state allows, so that QEMU makes most of its state while we copy.
//!
//! *When* it stands still: QEMU opens the FIFO after it has stopped the guest and waited for its disks. A
//! QEMU that did it in another order would be noticed by the time of its STOP; from then on we wait for data, as we do where
//! files can't be watched.
//!
//! If we die while QEMU writes, it gets EPIPE and the guest runs on. If we die before QEMU opens the FIFO, it would wait
//! in open(2) for ever: the guardian process holds a reading end for that case. If we are stopped, the timer kills us.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use romulus_host_sys::{
    KillTimer, OpenWatch, ReadOutcome, SysError, monotonic_ns, open_fifo_reader, read_nonblocking,
    resize_pipe, wall_clock_offset_ns,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::error::{AttachError, CaptureError};
use super::lair::Fifo;
use super::purpose::Purpose;
use crate::fault;
use crate::qemu::qmp::{Monitor, QmpEvent};

/// Most device state that is taken, in bytes.
pub(super) const STATE_BYTES_MAX: usize = 64 << 20;
const STATE_BYTES_FIRST: usize = 1 << 20;
/// The smallest pipe there is: less than any device state.
const PIPE_BYTES_MIN: usize = 4096;
/// The device state may get shorter by so much from one pause to the next, and the guest is still held.
const STATE_SHRINKS_BYTES: usize = 4096;
/// The pipe while the state is read: QEMU writes all of it without waiting for us.
const PIPE_BYTES_DRAIN: usize = 1 << 20;
/// How long QEMU may take to stop a guest: it waits for the guest's disks.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long QEMU may take to end the command after its state was read.
const RESUME_LIMIT: Duration = Duration::from_secs(10);

/// Stops a guest and lets it go, again and again.
pub(super) struct Pauser {
    fifo: Fifo,
    timer: KillTimer,
    limit_ns: u64,
    /// Tells when QEMU opens the FIFO; `None` where that can't be told, or does not mean that the guest stands still.
    opened: Option<OpenWatch>,
    /// Length of the last device state, while there is no reason to doubt that the next one is about as long.
    expected_bytes: usize,
    state: Vec<u8>,
}

/// How sure one has to be that the guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// QEMU makes its state while the guest is held. Now and then it turns out afterwards that it was not.
    Ahead,
    /// With the smallest pipe, from the first data on.
    Careful,
}

/// A guest that stands still. It must be [released](Pauser::release); dropping it releases it, too, without its state.
pub(super) struct Held {
    reader: OwnedFd,
    purpose: &'static Purpose,
    how: Hold,
    /// What the pipe takes at most.
    capacity_bytes: usize,
    /// What was read of the state to find out whether there is a writer.
    first_bytes: usize,
    /// How far the wall clock, which QEMU's events tell, is ahead of ours.
    wall_offset_ns: u64,
    /// When the command was sent.
    pub(super) sent_ns: u64,
    /// When the guest stood still, and we knew.
    pub(super) stopped_ns: u64,
}

/// QEMU's own times of a pause, on our clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OwnPause {
    /// The vCPUs are stopped.
    pub(super) stop_ns: u64,
    /// They are about to run.
    pub(super) resume_ns: u64,
}

/// How a pause ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Length of the device state, which is at the beginning of [`Pauser::state`].
    pub(super) state_bytes: usize,
    /// When the state was read to its end.
    pub(super) drained_ns: u64,
    /// From QEMU's STOP to its RESUME; `None` when the guest had been stopped before.
    pub(super) own: Option<OwnPause>,
}

impl Pauser {
    pub(super) fn new(fifo: Fifo, limit_ns: u64) -> Result<Self, AttachError> {
        let opened = OpenWatch::new(fifo.path())
            .inspect_err(|error| tracing::warn!(%error, "pauses will be a little longer"))
            .ok();
        // Not zeros: the pages are to be there before the first pause.
        Ok(Self {
            fifo,
            timer: KillTimer::new()?,
            limit_ns,
            opened,
            expected_bytes: 0,
            state: vec![1; STATE_BYTES_FIRST],
        })
    }

    /// The device state that the last release read.
    pub(super) fn state(&self, ended: &Ended) -> &[u8] {
        &self.state[..ended.state_bytes]
    }

    /// Runs `work` in which a guest waits for us, under the kill timer with `factor` times the limit. `work` winds it up by
    /// calling what it is given.
    pub(super) fn guarded<T>(&mut self, factor: u64, work: impl FnOnce(&mut (dyn FnMut() + Send)) -> T) -> T {
        let limit_ns = self.limit_ns.saturating_mul(factor);
        self.timer.arm(limit_ns);
        let outcome = work(&mut || self.timer.arm(limit_ns));
        self.timer.disarm();
        outcome
    }

    /// From here on the guest waits for us, until the next [`hold`](Self::hold) takes over or [`relax`](Self::relax).
    pub(super) fn alert(&mut self) {
        self.timer.arm(self.limit_ns);
    }

    /// The guest does not wait for us any more.
    pub(super) fn relax(&mut self) {
        self.timer.disarm();
    }

    /// Stops the guest.
    pub(super) fn hold(
        &mut self,
        purpose: &'static Purpose,
        how: Hold,
        monitor: &mut dyn Monitor,
    ) -> Result<Held, CaptureError> {
        let path = self.fifo.path().to_str().expect("checked when it was made");
        let arguments = json!({ "filename": path, "live": false });
        fault::point(purpose.before_command);
        let reader = open_fifo_reader(self.fifo.path())?;
        let wanted_bytes = match how {
            Hold::Ahead => pipe_bytes_for(self.expected_bytes),
            Hold::Careful => PIPE_BYTES_MIN,
        };
        let capacity_bytes = resize_pipe(&reader, wanted_bytes)?;
        if let Some(watch) = &self.opened {
            watch.take_opened()?;
        }
        let wall_offset_ns = wall_clock_offset_ns();
        let sent_ns = monotonic_ns();
        self.timer.arm(self.limit_ns);
        let held = monitor
            .send("xen-save-devices-state", arguments, &[])
            .map_err(CaptureError::from)
            .and_then(|()| {
                fault::point(purpose.after_command);
                self.wait_held(how, monitor, &reader)
            });
        match held {
            Ok(first_bytes) => {
                self.timer.arm(self.limit_ns);
                fault::point(purpose.holding);
                Ok(Held {
                    reader,
                    purpose,
                    how,
                    capacity_bytes,
                    first_bytes,
                    wall_offset_ns,
                    sent_ns,
                    stopped_ns: monotonic_ns(),
                })
            }
            Err(error) => {
                // Closing our end ends QEMU's save, should it still come to it.
                drop(reader);
                self.timer.disarm();
                Err(error)
            }
        }
    }

    /// Waits until the guest stands still. Returns how much of the state had to be read for it.
    fn wait_held(
        &mut self,
        how: Hold,
        monitor: &mut dyn Monitor,
        reader: &OwnedFd,
    ) -> Result<usize, CaptureError> {
        let deadline = Instant::now() + STOP_LIMIT;
        let turn = Duration::from_nanos(self.limit_ns / 4);
        let watch = self.opened.as_ref().filter(|_| how == Hold::Ahead);
        loop {
            match wait_first(reader, watch, turn)? {
                First::Data => return Ok(0),
                First::Opened => match read_nonblocking(reader, &mut self.state[..1])? {
                    ReadOutcome::Bytes(bytes) => return Ok(bytes),
                    ReadOutcome::Empty => return Ok(0),
                    // Somebody else opened it, to read.
                    ReadOutcome::End => continue,
                },
                First::Nothing => {}
            }
            // Nothing is held by us yet: QEMU waits for its disks. We live, so the timer is wound up.
            self.timer.arm(self.limit_ns);
            match monitor.next_reply(Instant::now()) {
                Err(crate::qemu::qmp::QmpError::Timeout { .. }) => {}
                Ok(_) => return Err(CaptureError::NotHeld("it wrote no state".to_owned())),
                Err(error) if error.is_refusal() => return Err(CaptureError::NotHeld(error.to_string())),
                Err(error) => return Err(error.into()),
            }
            if Instant::now() > deadline {
                // The late reply must not be taken for that of a later command.
                monitor.abandon_newest();
                return Err(CaptureError::NotHeld(
                    "it did not stop in time; is a disk stuck?".to_owned(),
                ));
            }
        }
    }

    /// Lets the guest go and keeps the device state. Events that are not ours go to `others`, also when this fails.
    ///
    /// # Errors
    /// [`CaptureError::LetGoEarly`] when the guest may not have stood still until now: what was done meanwhile must not count.
    pub(super) fn release(
        &mut self,
        held: Held,
        monitor: &mut dyn Monitor,
        others: &mut Vec<QmpEvent>,
    ) -> Result<Ended, CaptureError> {
        let purpose = held.purpose;
        let drained = self.drain(&held);
        let drained_ns = monotonic_ns();
        drop(held.reader);
        fault::point(purpose.after_drain);
        let reply = monitor.next_reply(Instant::now() + RESUME_LIMIT);
        self.timer.disarm();
        while let Some(event) = monitor.next_event(Instant::now())? {
            others.push(event);
        }
        let own = take_own_pause(others, held.wall_offset_ns);
        self.expected_bytes = 0;
        let state_bytes = drained?;
        reply?;
        fault::point(purpose.after_resume);
        // Before we let it go, no more than this had left QEMU. It was not done, if there is more.
        let left_bytes = held.first_bytes + held.capacity_bytes;
        if state_bytes <= left_bytes {
            return Err(CaptureError::LetGoEarly { state_bytes });
        }
        if held.how == Hold::Ahead
            && self.opened.is_some()
            && own.is_some_and(|own| own.stop_ns > held.stopped_ns)
        {
            tracing::warn!("QEMU opens the file of its state before it stops the guest: pauses get longer");
            self.opened = None;
            return Err(CaptureError::LetGoEarly { state_bytes });
        }
        self.expected_bytes = state_bytes;
        Ok(Ended {
            state_bytes,
            drained_ns,
            own,
        })
    }

    fn drain(&mut self, held: &Held) -> Result<usize, CaptureError> {
        // Without the privilege for a larger pipe, it only takes more turns.
        let _ = resize_pipe(&held.reader, PIPE_BYTES_DRAIN);
        fault::point(held.purpose.draining);
        let mut bytes = held.first_bytes;
        loop {
            if bytes == self.state.len() {
                if bytes >= STATE_BYTES_MAX {
                    return Err(CaptureError::StateTooLarge {
                        limit_bytes: STATE_BYTES_MAX,
                    });
                }
                self.state.resize(bytes * 2, 0);
            }
            match read_nonblocking(&held.reader, &mut self.state[bytes..])? {
                ReadOutcome::Bytes(more) => bytes += more,
                ReadOutcome::End => return Ok(bytes),
                ReadOutcome::Empty => {
                    wait_first(&held.reader, None, RESUME_LIMIT)?;
                }
            }
        }
    }
}

/// The largest pipe that still can't take a state of about so many bytes.
fn pipe_bytes_for(state_bytes: usize) -> usize {
    let room_bytes = state_bytes.saturating_sub(STATE_SHRINKS_BYTES + 1);
    match room_bytes.checked_ilog2() {
        Some(power) => (1 << power).clamp(PIPE_BYTES_MIN, PIPE_BYTES_DRAIN),
        None => PIPE_BYTES_MIN,
    }
}

/// What came first.
enum First {
    Data,
    Opened,
    Nothing,
}

/// Waits for data in the pipe or an open of its file.
fn wait_first(pipe: &OwnedFd, watch: Option<&OpenWatch>, limit: Duration) -> Result<First, SysError> {
    let timeout = Timespec::try_from(limit).ok();
    let pipe_fd = PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN);
    let mut with_watch;
    let mut alone;
    let fds: &mut [PollFd<'_>] = match watch {
        Some(watch) => {
            with_watch = [pipe_fd, PollFd::from_borrowed_fd(watch.as_fd(), PollFlags::IN)];
            &mut with_watch
        }
        None => {
            alone = [pipe_fd];
            &mut alone
        }
    };
    match poll(fds, timeout.as_ref()) {
        Ok(_) if !fds[0].revents().is_empty() => Ok(First::Data),
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(First::Nothing),
        Ok(_) => {
            let opened = watch.map_or(Ok(false), OpenWatch::take_opened)?;
            Ok(if opened { First::Opened } else { First::Nothing })
        }
        Err(errno) => Err(SysError::Call {
            call: "poll",
            source: errno.into(),
        }),
    }
}

/// Takes the first STOP and the first RESUME after it out of the events: they are ours. A STOP without a RESUME is somebody
/// else's: QEMU has none for a guest that was stopped before us, and lets only one that ran run again.
fn take_own_pause(events: &mut Vec<QmpEvent>, wall_offset_ns: u64) -> Option<OwnPause> {
    let stop = events.iter().position(|event| event.name == "STOP")?;
    let mut later = events.iter().skip(stop);
    let resume = stop + later.position(|event| event.name == "RESUME")?;
    let ours = |event: QmpEvent| event.at_us().saturating_mul(1000).saturating_sub(wall_offset_ns);
    let resume_ns = ours(events.remove(resume));
    let stop_ns = ours(events.remove(stop));
    Some(OwnPause { stop_ns, resume_ns })
}

#[cfg(test)]
#[path = "pause_tests.rs"]
mod tests;
