//! The epochs of an attached guest.

use std::io;
use std::time::{Duration, Instant};

use romulus_host_sys::{PidFd, SysError, monotonic_ns};
use romulus_types::{PageIndex, RamLayout};

use super::attach::{QemuSource, list_devices};
use super::error::{AttachError, CaptureError};
use super::events::meaning;
use super::guardian::Guardian;
use super::halt::Halt;
use super::pause::{Ended, Hold, OwnPause};
use super::purpose::{ARM, CAPTURE, PRECOPY};
use crate::fault;
use crate::qemu::bootstrap::MigrationSettings;
use crate::qemu::qmp::{Monitor, QmpError};
use crate::source::{BarrierError, CaptureReport, Checkpoint, GuestEvent, GuestSource, SourceError};
use crate::spec::MachineSpec;

/// What is protected in one pause: about 2 ms.
const SLICE_BYTES: u64 = 256 << 20;
/// The guest runs so long between two of those pauses.
const SLICE_BREATH: Duration = Duration::from_millis(2);
/// How often the list of devices is compared.
const DEVICES_EVERY: Duration = Duration::from_secs(1);

/// Pages that a checkpoint has room for before its pause, at least.
pub(super) const ROOM_PAGES_MIN: usize = 2048;
/// As many are made room for in advance at most (32 MiB). What is more costs its page faults in the pause.
const ROOM_PAGES_MAX: usize = 8192;

type Barrier<'a> = &'a mut dyn FnMut() -> Result<(), BarrierError>;

impl QemuSource {
    fn protect_all(&mut self) -> Result<(), CaptureError> {
        self.ensure_guardian()?;
        self.armed = false;
        let tracker = self.tracker.as_mut().ok_or(CaptureError::NotArmed)?;
        tracker.forget_pending();
        for slice in tracker.slices(SLICE_BYTES) {
            let held = self.pauser.hold(ARM, Hold::Careful, &mut self.monitor)?;
            let protected = tracker.protect(slice);
            let mut others = Vec::new();
            let ended = self.pauser.release(held, &mut self.monitor, &mut others);
            self.events.extend(others.iter().filter_map(meaning));
            ended?;
            protected?;
            std::thread::sleep(SLICE_BREATH);
        }
        self.armed = true;
        Ok(())
    }

    /// Harvests in a pause and copies after it: pages that change meanwhile are dirty again.
    fn precopy_round(&mut self, into: &mut Checkpoint) -> Result<(), CaptureError> {
        self.ensure_guardian()?;
        into.clear();
        let armed = self.armed;
        let tracker = self
            .tracker
            .as_mut()
            .filter(|_| armed)
            .ok_or(CaptureError::NotArmed)?;
        let held = self.pauser.hold(PRECOPY, Hold::Careful, &mut self.monitor)?;
        let harvested = tracker.harvest();
        let mut others = Vec::new();
        let ended = self.pauser.release(held, &mut self.monitor, &mut others);
        self.events.extend(others.iter().filter_map(meaning));
        let copied = harvested.and_then(|_| {
            ended?;
            // The guest runs: what is too much for one go is taken by the next.
            tracker.put_off_beyond(self.options.checkpoint_pages_max);
            Ok(tracker.copy(into)?)
        });
        match copied {
            Ok(()) => tracker.settle(),
            Err(error) => {
                tracker.give_back();
                into.clear();
                return Err(error);
            }
        }
        Ok(())
    }

