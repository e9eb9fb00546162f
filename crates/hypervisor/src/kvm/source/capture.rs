//! The epochs of an attached guest, its halts and its events.

use std::time::Duration;

use romulus_host_sys::monotonic_ns;
use romulus_types::{PageIndex, RamLayout};
use romulus_vmm_attach::client::{Client, ClientError};
use romulus_vmm_attach::proto::{Event, Paused};

use super::attach::{Attached, Halt, KvmSource};
use super::error::CaptureError;
use crate::fault;
use crate::source::{BarrierError, CaptureReport, Checkpoint, GuestEvent, GuestSource, SourceError};
use crate::spec::MachineSpec;

/// Pages that a checkpoint has room for before its pause, at least.
pub(super) const ROOM_PAGES_MIN: usize = 2048;
/// As many are made room for in advance at most (64 MiB). What is more costs its page faults in the pause.
const ROOM_PAGES_MAX: usize = 16_384;
/// A VMM that has closed its connection may take so long to be gone.
const END_LIMIT: Duration = Duration::from_millis(200);

type Barrier<'a> = &'a mut dyn FnMut() -> Result<(), BarrierError>;

/// When each step in a pause was done, by CLOCK_MONOTONIC.
struct Marks {
    sent_ns: u64,
    still_ns: u64,
    barrier_ns: u64,
    scan_ns: u64,
    copy_ns: u64,
    pages: u64,
}

impl Attached {
    /// What needs a guest that stands still: barrier, dirty pages, their contents.
    fn take(
        &mut self,
        barrier: Barrier<'_>,
        limit_pages: u64,
        sent_ns: u64,
        into: &mut Checkpoint,
    ) -> Result<Marks, CaptureError> {
        let still_ns = monotonic_ns();
        barrier()?;
        fault::point("capture.after_barrier");
        let barrier_ns = monotonic_ns();
        let pages = self.memory.harvest();
        fault::point("capture.after_harvest");
        let scan_ns = monotonic_ns();
        if pages > limit_pages {
            return Err(CaptureError::TooManyPages { pages, limit_pages });
        }
        self.memory.copy(limit_pages, into)?;
        fault::point("capture.after_copy");
        Ok(Marks {
            sent_ns,
            still_ns,
            barrier_ns,
            scan_ns,
            copy_ns: monotonic_ns(),
            pages,
        })
    }
}

impl KvmSource {
    fn armed(&mut self) -> Result<&mut Attached, CaptureError> {
        if self.stale {
            return Err(CaptureError::MachineChanged);
        }
        let armed = self.armed;
        self.attached
            .as_mut()
            .filter(|_| armed)
            .ok_or(CaptureError::NotArmed)
    }

    /// Our connection, for what does not need the machine.
    fn client(&mut self) -> Result<&mut Client, CaptureError> {
        let attached = self.attached.as_mut().ok_or(CaptureError::MachineChanged)?;
        Ok(&mut attached.client)
    }

    fn track_all(&mut self) -> Result<(), CaptureError> {
        self.armed = false;
        if self.stale {
            return Err(CaptureError::MachineChanged);
        }
        let attached = self.attached.as_mut().ok_or(CaptureError::MachineChanged)?;
        fault::point("arm.before_command");
        // Before the tracking starts: what is set from there on counts.
        attached.memory.forget();
        attached.client.arm()?;
        fault::point("arm.after_resume");
        self.armed = true;
        Ok(())
    }

    /// Harvests and copies while the guest runs: pages that change meanwhile are dirty again.
    fn precopy_round(&mut self, into: &mut Checkpoint) -> Result<(), CaptureError> {
        into.clear();
        let limit_pages = self.options.checkpoint_pages_max;
        let attached = self.armed()?;
        fault::point("precopy.before_command");
        attached.client.harvest()?;
        attached.memory.harvest();
        // What is too much for one go is taken by the next.
        let copied = attached.memory.copy(limit_pages, into);
        fault::point("precopy.after_resume");
        if let Err(error) = copied {
            into.clear();
            return Err(error.into());
        }
        attached.memory.settle(&into.pages);
        Ok(())
    }

