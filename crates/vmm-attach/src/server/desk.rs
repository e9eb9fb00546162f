//! Carries out what clients ask, one thing at a time. Whoever holds the desk is the only one that talks to the machine; it is never
//! held while anything waits for a socket, so that the watch can always let the guest go.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use romulus_host_sys::monotonic_ns;

use super::machine::{Description, Machine, MachineError, StateWriter, Stopped};
use super::options::{ServeOptions, nanoseconds};
use super::phase::{Phase, expired};
use crate::memfd::{self, FileError, Seals};
use crate::proto::{
    Activated, Captured, ErrorCode, Event, Halt, Harvested, Pause, Paused, Prepare, Refusal, Reply, Request,
    Restore, Restored, Resumed,
};

/// The machine and where it stands.
pub(crate) struct Desk {
    machine: Arc<dyn Machine>,
    options: ServeOptions,
    pub(crate) phase: Phase,
    armed: bool,
    /// Where states are saved to.
    state: File,
    /// Until when the watch sleeps.
    pub(crate) watch_until_ns: u64,
    /// The limit of the last stop, while it is likely that there will be another.
    recent_limit_ns: Option<u64>,
    pub(crate) closing: bool,
}

impl Desk {
    pub(crate) fn new(machine: Arc<dyn Machine>, options: ServeOptions, phase: Phase, state: File) -> Self {
        Self {
            machine,
            options,
            phase,
            armed: false,
            state,
            watch_until_ns: u64::MAX,
            recent_limit_ns: None,
            closing: false,
        }
    }

    pub(crate) fn describe(&self) -> Result<Description, Refusal> {
        let described = self.machine.describe().map_err(refusal)?;
        let failed = |text: String| Refusal::new(ErrorCode::MachineFailed, text);
        described
            .info
            .check()
            .map_err(|error| failed(error.to_string()))?;
        let (regions, files) = (described.info.regions.len(), described.regions.len());
        if regions != files {
            return Err(failed(format!("the VMM has {files} files for {regions} regions")));
        }
        Ok(described)
    }

    /// A duplicate of the file that states are saved to.
    pub(crate) fn state_file(&self) -> std::io::Result<OwnedFd> {
        Ok(self.state.try_clone()?.into())
    }

    /// Does what was asked, except for `Pause`'s second half and `Hello`.
    pub(crate) fn carry_out(
        &mut self,
        request: Request,
        files: Vec<OwnedFd>,
    ) -> Result<Option<Reply>, Refusal> {
        if let Err(refusal) = self.phase.admit(&request) {
            if self.phase == Phase::Expired {
                // It has been told.
                self.phase = Phase::Running;
            }
            return Err(refusal);
        }
        self.keep_halted();
        let reply = match request {
            Request::Arm => self.arm()?,
            Request::Harvest => Reply::Harvested(self.harvest()?),
            Request::Pause(pause) => self.pause(pause)?,
            Request::Resume => self.resume(),
            Request::Halt(halt) => self.halt(halt)?,
            Request::Go => self.go(),
            Request::Alive => return Ok(None),
            Request::Prepare(prepare) => self.prepare(&prepare, files)?,
            Request::Restore(restore) => self.restore(restore, files)?,
            Request::Activate => self.activate()?,
            Request::Detach => {
                self.end_session();
                Reply::Detached
            }
            Request::Hello(_) => unreachable!("a second Hello is admitted nowhere"),
        };
        Ok(Some(reply))
    }

    fn arm(&mut self) -> Result<Reply, Refusal> {
        self.machine.arm().map_err(refusal)?;
        self.armed = true;
        Ok(Reply::Armed)
    }

    fn harvest(&mut self) -> Result<Harvested, Refusal> {
        if !self.armed {
            return Err(Refusal::new(
                ErrorCode::WrongOrder,
                "Arm comes before Harvest and Pause",
            ));
        }
        let began_ns = monotonic_ns();
        let dirty_pages = self.machine.harvest().map_err(refusal)?;
        Ok(Harvested {
            dirty_pages,
            harvest_ns: monotonic_ns().saturating_sub(began_ns),
        })
    }

