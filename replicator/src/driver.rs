//! The replicator's driver: event → protocol → carry out commands, in one loop.
//!
//! ```text
//!   capture thread ─┐                    ┌─► capture thread (jobs)
//!   link tasks ─────┤► inbox ► Primary ──┼─► link (connect, send)
//!   witness task ───┤     (sans-IO)      ├─► witness task (ask)
//!   admin, signals ─┘                    └─► gates (release, open)
//! ```
//!
//! The loop never waits for the network, the disk's data or the hypervisor: it writes one small state file (which must
//! be durable before the next command) and moves frames out of the gates.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use romulus_daemon::RecordFile;
use romulus_hypervisor::fault;
use romulus_protocol::{
    NotProtected, Notice, Primary, PrimaryCommand, PrimaryEvent, PrimaryMessage, PrimaryOrder, Protection,
    Remembered, WitnessRequest,
};
use romulus_telemetry::{Pulse, systemd};
use romulus_types::{Epoch, Term, Time};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error, info, warn};

use crate::capture::{EPOCHS, Job};
use crate::events::{Input, OrderEnd};
use crate::gates::Gates;
use crate::link::Link;
use crate::session_cell::SessionCell;
use crate::status::Status;
use crate::tuner::{EpochFigures, Tuner};
use romulus_host_sys::process_clock::Clock;

/// How long what already arrived may take to reach the inbox.
const DRAIN: Duration = Duration::from_millis(2);

/// How long to wait when a gate could not be opened.
const REOPEN_INTERVAL: Duration = Duration::from_millis(500);

/// Why the replicator ends with an error when it leaves the guest mute.
const MUTE: &str = "the gate could not be removed from the guest's tap, so the guest is mute: protect the VM again, or end \
    it; the log has the cause";

/// Why the replicator ends when the record names another host, and what to do.
const FENCED: &str = "another host speaks for this VM, so the guest here was stopped: see `witness show` for where it \
    runs; end this copy, and protect the VM from there";

/// What the driver works with.
pub struct Driver {
    /// The protocol.
    pub primary: Primary,
    /// The inbox.
    pub inbox: mpsc::Receiver<Input>,
    /// For tasks that report back.
    pub inbox_sender: mpsc::Sender<Input>,
    /// The capture thread.
    pub jobs: SyncSender<Job>,
    /// The connection to the backup.
    pub link: Link,
    /// Requests to the witness.
    pub witness: mpsc::Sender<WitnessRequest>,
    /// The packet gates.
    pub gates: Gates,
    /// The session that is current.
    pub current: SessionCell,
    /// Figures.
    pub status: Arc<Status>,
    /// The process's clock.
    pub clock: Clock,
    /// What must be remembered.
    pub remembered: RecordFile<Remembered>,
    /// When epochs ended, until they are committed: for the commit lag.
    pub captured: std::collections::VecDeque<(Epoch, Time, EpochFigures)>,
    /// Steers the length of epochs.
    pub tuner: Tuner,
    /// Whoever ordered something and waits for the end.
    pub waiting: Vec<oneshot::Sender<OrderEnd>>,
    /// A signal asked for the end.
    pub terminating: bool,
    /// The guest was moved to the backup on purpose.
    pub handed_over: bool,
    /// Beats as the loop turns, and pats the watchdog: a loop that hangs is ended, so that the guest is not held for longer
    /// than need be.
    pub pulse: Pulse,
    /// The record lets this host speak, and a gate could not be opened: when to try again.
    pub reopen_at: Option<Instant>,
}

/// The record names another host: starting again changes nothing.
#[derive(Debug)]
pub struct Fenced;

impl std::fmt::Display for Fenced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(FENCED)
    }
}

impl std::error::Error for Fenced {}

/// How the loop went on.
enum Step {
    Continue,
    Finished,
}

impl Driver {
    /// Runs until the protocol has nothing further to do.
    ///
    /// # Errors
    /// When what must be durable can't be written: the process ends, the guest stays mute while paired, and the
    /// backup takes over.
    pub async fn run(mut self) -> anyhow::Result<()> {
        systemd::ready();
        loop {
            self.pulse.beat();
            if matches!(self.carry_out().await?, Step::Finished) {
                return Ok(());
            }
            let deadline = self.deadline();
            tokio::select! {
                biased;
                input = self.inbox.recv() => match input {
                    Some(Input::Terminate) if self.terminating => {
                        anyhow::bail!("ended by a second signal; if the VM was paired, its backup takes over");
                    }
                    Some(input) => self.take(input),
                    None => return Ok(()),
                },
                () = tokio::time::sleep_until(deadline) => self.primary.handle_timeout(self.clock.now()),
            }
            if self.reopen_at.is_some_and(|at| at <= Instant::now()) {
                self.open_gates();
            }
        }
    }