    fn checkpoint(
        &mut self,
        barrier: Barrier<'_>,
        stay_stopped: bool,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, CaptureError> {
        self.ensure_guardian()?;
        into.clear();
        into.make_room(self.room_pages);
        if !stay_stopped || self.halt != Halt::None {
            return self.checkpoint_held(barrier, into);
        }
        self.halt_for_now()?;
        let captured = self.checkpoint_held(barrier, into);
        match captured {
            // The checkpoint's own pause had the timer.
            Ok(_) => self.pauser.alert(),
            Err(_) => self.go_on()?,
        }
        captured
    }

    /// Tries again, carefully, when it turns out that the guest was let go too early. The barrier stays where it was: what the
    /// guest sends after it waits for the next epoch, which is never too early.
    fn checkpoint_held(
        &mut self,
        barrier: Barrier<'_>,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, CaptureError> {
        match self.try_checkpoint(Hold::Ahead, barrier, into) {
            Err(CaptureError::LetGoEarly { state_bytes }) => {
                tracing::warn!(state_bytes, "QEMU let the guest go too early, capturing again");
                self.try_checkpoint(Hold::Careful, &mut || Ok(()), into)
            }
            outcome => outcome,
        }
    }

    fn try_checkpoint(
        &mut self,
        how: Hold,
        barrier: Barrier<'_>,
        into: &mut Checkpoint,
    ) -> Result<CaptureReport, CaptureError> {
        let armed = self.armed;
        let tracker = self
            .tracker
            .as_mut()
            .filter(|_| armed)
            .ok_or(CaptureError::NotArmed)?;
        let held = self.pauser.hold(CAPTURE, how, &mut self.monitor)?;
        let (sent_ns, stopped_ns) = (held.sent_ns, held.stopped_ns);
        let mut marks = [stopped_ns; 3];
        let taken = barrier().map_err(CaptureError::from).and_then(|()| {
            fault::point("capture.after_barrier");
            marks = [monotonic_ns(); 3];
            let pages = tracker.harvest()?;
            fault::point("capture.after_harvest");
            marks[1] = monotonic_ns();
            let limit_pages = self.options.checkpoint_pages_max;
            if pages > limit_pages {
                return Err(CaptureError::TooManyPages { pages, limit_pages });
            }
            tracker.copy(into)?;
            fault::point("capture.after_copy");
            marks[2] = monotonic_ns();
            Ok(pages)
        });
        let mut others = Vec::new();
        let ended = self.pauser.release(held, &mut self.monitor, &mut others);
        self.events.extend(others.iter().filter_map(meaning));
        let outcome = taken.and_then(|pages| Ok((pages, ended?)));
        let (dirty_pages, ended) = match outcome {
            Ok(both) => both,
            Err(error) => {
                tracker.give_back();
                into.clear();
                return Err(error);
            }
        };
        tracker.settle();
        self.room_pages = room_pages(into.pages.len());
        into.device_state.extend_from_slice(self.pauser.state(&ended));
        Ok(report(sent_ns, stopped_ns, marks, &ended, dirty_pages))
    }

    /// A pause without a guardian could outlive us.
    pub(super) fn ensure_guardian(&mut self) -> Result<(), CaptureError> {
        if self.guardian.is_alive() {
            return Ok(());
        }
        // A guardian ends with its QEMU, which may be a moment before the monitor tells us.
        if has_ended(self.process())? {
            return Err(CaptureError::Gone);
        }
        tracing::warn!(
            pid = self.process(),
            "the guardian process is gone, starting another"
        );
        self.replace_guardian().map_err(CaptureError::Guardian)
    }

    fn replace_guardian(&mut self) -> io::Result<()> {
        let lock = self.lair.share_lock()?;
        let next = Guardian::spawn(&self.options.guardian, &self.guardian_args, lock)?;
        std::mem::replace(&mut self.guardian, next).dismiss();
        if self.halt == Halt::ForNow {
            self.guardian.stopping_for_now()?;
        }
        Ok(())
    }

    /// Whoever frees the guest from the next bootstrap puts back the migration settings of now, not those at attach.
    pub(super) fn tell_settings(&mut self) -> Result<(), AttachError> {
        let settings = MigrationSettings::read(&mut self.monitor)?;
        if settings != self.guardian_args.settings {
            self.guardian_args.settings = settings.clone();
            self.replace_guardian().map_err(|source| AttachError::Guardian {
                exe: self.options.guardian.exe.clone(),
                source,
            })?;
            self.notes.set_settings(Some(settings));
        }
        Ok(())
    }

    fn read_machine(&mut self) -> Result<(), CaptureError> {
        // What was plugged a moment ago has no event yet.
        self.devices_looked_at = None;
        self.take_events()?;
        let changed = self
            .events
            .iter()
            .any(|e| matches!(e, GuestEvent::Reset | GuestEvent::DevicesChanged));
        if self.learnt_is_fresh && !changed {
            self.learnt_is_fresh = false;
            return Ok(());
        }
        self.learnt_is_fresh = false;
        self.ensure_guardian()?;
        Ok(self.learn_again()?)
    }

    fn take_events(&mut self) -> Result<(), QmpError> {
        while let Some(event) = self.monitor.next_event(Instant::now())? {
            self.events.extend(meaning(&event));
        }
        if self.monitor.take_events_lost() > 0 {
            self.events.push_back(GuestEvent::DevicesChanged);
        }
        let look = self
            .devices_looked_at
            .is_none_or(|at| at.elapsed() >= DEVICES_EVERY);
        if look && !self.ended {
            self.devices_looked_at = Some(Instant::now());
            let devices = list_devices(&mut self.monitor)?;
            if devices != self.devices {
                self.devices = devices;
                self.events.push_back(GuestEvent::DevicesChanged);
            }
        }
        Ok(())
    }

    fn leave(mut self) -> Result<(), CaptureError> {
        fault::point("detach.begin");
        if self.halt == Halt::ForNow && !self.ended {
            // Nobody would be left to let it run. Its gate, if it had one, stays closed.
            self.go_on()?;
        }
        let unregistered = self
            .tracker
            .take()
            .map_or(Ok(()), super::tracker::Tracker::unregister);
        fault::point("detach.unregistered");
        drop(self.pauser);
        self.guardian.dismiss();
        self.notes.set_settings(None);
        self.lair.leave();
        // A QEMU that is gone has nothing left of us.
        if self.ended { Ok(()) } else { Ok(unregistered?) }
    }
}

impl GuestSource for QemuSource {
    fn bootstrap(&mut self) -> Result<(), SourceError> {
        self.read_machine()
            .map_err(|e| failed("reading the machine failed", e))
    }