    fn pause(&mut self, pause: Pause) -> Result<Reply, Refusal> {
        let limit_max = nanoseconds(self.options.pause_limit_max);
        if pause.limit_ns == 0 || pause.limit_ns > limit_max {
            let text = format!(
                "a pause's limit is from 1 to {limit_max} ns, not {}",
                pause.limit_ns
            );
            return Err(Refusal::new(ErrorCode::OutOfRange, text));
        }
        if !self.armed {
            return Err(Refusal::new(
                ErrorCode::WrongOrder,
                "Arm comes before Harvest and Pause",
            ));
        }
        let until_ns = monotonic_ns().saturating_add(pause.limit_ns);
        let stopped = if let Phase::Halted { until_ns, .. } = self.phase {
            self.phase = Phase::Halted {
                until_ns,
                capturing: true,
            };
            Stopped {
                stopped_at_ns: monotonic_ns(),
                kick_ns: 0,
            }
        } else {
            let stopped = self.machine.pause().map_err(refusal)?;
            self.phase = Phase::Paused { until_ns };
            self.recent_limit_ns = Some(pause.limit_ns);
            stopped
        };
        let harvested = match self.harvest() {
            Ok(harvested) => harvested,
            Err(refusal) => {
                self.abandon_pause();
                return Err(refusal);
            }
        };
        Ok(Reply::Paused(Paused {
            stopped_at_ns: stopped.stopped_at_ns,
            kick_ns: stopped.kick_ns,
            harvest_ns: harvested.harvest_ns,
            dirty_pages: harvested.dirty_pages,
        }))
    }

    /// The second half of a pause. On an error the pause is over.
    pub(crate) fn capture(&mut self) -> Result<Reply, Refusal> {
        if self.phase == Phase::Expired {
            self.phase = Phase::Running;
            return Err(expired());
        }
        let began_ns = monotonic_ns();
        let mut writer = StateWriter::new(&self.state, self.options.state_bytes_max);
        if let Err(error) = self.machine.save(&mut writer) {
            self.abandon_pause();
            return Err(refusal(error));
        }
        Ok(Reply::Captured(Captured {
            state_bytes: writer.bytes(),
            capture_ns: monotonic_ns().saturating_sub(began_ns),
        }))
    }

    /// A checkpoint failed: as before it.
    fn abandon_pause(&mut self) {
        self.resume();
    }

    fn resume(&mut self) -> Reply {
        if let Phase::Halted { until_ns, .. } = self.phase {
            self.phase = Phase::Halted {
                until_ns,
                capturing: false,
            };
            return Reply::Resumed(Resumed {
                resumed_at_ns: monotonic_ns(),
            });
        }
        let resumed_at_ns = self.machine.resume();
        self.phase = Phase::Running;
        Reply::Resumed(Resumed { resumed_at_ns })
    }

    fn halt(&mut self, halt: Halt) -> Result<Reply, Refusal> {
        let stands = matches!(
            self.phase,
            Phase::Paused { .. } | Phase::Halted { .. } | Phase::HaltedForGood
        );
        if !stands {
            self.machine.pause().map_err(refusal)?;
        }
        if halt.for_good || self.phase == Phase::HaltedForGood {
            self.phase = Phase::HaltedForGood;
            return Ok(Reply::Halted);
        }
        let limit_ns = nanoseconds(self.options.halt_limit);
        self.recent_limit_ns = Some(limit_ns);
        self.phase = Phase::Halted {
            until_ns: monotonic_ns().saturating_add(limit_ns),
            capturing: false,
        };
        Ok(Reply::Halted)
    }

    fn go(&mut self) -> Reply {
        self.machine.resume();
        self.phase = Phase::Running;
        Reply::Going
    }

    /// The client has said something.
    fn keep_halted(&mut self) {
        if let Phase::Halted { until_ns, .. } = &mut self.phase {
            *until_ns = monotonic_ns().saturating_add(nanoseconds(self.options.halt_limit));
        }
    }

