//! The capture thread: the only one that touches the hypervisor. It takes jobs from the driver in order, keeps the
//! epoch's pace, and hands what it captured to the encoder.
//!
//! Only what needs a still guest happens while it is paused; see [`GuestSource::capture`].

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use romulus_hypervisor::fault;
use romulus_hypervisor::source::{
    BarrierError, CaptureReport, Checkpoint, GuestEvent as SourceEvent, GuestSource, SourceError,
};
use romulus_protocol::{GuestEvent, PrimaryEvent};
use romulus_telemetry::Pulse;
use romulus_types::{Epoch, PAGE_BYTES, PageIndex, Session, Time};
use serde_json::json;
use tracing::{debug, error, info, warn};

use crate::buffers::BufferPool;
use crate::encode::EncodeJob;
use crate::events::EventSink;
use crate::gates::Gates;
use crate::idle::IdleWait;
use crate::session_cell::SessionCell;
use crate::status::Status;
use crate::tuner::EpochFigures;
use romulus_host_sys::process_clock::Clock;

/// Pages read at once during the first copy.
const FIRST_COPY_CHUNK_PAGES: u64 = 256;
/// How often the hypervisor's events are looked at when nothing else is to be done.
const IDLE_POLL: Duration = Duration::from_millis(20);
/// Live rounds after the first copy, at most, before the first checkpoint.
const PRECOPY_ROUNDS_MAX: u32 = 32;
/// Dirty pages that the first checkpoint may copy in its pause.
const PRECOPY_GOAL_PAGES: usize = 2048;

/// The target of the lines that tell of every epoch: `log.level = "info,epochs=debug"` shows them.
pub const EPOCHS: &str = "epochs";

/// What the driver asks of the capture thread. Carried out in order.
pub enum Job {
    /// Read the machine afresh; the answer is its description as JSON and its pages.
    Describe(SyncSender<anyhow::Result<(Vec<u8>, u64)>>),
    /// Start tracking and send all memory while the guest runs.
    FirstCopy(Session),
    /// One checkpoint.
    Capture {
        /// Its session.
        session: Session,
        /// The epoch that it ends.
        epoch: Epoch,
        /// Not before.
        at: Time,
        /// Close the gate at the barrier.
        close_gate: bool,
        /// Leave the guest stopped.
        stay_stopped: bool,
    },
    /// Stop the guest for good.
    StopGuest,
    /// Stop it for now.
    Suspend,
    /// Let it run.
    Resume,
    /// Leave no trace in the hypervisor, and end.
    Detach,
}

/// When an epoch ends.
pub struct Moment {
    /// When it was due: as asked for, or later where an idle guest was left alone.
    pub due_at: Time,
    /// By how much later, in nanoseconds.
    pub idle_ns: u64,
    /// Since the capture before, in nanoseconds; 0 for the first of a session.
    pub interval_ns: u64,
}

/// What the thread works with.
pub struct CaptureThread {
    /// The guest.
    pub source: Box<dyn GuestSource>,
    /// Jobs from the driver.
    pub jobs: Receiver<Job>,
    /// To the driver.
    pub events: EventSink,
    /// To the encoder.
    pub encoder: SyncSender<EncodeJob>,
    /// Free checkpoint buffers.
    pub buffers: BufferPool,
    /// The packet gates.
    pub gates: Gates,
    /// How long an idle guest is left alone.
    pub idle: IdleWait,
    /// The session that is current; what belongs to another is dropped.
    pub current: SessionCell,
    /// Figures.
    pub status: Arc<Status>,
    /// Beats as the loop turns, and in the long jobs.
    pub pulse: Pulse,
    /// The process's clock.
    pub clock: Clock,
}