    /// A gate that no longer holds ends the session: the guest goes on alone, and says so.
    fn gate_lost(&mut self, now: Time, error: &str) {
        error!(event = "gate_lost", error);
        self.status.add_event("gate_lost", &json!({"error": error}));
        self.status.set_detail(format!("a gate was lost: {error}"));
        if let Some(session) = self.primary.session() {
            let epoch = self.primary.captured();
            self.primary
                .handle(now, PrimaryEvent::CaptureFailed(session, epoch));
        }
    }

    fn deadline(&self) -> tokio::time::Instant {
        let idle = Instant::now() + Duration::from_millis(100);
        let deadline = self
            .primary
            .poll_timeout()
            .map_or(idle, |time| self.clock.instant(time).min(idle));
        tokio::time::Instant::from_std(deadline)
    }

    fn take(&mut self, input: Input) {
        let now = self.clock.now();
        match input {
            Input::Event(event) => {
                if matches!(event, PrimaryEvent::Witness(_)) {
                    fault::point("replicator.answered");
                }
                self.primary.handle(now, event);
            }
            Input::Captured {
                session,
                epoch,
                due_at,
                figures,
            } => {
                if self.current.is(session) {
                    self.captured.push_back((epoch, now, figures));
                }
                self.primary
                    .handle(now, PrimaryEvent::Captured(session, epoch, due_at));
            }
            Input::Order(order, answer) => {
                info!(event = "order", order = ?order);
                self.waiting.retain(|waiting| !waiting.is_closed());
                self.waiting.push(answer);
                self.primary.handle(now, PrimaryEvent::Order(order));
            }
            Input::GateLost(error) => self.gate_lost(now, &error),
            Input::Terminate => {
                self.terminating = true;
                systemd::stopping();
                info!(event = "terminate", "going to not protected before ending");
                self.primary
                    .handle(now, PrimaryEvent::Order(PrimaryOrder::Unprotect));
            }
        }
        // A deadline that passed while inputs kept coming must not starve.
        if self.primary.poll_timeout().is_some_and(|time| time <= now) {
            self.primary.handle_timeout(now);
        }
    }

    async fn carry_out(&mut self) -> anyhow::Result<Step> {
        while let Some(command) = self.primary.poll_command() {
            if matches!(self.execute(command).await?, Step::Finished) {
                return Ok(Step::Finished);
            }
        }
        let committed = self.primary.committed();
        let now = self.clock.now();
        while let Some((_, captured, figures)) = self.captured.pop_front_if(|(epoch, ..)| *epoch <= committed)
        {
            self.status.add_commit(captured, now);
            if let Some((length_ns, reach)) = self.tuner.committed(figures, captured, now) {
                debug!(target: EPOCHS, event = "epoch_length", length_ns, ?reach);
                self.status.set_epoch_length(length_ns, reach);
                self.primary.handle(now, PrimaryEvent::EpochLength(length_ns));
            }
        }
        self.status.set_progress(
            self.primary.term().unwrap_or(Term(0)),
            self.primary.session(),
            self.primary.captured(),
            committed,
        );
        Ok(Step::Continue)
    }

