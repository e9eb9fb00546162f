//! Stopping a guest by having QEMU save its device state into a pipe that is full.
//!
//! ```text
//!   us                                             QEMU
//!   open the FIFO, one page small
//!   timer armed, xen-save-devices-state ─────────► stops the vCPUs, drains and flushes the disks
//!   POLLIN ◄────────────────────────────────────── writes; blocks, as the pipe is full
//!   ... the guest stands still, what is to be done is done ...
//!   pipe grown, read to its end ─────────────────► ends the save, lets the guest run by itself
//!   reply (STOP and RESUME carry QEMU's times) ◄── timer disarmed
//! ```
//!
//! If we die while QEMU writes, it gets EPIPE and the guest runs on. If we die before QEMU opens the FIFO, it would wait
//! in open(2) for ever: the guardian process holds a reading end for that case. If we are stopped, the timer kills us.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use romulus_host_sys::{
    KillTimer, ReadOutcome, SysError, grow_pipe, monotonic_ns, open_fifo_reader, read_nonblocking,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::error::{AttachError, CaptureError};
use super::lair::Fifo;
use crate::fault;
use crate::qemu::qmp::{Monitor, QmpEvent};

/// Most device state that is taken, in bytes.
pub(super) const STATE_BYTES_MAX: usize = 64 << 20;
const STATE_BYTES_FIRST: usize = 1 << 20;
/// The pipe while the guest is held: less than any device state.
const PIPE_BYTES_HELD: usize = 4096;
/// The pipe while the state is read: QEMU writes all of it without waiting for us.
const PIPE_BYTES_DRAIN: usize = 1 << 20;
/// How long QEMU may take to stop a guest: it waits for the guest's disks.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long QEMU may take to end the command after its state was read.
const RESUME_LIMIT: Duration = Duration::from_secs(10);

/// What a pause is for, by the fault points that it passes.
#[derive(Debug)]
pub(super) struct Purpose {
    before_command: &'static str,
    after_command: &'static str,
    holding: &'static str,
    draining: &'static str,
    after_drain: &'static str,
    after_resume: &'static str,
}

/// Memory is protected.
pub(super) const ARM: &Purpose = &Purpose {
    before_command: "arm.before_command",
    after_command: "arm.after_command",
    holding: "arm.holding",
    draining: "arm.draining",
    after_drain: "arm.after_drain",
    after_resume: "arm.after_resume",
};
/// Dirty pages are taken in advance.
pub(super) const PRECOPY: &Purpose = &Purpose {
    before_command: "precopy.before_command",
    after_command: "precopy.after_command",
    holding: "precopy.holding",
    draining: "precopy.draining",
    after_drain: "precopy.after_drain",
    after_resume: "precopy.after_resume",
};
/// A checkpoint is taken.
pub(super) const CAPTURE: &Purpose = &Purpose {
    before_command: "capture.before_command",
    after_command: "capture.after_command",
    holding: "capture.holding",
    draining: "capture.draining",
    after_drain: "capture.after_drain",
    after_resume: "capture.after_resume",
};

/// Stops a guest and lets it go, again and again.
pub(super) struct Pauser {
    fifo: Fifo,
    timer: KillTimer,
    limit_ns: u64,
    state: Vec<u8>,
}

/// A guest that stands still. It must be [released](Pauser::release); dropping it releases it, too, without its state.
pub(super) struct Held {
    reader: OwnedFd,
    purpose: &'static Purpose,
    /// When the command was sent.
    pub(super) sent_ns: u64,
    /// When the guest stood still.
    pub(super) stopped_ns: u64,
}

/// How a pause ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Length of the device state, which is at the beginning of [`Pauser::state`].
    pub(super) state_bytes: usize,
    /// When the state was read to its end.
    pub(super) drained_ns: u64,
    /// From QEMU's STOP to its RESUME; `None` when the guest had been stopped before.
    pub(super) pause_ns: Option<u64>,
    /// Events of others.
    pub(super) events: Vec<QmpEvent>,
}