impl CaptureThread {
    /// Works until it is told to detach, or the driver is gone.
    pub fn run(mut self) {
        let mut last_start: Option<Time> = None;
        loop {
            self.pulse.beat();
            match self.jobs.recv_timeout(IDLE_POLL) {
                Ok(Job::Describe(answer)) => {
                    // Whoever asked may have given up.
                    let _ = answer.send(self.describe());
                }
                Ok(Job::FirstCopy(session)) => {
                    last_start = None;
                    self.idle.begin();
                    self.first_copy(session);
                }
                Ok(Job::Capture {
                    session,
                    epoch,
                    at,
                    close_gate,
                    stay_stopped,
                }) => {
                    self.wait_until(at);
                    let due_at = if stay_stopped {
                        at
                    } else {
                        self.wait_while_idle(session, last_start, at)
                    };
                    let start = self.clock.now();
                    let moment = Moment {
                        due_at,
                        idle_ns: due_at.since_ns(at),
                        interval_ns: last_start.map_or(0, |last| start.since_ns(last)),
                    };
                    last_start = Some(start);
                    self.capture(session, epoch, close_gate, stay_stopped, moment);
                }
                Ok(Job::StopGuest) => self.report("stop the guest", Self::stop_guest),
                Ok(Job::Suspend) => self.report("suspend the guest", |t| t.source.suspend()),
                Ok(Job::Resume) => self.report("resume the guest", |t| t.source.resume()),
                Ok(Job::Detach) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.forward_guest_events();
        }
        if let Err(error) = self.source.detach() {
            warn!(%error, "detaching left something behind");
        }
    }

    fn stop_guest(&mut self) -> Result<(), SourceError> {
        self.source.stop_guest()
    }

    fn report(&mut self, what: &str, action: impl FnOnce(&mut Self) -> Result<(), SourceError>) {
        if let Err(error) = action(self) {
            error!(%error, "could not {what}");
            self.status.set_detail(format!("could not {what}: {error}"));
        }
    }

    fn wait_until(&self, at: Time) {
        let deadline = self.clock.instant(at);
        let left = deadline.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            std::thread::sleep(left);
        }
    }

    /// At the end of an epoch that began at `began` and was to end at `at`: waits while the guest is idle. Returns when the epoch ends.
    fn wait_while_idle(&mut self, session: Session, began: Option<Time>, at: Time) -> Time {
        let Some(until) = self.idle.until(began, at).filter(|_| !self.gates.hold_output()) else {
            return at;
        };
        loop {
            let left = self
                .clock
                .instant(until)
                .saturating_duration_since(Instant::now());
            if left.is_zero() {
                return until;
            }
            // Unparked by the gates; at any other time it only looks once more.
            std::thread::park_timeout(left.min(IDLE_POLL));
            if self.gates.hold_output() || !self.current.is(session) {
                return self.clock.now().min(until);
            }
            self.pulse.beat();
            self.forward_guest_events();
        }
    }

    fn forward_guest_events(&mut self) {
        for event in self.source.poll_events() {
            let event = match event {
                SourceEvent::Paused => GuestEvent::Paused,
                SourceEvent::Resumed => GuestEvent::Resumed,
                SourceEvent::Reset | SourceEvent::DevicesChanged => GuestEvent::Changed,
                SourceEvent::PoweredOff => GuestEvent::PoweredOff,
                SourceEvent::Crashed | SourceEvent::Gone => GuestEvent::Lost,
            };
            info!(event = "guest", what = ?event);
            self.events.send(PrimaryEvent::Guest(event));
        }
    }

    fn describe(&mut self) -> anyhow::Result<(Vec<u8>, u64)> {
        self.source.bootstrap()?;
        Ok((self.source.machine().to_json(), self.source.layout().page_count()))
    }

    fn first_copy(&mut self, session: Session) {
        let began = Instant::now();
        match self.try_first_copy(session) {
            Ok(true) => {
                let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.status
                    .add_event("first_copy_done", &json!({"elapsed_ms": elapsed_ms}));
                info!(event = "first_copy_done", elapsed_ms);
            }
            Ok(false) => info!("the first copy was given up: its session ended"),
            Err(error) => self.capture_failed(session, Epoch::NONE, &error),
        }
    }