    async fn execute(&mut self, command: PrimaryCommand) -> anyhow::Result<Step> {
        match command {
            PrimaryCommand::Remember(remembered) => {
                fault::point("replicator.before_remember");
                self.remembered.write(&remembered)?;
                fault::point("replicator.after_remember");
            }
            PrimaryCommand::AskWitness(request) => {
                fault::point("replicator.before_ask");
                // A full queue means that the witness is slow; the protocol repeats the request.
                let _ = self.witness.try_send(request);
            }
            PrimaryCommand::Connect {
                session,
                term,
                instance,
            } => {
                fault::point("replicator.connect");
                self.captured.clear();
                self.tuner.interrupt();
                self.current.set(Some(session));
                self.link.connect(session, term, instance);
            }
            PrimaryCommand::Disconnect(session) => {
                if self.current.is(session) {
                    self.current.set(None);
                }
                self.link.disconnect(session);
            }
            PrimaryCommand::Send(session, message) => {
                self.handed_over |= matches!(message, PrimaryMessage::HandOver { .. });
                self.link.send(session, message);
            }
            PrimaryCommand::StartFirstCopy(session) => self.job(Job::FirstCopy(session))?,
            PrimaryCommand::Capture {
                session,
                epoch,
                at,
                close_gate,
                stay_stopped,
            } => {
                if close_gate {
                    self.reopen_at = None;
                }
                self.job(Job::Capture {
                    session,
                    epoch,
                    at,
                    close_gate,
                    stay_stopped,
                })?;
            }
            PrimaryCommand::Release(epoch) => {
                fault::point("replicator.before_release");
                self.gate_result("release frames", |g| g.release(epoch));
                fault::point("replicator.after_release");
            }
            PrimaryCommand::OpenGate => {
                fault::point("replicator.before_open");
                debug!(target: EPOCHS, event = "gate_opens");
                self.open_gates();
                fault::point("replicator.after_open");
            }
            PrimaryCommand::StopGuest => {
                self.reopen_at = None;
                self.job(Job::StopGuest)?;
                self.gates.discard();
            }
            PrimaryCommand::SuspendGuest => self.job(Job::Suspend)?,
            PrimaryCommand::ResumeGuest => self.job(Job::Resume)?,
            PrimaryCommand::DrainSockets => self.drain(),
            PrimaryCommand::Report(notice) => self.notice(&notice),
            PrimaryCommand::Finish => {
                let fenced = self.primary.protection() == Protection::NotProtected(NotProtected::Fenced)
                    && !self.handed_over;
                self.finish(fenced).await;
                if fenced {
                    return Err(Fenced.into());
                }
                anyhow::ensure!(self.reopen_at.is_none(), MUTE);
                return Ok(Step::Finished);
            }
        }
        Ok(Step::Continue)
    }

    fn job(&self, job: Job) -> anyhow::Result<()> {
        self.jobs
            .try_send(job)
            .map_err(|_| anyhow::anyhow!("the capture thread is gone or does not keep up"))
    }

    /// The record lets this host speak, now and until it closes the gate again: so what fails is tried until it works.
    fn open_gates(&mut self) {
        self.reopen_at = None;
        if let Err(error) = self.gates.open_and_remove() {
            error!(event = "gate_failed", %error, "could not open the gate: the guest is mute, trying again");
            self.status
                .set_detail(format!("could not open the gate: {error}"));
            self.reopen_at = Some(Instant::now() + REOPEN_INTERVAL);
        }
    }

    fn gate_result(&self, what: &str, action: impl FnOnce(&Gates) -> Result<(), net_buffer::GateError>) {
        if let Err(error) = action(&self.gates) {
            error!(event = "gate_failed", %error, "could not {what}: the guest stays mute");
            self.status.set_detail(format!("could not {what}: {error}"));
        }
    }

    /// The readers share this thread: after a short sleep what had arrived is in the inbox, before this.
    fn drain(&self) {
        let inbox = self.inbox_sender.clone();
        tokio::spawn(async move {
            tokio::time::sleep(DRAIN).await;
            let _ = inbox.send(Input::Event(PrimaryEvent::Drained)).await;
        });
    }

    fn end_orders(&mut self, end: &OrderEnd) {
        for answer in self.waiting.drain(..) {
            let _ = answer.send(end.clone());
        }
    }

    fn notice(&mut self, notice: &Notice) {
        if let Notice::Protection(protection) = notice {
            self.status.set_protection(*protection);
            let line = match protection.words() {
                (state, Some(reason)) => format!("{state}: {reason}"),
                (state, None) => state.to_owned(),
            };
            systemd::status(&line);
            if *protection == Protection::Protected {
                self.status.reset_measurements();
            }
        }
        let (name, detail) = self.status.add_notice(notice);
        let failed = match notice {
            Notice::OrderRefused(_) => Some(format!("not possible now: {}", detail["reason"])),
            Notice::HandOverFailed => {
                Some("the hand-over did not finish in time; the guest stays here".into())
            }
            _ => None,
        };
        if let Some(why) = failed {
            self.end_orders(&Err(why));
        }
        info!(event = name, detail = %detail);
    }

    /// Detaches and lets the last messages out.
    async fn finish(&mut self, fenced: bool) {
        if self.jobs.try_send(Job::Detach).is_err() {
            warn!("the capture thread was gone before it could detach");
        }
        self.link.close().await;
        self.status.add_event("finished", &json!({}));
        let end = match self.reopen_at {
            _ if fenced => Err(FENCED.into()),
            Some(_) => Err(MUTE.into()),
            None => Ok(()),
        };
        self.end_orders(&end);
    }
}