    /// Tries again when the VMM has let the guest go before we were done. The barrier stays where it was: what the guest sends
    /// after it waits for the next epoch, which is never too early.
    fn checkpoint(
        &mut self,
        barrier: Barrier<'_>,
        stay_stopped: bool,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, CaptureError> {
        into.clear();
        into.make_room(self.room_pages);
        let mut outcome = self.try_checkpoint(barrier, stay_stopped, into);
        if let Err(CaptureError::Client(ClientError::PauseExpired(_))) = &outcome {
            tracing::warn!("the VMM let the guest go before the checkpoint was taken, taking it again");
            into.clear();
            outcome = self.try_checkpoint(&mut || Ok(()), stay_stopped, into);
        }
        match &outcome {
            Ok(_) => self.room_pages = room_pages(into.pages.len()),
            Err(_) => into.clear(),
        }
        outcome
    }

    fn try_checkpoint(
        &mut self,
        barrier: Barrier<'_>,
        stay_stopped: bool,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, CaptureError> {
        let limit_pages = self.options.checkpoint_pages_max;
        let stops = stay_stopped && self.halt == Halt::None;
        let attached = self.armed()?;
        fault::point("capture.before_command");
        let sent_ns = monotonic_ns();
        let paused = attached.client.pause(attached.pause_limit)?;
        fault::point("capture.holding");
        let taken = attached.take(barrier, limit_pages, sent_ns, into);
        let marks = match taken {
            Ok(marks) => marks,
            Err(error) => {
                // The guest goes on. If we can't say so, the VMM's deadline or the end of the connection does it.
                let _ = attached.client.resume();
                return Err(error);
            }
        };
        if !stops {
            // From here on the guest waits for its state alone, and not for us to have heard of it.
            attached.client.resume_ahead()?;
        }
        // A VMM that could not save the state has let the guest run.
        let captured = attached.client.captured()?;
        let drained_ns = monotonic_ns();
        fault::point("capture.after_drain");
        let resumed_ns = if stops {
            attached.client.halt(false)?;
            fault::point("capture.stopped");
            monotonic_ns()
        } else {
            attached.client.resume()?.resumed_at_ns
        };
        fault::point("capture.after_resume");
        // It stays in the state file until the next pause.
        let read = attached.client.read_state(&captured, &mut into.device_state);
        if read.is_ok() {
            // Until here a failure leaves every page taken for the next checkpoint.
            attached.memory.settle(&into.pages);
        }
        if stops {
            self.halt = Halt::ForNow;
        }
        read?;
        Ok(report(&marks, &paused, drained_ns, resumed_ns))
    }

    /// Stops the guest so that it runs on if we die.
    fn halt_for_now(&mut self) -> Result<(), CaptureError> {
        if self.halt == Halt::None {
            self.client()?.halt(false)?;
            fault::point("capture.stopped");
            self.halt = Halt::ForNow;
        }
        Ok(())
    }

    /// Stops the guest so that it stays so, whatever becomes of us.
    fn halt_for_good(&mut self) -> Result<(), CaptureError> {
        if self.ended || self.has_ended(Duration::ZERO)? {
            return Ok(());
        }
        let stopped = match &mut self.attached {
            Some(attached) => attached.client.halt(true),
            None => Err(ClientError::Broken),
        };
        if stopped.is_err() {
            // Whatever else is wrong with the connection or the machine: it must not run beside another host's.
            self.attached = None;
            self.stale = true;
            super::attach::connect_plainly(&self.options)?.halt(true)?;
        }
        self.halt = Halt::ForGood;
        Ok(())
    }

    /// Lets a guest that we stopped run.
    fn go_on(&mut self) -> Result<(), CaptureError> {
        if self.halt != Halt::None {
            self.client()?.go()?;
            self.halt = Halt::None;
        }
        Ok(())
    }

    fn read_machine(&mut self) -> Result<(), CaptureError> {
        self.take_events();
        if self.stale || self.attached.is_none() {
            self.attach_again()
                .map_err(|error| CaptureError::Learning(Box::new(error)))?;
        }
        Ok(())
    }

    fn take_events(&mut self) {
        loop {
            let Some(attached) = &mut self.attached else {
                return;
            };
            match attached.client.poll_event() {
                Ok(Some(event)) => self.take_event(event),
                Ok(None) => break,
                Err(error) => return self.lost(&error),
            }
        }
        if self.halt == Halt::ForNow
            && let Some(Err(error)) = self.attached.as_mut().map(|attached| attached.client.alive())
        {
            self.lost(&error);
        }
    }

    fn take_event(&mut self, event: Event) {
        let meaning = match event {
            Event::Paused => GuestEvent::Paused,
            Event::Resumed => {
                // A halt that somebody else ended, or that had lasted too long, is none.
                if self.halt == Halt::ForNow {
                    self.halt = Halt::None;
                }
                GuestEvent::Resumed
            }
            Event::Reset => GuestEvent::Reset,
            Event::MachineChanged => {
                self.stale = true;
                GuestEvent::DevicesChanged
            }
            Event::PoweredOff => GuestEvent::PoweredOff,
            Event::Crashed => GuestEvent::Crashed,
        };
        self.ended |= meaning == GuestEvent::PoweredOff;
        self.events.push_back(meaning);
    }

    /// The connection broke: with the VMM, or without it; then its guest runs on and can be attached to again.
    fn lost(&mut self, error: &ClientError) {
        // What it said before its end may say why it ended.
        if let Some(mut attached) = self.attached.take() {
            while let Ok(Some(event)) = attached.client.poll_event() {
                self.take_event(event);
            }
        }
        self.armed = false;
        self.stale = true;
        if self.ended {
            return;
        }
        // A process whose end can't be told is taken for one that is there: a takeover needs more than a doubt.
        if self.has_ended(END_LIMIT).unwrap_or(false) {
            tracing::warn!(%error, "the VMM is gone");
            self.ended = true;
            self.events.push_back(GuestEvent::Gone);
        } else {
            tracing::warn!(%error, "the VMM closed its attach connection, connecting again");
            self.halt = if self.halt == Halt::ForNow {
                Halt::None
            } else {
                self.halt
            };
            self.events.push_back(GuestEvent::DevicesChanged);
        }
    }

    fn leave(mut self) -> Result<(), CaptureError> {
        fault::point("detach.begin");
        if self.halt == Halt::ForNow && !self.ended {
            // Nobody would be left to let it run. Its gate, if it had one, stays closed.
            self.go_on()?;
        }
        if let Some(attached) = self.attached.take().filter(|_| !self.ended) {
            attached.client.detach()?;
        }
        fault::point("detach.unregistered");
        Ok(())
    }
}

impl GuestSource for KvmSource {
    fn bootstrap(&mut self) -> Result<(), SourceError> {
        self.read_machine()
            .map_err(|e| failed("reading the machine failed", e))
    }

    fn machine(&self) -> &MachineSpec {
        &self.machine
    }

    fn layout(&self) -> &RamLayout {
        &self.machine.layout
    }

    fn arm(&mut self) -> Result<(), SourceError> {
        self.track_all()
            .map_err(|e| failed("arming the dirty tracking failed", e))
    }

    fn read_pages(&mut self, first: PageIndex, into: &mut [u8]) -> Result<(), SourceError> {
        let read = match &self.attached {
            Some(attached) => attached.memory.read(first, into).map_err(CaptureError::from),
            None => Err(CaptureError::MachineChanged),
        };
        read.map_err(|e| failed("reading memory failed", e))
    }

    fn precopy(&mut self, into: &mut Checkpoint) -> Result<(), SourceError> {
        self.precopy_round(into)
            .map_err(|e| failed("copying in advance failed", e))
    }

    fn capture(
        &mut self,
        barrier: Barrier<'_>,
        stay_stopped: bool,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, SourceError> {
        self.checkpoint(barrier, stay_stopped, into)
            .map_err(|e| failed("taking a checkpoint failed", e))
    }

    fn poll_events(&mut self) -> Vec<GuestEvent> {
        self.take_events();
        self.events.drain(..).collect()
    }

    fn stop_guest(&mut self) -> Result<(), SourceError> {
        self.halt_for_good()
            .map_err(|e| failed("stopping the guest failed", e))
    }

    fn suspend(&mut self) -> Result<(), SourceError> {
        self.halt_for_now()
            .map_err(|e| failed("suspending the guest failed", e))
    }

    fn resume(&mut self) -> Result<(), SourceError> {
        self.go_on().map_err(|e| failed("resuming the guest failed", e))
    }

    fn detach(self: Box<Self>) -> Result<(), SourceError> {
        self.leave().map_err(|e| failed("detaching failed", e))
    }
}

/// Pages that the next checkpoint should have room for when this one had so many.
fn room_pages(pages: usize) -> usize {
    (pages + pages / 2).clamp(ROOM_PAGES_MIN, ROOM_PAGES_MAX)
}

/// The times of one capture. The VMM's points in time are of the same clock as ours; what it says is not trusted to be in order.
fn report(marks: &Marks, paused: &Paused, drained_ns: u64, resumed_ns: u64) -> CaptureReport {
    let stopped_ns = paused.stopped_at_ns;
    CaptureReport {
        command_ns: stopped_ns.saturating_sub(marks.sent_ns),
        kick_ns: paused.kick_ns,
        stop_ns: marks.still_ns.saturating_sub(stopped_ns),
        barrier_ns: marks.barrier_ns - marks.still_ns,
        scan_ns: marks.scan_ns - marks.barrier_ns,
        copy_ns: marks.copy_ns - marks.scan_ns,
        resume_ns: resumed_ns.saturating_sub(marks.copy_ns),
        device_state_ns: drained_ns - marks.copy_ns,
        pause_ns: resumed_ns.saturating_sub(stopped_ns),
        dirty_pages: marks.pages,
    }
}

fn failed(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> SourceError {
    SourceError::new(format!("{what}: {error}"), error)
}