    fn machine(&self) -> &MachineSpec {
        &self.machine
    }

    fn layout(&self) -> &RamLayout {
        &self.learnt.layout
    }

    fn arm(&mut self) -> Result<(), SourceError> {
        self.protect_all()
            .map_err(|e| failed("arming the dirty tracking failed", e))
    }

    fn read_pages(&mut self, first: PageIndex, into: &mut [u8]) -> Result<(), SourceError> {
        let tracker = self
            .tracker
            .as_mut()
            .ok_or_else(|| failed("reading memory failed", CaptureError::NotArmed))?;
        tracker
            .read(first, into)
            .map_err(|e| failed("reading memory failed", e))
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
        let taken = self.take_events();
        if matches!(taken, Err(QmpError::Timeout { .. })) {
            // Somebody else's command may keep its monitor busy; one that ended would have closed it.
            tracing::warn!(
                pid = self.process(),
                "QEMU's monitor does not answer, trying again"
            );
        } else if let Err(error) = taken {
            if !self.ended && !self.events.contains(&GuestEvent::PoweredOff) {
                tracing::warn!(%error, pid = self.process(), "QEMU's monitor is gone");
                self.events.push_back(GuestEvent::Gone);
            }
            self.ended = true;
        }
        if let Err(error) = self.watch_halt() {
            tracing::warn!(%error, pid = self.process(), "the stopped guest has no guardian");
        }
        let events: Vec<GuestEvent> = self.events.drain(..).collect();
        self.ended |= events.contains(&GuestEvent::PoweredOff);
        self.learnt_is_fresh &= !events
            .iter()
            .any(|e| matches!(e, GuestEvent::Reset | GuestEvent::DevicesChanged));
        events
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

fn has_ended(pid: u32) -> Result<bool, SysError> {
    match PidFd::open(pid) {
        Err(SysError::TargetGone(_)) => Ok(true),
        opened => opened?.wait_ended(Duration::ZERO),
    }
}

/// Pages that the next checkpoint should have room for when this one had so many.
fn room_pages(pages: usize) -> usize {
    (pages + pages / 2).clamp(ROOM_PAGES_MIN, ROOM_PAGES_MAX)
}

/// The times of one capture. A guest that had been stopped before has no pause of its own: ours is taken for it then.
fn report(sent_ns: u64, stopped_ns: u64, marks: [u64; 3], ended: &Ended, dirty_pages: u64) -> CaptureReport {
    let [barrier_done, scan_done, copy_done] = marks;
    let own = ended.own.unwrap_or(OwnPause {
        stop_ns: sent_ns,
        resume_ns: ended.drained_ns,
    });
    CaptureReport {
        command_ns: own.stop_ns.saturating_sub(sent_ns),
        kick_ns: 0,
        stop_ns: stopped_ns.saturating_sub(own.stop_ns),
        barrier_ns: barrier_done - stopped_ns,
        scan_ns: scan_done - barrier_done,
        copy_ns: copy_done - scan_done,
        resume_ns: own.resume_ns.saturating_sub(copy_done),
        device_state_ns: ended.drained_ns - copy_done,
        pause_ns: own.resume_ns.saturating_sub(own.stop_ns),
        dirty_pages,
    }
}

fn failed(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> SourceError {
    SourceError::new(format!("{what}: {error}"), error)
}