    fn prepare(&mut self, prepare: &Prepare, files: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        for (region, file) in prepare.machine.regions.iter().zip(&files) {
            let needed = region.fd_offset.saturating_add(region.bytes);
            let what = format!("memory region {:?}", region.name);
            memfd::check(file, &what, needed, Seals::IfPossible).map_err(bad_file)?;
        }
        self.machine
            .prepare(&prepare.machine, files, prepare.private)
            .map_err(refusal)?;
        self.phase = Phase::Prepared {
            trial: prepare.private,
        };
        Ok(Reply::Prepared)
    }

    fn restore(&mut self, restore: Restore, files: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        let (Phase::Prepared { trial } | Phase::Restored { trial }) = self.phase else {
            unreachable!("it was admitted");
        };
        let limit = self.options.state_bytes_max;
        let Some(length) = usize::try_from(restore.state_bytes)
            .ok()
            .filter(|bytes| *bytes as u64 <= limit)
        else {
            let text = format!(
                "a state of {} bytes is over the limit of {limit}",
                restore.state_bytes
            );
            return Err(Refusal::new(ErrorCode::OutOfRange, text));
        };
        let file = files.into_iter().next().expect("its number was checked");
        memfd::check(&file, "the state", restore.state_bytes, Seals::NotNeeded).map_err(bad_file)?;
        let began_ns = monotonic_ns();
        let mut state = vec![0; length];
        if let Err(error) = File::from(file).read_exact_at(&mut state, 0) {
            let text = format!("the state's file can't be read: {error}");
            return Err(Refusal::new(ErrorCode::WrongDescriptors, text));
        }
        self.phase = Phase::Prepared { trial };
        self.machine.restore(&state).map_err(refusal)?;
        self.phase = Phase::Restored { trial };
        Ok(Reply::Restored(Restored {
            restore_ns: monotonic_ns().saturating_sub(began_ns),
        }))
    }

    fn activate(&mut self) -> Result<Reply, Refusal> {
        let (Phase::Prepared { trial } | Phase::Restored { trial }) = self.phase else {
            unreachable!("it was admitted");
        };
        // If it fails, part of the guest may have run: what was restored is not good any more.
        self.phase = Phase::Prepared { trial };
        let first_entry_at_ns = self.machine.activate().map_err(refusal)?;
        self.phase = Phase::Running;
        Ok(Reply::Activated(Activated { first_entry_at_ns }))
    }

    /// The client is gone, or has detached: the guest comes first, then the tracking.
    pub(crate) fn end_session(&mut self) {
        match self.phase {
            Phase::Paused { .. } | Phase::Halted { .. } => {
                self.machine.resume();
                self.phase = Phase::Running;
            }
            Phase::Expired => self.phase = Phase::Running,
            Phase::Restored { trial } => self.phase = Phase::Prepared { trial },
            Phase::Empty | Phase::Prepared { .. } | Phase::Running | Phase::HaltedForGood => {}
        }
        if std::mem::take(&mut self.armed) {
            self.machine.disarm();
        }
    }

    /// Lets the guest go when its time has come, and tells what to say about it to a client that waits for nothing.
    pub(crate) fn expire(&mut self, now_ns: u64) -> Option<Event> {
        let due = self
            .phase
            .deadline_ns()
            .is_some_and(|until_ns| until_ns <= now_ns);
        if !due {
            return None;
        }
        let was_halted = matches!(self.phase, Phase::Halted { .. });
        self.machine.resume();
        self.phase = Phase::Expired;
        was_halted.then_some(Event::Resumed)
    }

    /// Until when the watch may sleep. While pauses come one after the other, it looks once a limit, so that none of
    /// them has to wake it.
    pub(crate) fn next_look_ns(&mut self, now_ns: u64) -> u64 {
        let likely = self
            .recent_limit_ns
            .take()
            .map(|limit_ns| now_ns.saturating_add(limit_ns));
        self.phase.deadline_ns().or(likely).unwrap_or(u64::MAX)
    }
}

/// A failure of the machine, as the client is told.
fn refusal(error: MachineError) -> Refusal {
    Refusal::new(error.code, error.chain())
}

fn bad_file(error: FileError) -> Refusal {
    let cause = std::error::Error::source(&error).map_or_else(String::new, |source| format!(": {source}"));
    Refusal::new(ErrorCode::WrongDescriptors, format!("{error}{cause}"))
}
