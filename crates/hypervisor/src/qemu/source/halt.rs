//! Stopping the guest for longer than a checkpoint.
//!
//! | | until | if the replicator dies, hangs or ends |
//! |---|---|---|
//! | for now | the record is known again: mute for too long, or handing over | the guardian lets the guest run: its gate stays closed, so it is mute |
//! | for good | for ever: another host speaks for the VM | it stays stopped |
//!
//! A guest that nobody is left to resume must not stand still, so a halt for now is under the kill timer, which is wound up
//! whenever we look for events, and under the guardian's eyes.

use std::time::Instant;

use serde_json::Value;

use super::attach::QemuSource;
use super::error::CaptureError;
use super::events::meaning;
use super::notes::StoppedBy;
use crate::fault;
use crate::qemu::qmp::Monitor;

/// Whether the guest stands still because of us, besides the pauses of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Halt {
    /// It does not.
    None,
    /// Until we know more.
    ForNow,
    /// Another host speaks for the VM.
    ForGood,
}

impl QemuSource {
    /// Stops the guest so that it runs on if we die.
    pub(super) fn halt_for_now(&mut self) -> Result<(), CaptureError> {
        if self.halt != Halt::None {
            return Ok(());
        }
        self.ensure_guardian()?;
        self.guardian.stopping_for_now().map_err(CaptureError::Guardian)?;
        // Before it is: if we die in between, the note is on a guest that runs, and counts for nothing.
        self.notes.set_stopped(Some(StoppedBy::Suspension));
        self.pauser.alert();
        let stopped = self.monitor.execute("stop", Value::Null);
        fault::point("capture.stopped");
        self.halt = Halt::ForNow;
        if let Err(error) = stopped {
            let _ = self.go_on();
            return Err(error.into());
        }
        self.take_own("STOP")
    }

    /// Stops the guest so that it stays so, whatever becomes of us.
    pub(super) fn halt_for_good(&mut self) -> Result<(), CaptureError> {
        self.notes.set_stopped(Some(StoppedBy::AnotherHost));
        if self.halt == Halt::None {
            self.monitor.execute("stop", Value::Null)?;
            self.take_own("STOP")?;
        }
        let was_for_now = self.halt == Halt::ForNow;
        self.halt = Halt::ForGood;
        if was_for_now {
            self.pauser.relax();
            self.guardian.settled().map_err(CaptureError::Guardian)?;
        }
        Ok(())
    }

    /// Lets a guest that we stopped run.
    pub(super) fn go_on(&mut self) -> Result<(), CaptureError> {
        if self.halt == Halt::None {
            return Ok(());
        }
        self.monitor.execute("cont", Value::Null)?;
        self.halt = Halt::None;
        self.notes.set_stopped(None);
        self.pauser.relax();
        self.guardian.settled().map_err(CaptureError::Guardian)?;
        self.take_own("RESUME")
    }

    /// We are alive, so the guest may stay stopped.
    pub(super) fn watch_halt(&mut self) -> Result<(), CaptureError> {
        if self.halt == Halt::ForNow && !self.ended {
            self.pauser.alert();
            self.ensure_guardian()?;
        }
        Ok(())
    }

    /// Takes the events that are there; the first with this name is ours.
    fn take_own(&mut self, name: &str) -> Result<(), CaptureError> {
        let mut ours = false;
        while let Some(event) = self.monitor.next_event(Instant::now())? {
            if !ours && event.name == name {
                ours = true;
            } else {
                self.events.extend(meaning(&event));
            }
        }
        Ok(())
    }
}