impl Pauser {
    pub(super) fn new(fifo: Fifo, limit_ns: u64) -> Result<Self, AttachError> {
        // Not zeros: the pages are to be there before the first pause.
        Ok(Self {
            fifo,
            timer: KillTimer::new()?,
            limit_ns,
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
        monitor: &mut dyn Monitor,
    ) -> Result<Held, CaptureError> {
        let path = self.fifo.path().to_str().expect("checked when it was made");
        let arguments = json!({ "filename": path, "live": false });
        fault::point(purpose.before_command);
        let reader = open_fifo_reader(self.fifo.path())?;
        grow_pipe(&reader, PIPE_BYTES_HELD)?;
        let sent_ns = monotonic_ns();
        self.timer.arm(self.limit_ns);
        let held = monitor
            .send("xen-save-devices-state", arguments, &[])
            .map_err(CaptureError::from)
            .and_then(|()| {
                fault::point(purpose.after_command);
                self.wait_held(monitor, &reader)
            });
        match held {
            Ok(()) => {
                self.timer.arm(self.limit_ns);
                fault::point(purpose.holding);
                Ok(Held {
                    reader,
                    purpose,
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

    fn wait_held(&mut self, monitor: &mut dyn Monitor, reader: &OwnedFd) -> Result<(), CaptureError> {
        let deadline = Instant::now() + STOP_LIMIT;
        let turn = Duration::from_nanos(self.limit_ns / 4);
        loop {
            if wait_readable(reader, turn)? {
                return Ok(());
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

    /// Lets the guest go and keeps the device state.
    pub(super) fn release(&mut self, held: Held, monitor: &mut dyn Monitor) -> Result<Ended, CaptureError> {
        let purpose = held.purpose;
        let drained = self.drain(purpose, &held.reader);
        let drained_ns = monotonic_ns();
        drop(held);
        fault::point(purpose.after_drain);
        let reply = monitor.next_reply(Instant::now() + RESUME_LIMIT);
        self.timer.disarm();
        let mut events = Vec::new();
        while let Some(event) = monitor.next_event(Instant::now())? {
            events.push(event);
        }
        let pause_ns = take_own_pause(&mut events);
        let state_bytes = drained?;
        reply?;
        fault::point(purpose.after_resume);
        Ok(Ended {
            state_bytes,
            drained_ns,
            pause_ns,
            events,
        })
    }

    fn drain(&mut self, purpose: &Purpose, reader: &OwnedFd) -> Result<usize, CaptureError> {
        // Without the privilege for a larger pipe, it only takes more turns.
        let _ = grow_pipe(reader, PIPE_BYTES_DRAIN);
        fault::point(purpose.draining);
        let mut bytes = 0;
        loop {
            if bytes == self.state.len() {
                if bytes >= STATE_BYTES_MAX {
                    return Err(CaptureError::StateTooLarge {
                        limit_bytes: STATE_BYTES_MAX,
                    });
                }
                self.state.resize(bytes * 2, 0);
            }
            match read_nonblocking(reader, &mut self.state[bytes..])? {
                ReadOutcome::Bytes(more) => bytes += more,
                ReadOutcome::End => return Ok(bytes),
                ReadOutcome::Empty => {
                    wait_readable(reader, RESUME_LIMIT)?;
                }
            }
        }
    }
}

fn wait_readable(fd: &OwnedFd, limit: Duration) -> Result<bool, SysError> {
    let timeout = Timespec::try_from(limit).ok();
    match poll(
        &mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)],
        timeout.as_ref(),
    ) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(SysError::Call {
            call: "poll",
            source: errno.into(),
        }),
    }
}

/// Takes the first STOP and the first RESUME after it out of the events: they are ours. A STOP without a RESUME is somebody
/// else's: QEMU has none for a guest that was stopped before us, and lets only one that ran run again.
fn take_own_pause(events: &mut Vec<QmpEvent>) -> Option<u64> {
    let stop = events.iter().position(|event| event.name == "STOP")?;
    let mut later = events.iter().skip(stop);
    let resume = stop + later.position(|event| event.name == "RESUME")?;
    let resumed_us = events.remove(resume).at_us();
    let stopped_us = events.remove(stop).at_us();
    Some(resumed_us.saturating_sub(stopped_us) * 1000)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn event(name: &str, microseconds: u32) -> QmpEvent {
        QmpEvent {
            name: name.into(),
            data: Value::Null,
            seconds: 3,
            microseconds,
        }
    }

    #[test]
    fn each_purpose_passes_fault_points_of_its_own() {
        for (purpose, prefix) in [(ARM, "arm."), (PRECOPY, "precopy."), (CAPTURE, "capture.")] {
            let points = [
                purpose.before_command,
                purpose.after_command,
                purpose.holding,
                purpose.draining,
                purpose.after_drain,
                purpose.after_resume,
            ];
            for point in points {
                assert!(
                    point.starts_with(prefix) && fault::POINTS.contains(&point),
                    "{point}"
                );
            }
        }
    }

    #[test]
    fn our_own_pause_is_measured_and_taken_out_of_the_events() {
        let mut events = vec![
            event("RTC_CHANGE", 1),
            event("STOP", 10),
            event("RESUME", 1300),
            event("STOP", 2000),
        ];
        assert_eq!(take_own_pause(&mut events), Some(1_290_000));
        let left: Vec<&str> = events.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(
            left,
            ["RTC_CHANGE", "STOP"],
            "what somebody else did afterwards stays"
        );
        let mut paused_before = vec![event("RTC_CHANGE", 1)];
        assert_eq!(take_own_pause(&mut paused_before), None);
        let mut paused_just_before = vec![event("STOP", 1)];
        assert_eq!(take_own_pause(&mut paused_just_before), None);
        assert_eq!(paused_just_before.len(), 1, "somebody else's pause must be seen");
    }
}