    /// `false` when the session ended in between.
    fn try_first_copy(&mut self, session: Session) -> anyhow::Result<bool> {
        self.gates.prepare()?;
        fault::point("replicator.gate_prepared");
        self.source.arm()?;
        let pages = self.source.layout().page_count();
        let mut first = 0;
        while first < pages {
            if !self.current.is(session) {
                return Ok(false);
            }
            let count = FIRST_COPY_CHUNK_PAGES.min(pages - first);
            let mut data = vec![0; usize::try_from(count)? * PAGE_BYTES];
            self.source.read_pages(PageIndex(first), &mut data)?;
            if self
                .encoder
                .send(EncodeJob::FirstCopy {
                    session,
                    first: PageIndex(first),
                    data,
                })
                .is_err()
            {
                return Ok(false);
            }
            first += count;
            fault::point("replicator.first_copy");
            self.pulse.beat();
            self.status.set_first_copy(first, pages);
            self.forward_guest_events();
        }
        for _ in 0..PRECOPY_ROUNDS_MAX {
            self.pulse.beat();
            let Some(mut buffer) = self.buffers.take() else {
                return Ok(false);
            };
            self.source.precopy(&mut buffer)?;
            let dirty = buffer.pages.len();
            if !self.current.is(session) || self.encoder.send(EncodeJob::Precopy { session, buffer }).is_err()
            {
                return Ok(false);
            }
            if dirty <= PRECOPY_GOAL_PAGES {
                break;
            }
        }
        Ok(self.encoder.send(EncodeJob::FirstCopyDone { session }).is_ok())
    }

    fn capture(
        &mut self,
        session: Session,
        epoch: Epoch,
        close_gate: bool,
        stay_stopped: bool,
        moment: Moment,
    ) {
        if !self.current.is(session) {
            return;
        }
        let Some(mut buffer) = self.buffers.take() else {
            return;
        };
        match self.try_capture(session, epoch, close_gate, stay_stopped, &mut buffer) {
            Ok(report) => {
                let now = self.clock.now();
                self.idle.captured(close_gate, moment.interval_ns, &report);
                self.status.add_capture(now, &moment, &report);
                fault::point("replicator.captured");
                let learnt = self.gates.learnt();
                let job = EncodeJob::Checkpoint {
                    session,
                    epoch,
                    buffer,
                    learnt,
                    captured: now,
                };
                if self.encoder.send(job).is_ok() {
                    let figures = EpochFigures {
                        interval_ns: if moment.idle_ns > 0 { 0 } else { moment.interval_ns },
                        pause_ns: report.pause_ns,
                        dirty_pages: report.dirty_pages,
                    };
                    self.events.send_captured(session, epoch, moment.due_at, figures);
                }
            }
            Err(error) => self.capture_failed(session, epoch, &error),
        }
    }

    fn try_capture(
        &mut self,
        session: Session,
        epoch: Epoch,
        close_gate: bool,
        stay_stopped: bool,
        buffer: &mut Checkpoint,
    ) -> anyhow::Result<CaptureReport> {
        let gates = self.gates.clone();
        let mut taken_at = None;
        let mut barrier = || {
            taken_at = Some(SystemTime::now());
            gates
                .barrier(epoch, close_gate)
                .map_err(|error| BarrierError::new(Box::new(error)))
        };
        let captured = self.source.capture(&mut barrier, stay_stopped, buffer);
        if let Some(at) = taken_at {
            // Not in the pause, and before anybody can commit the epoch.
            debug!(
                target: EPOCHS,
                event = "barrier",
                session = %session,
                epoch = epoch.0,
                closes = close_gate,
                at_us = unix_us(at)
            );
        }
        Ok(captured?)
    }

    fn capture_failed(&mut self, session: Session, epoch: Epoch, error: &anyhow::Error) {
        error!(
            event = "capture_failed",
            epoch = epoch.0,
            error = format!("{error:#}")
        );
        self.status.count_failed_capture();
        self.status.set_detail(format!("capture failed: {error:#}"));
        self.status.add_event(
            "capture_failed",
            &json!({"epoch": epoch.0, "error": format!("{error:#}")}),
        );
        self.forward_guest_events();
        self.events.send(PrimaryEvent::CaptureFailed(session, epoch));
    }
}

fn unix_us(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
