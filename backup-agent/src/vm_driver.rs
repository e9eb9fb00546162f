//! The driver of one VM on the backup: event → protocol → carry out commands.
//!
//! ```text
//!   listener (Hello, control, data) ─┐                 ┌─► store thread (image, standby)
//!   store thread (verified, loaded) ─┤► inbox ► Backup ┼─► session's connection
//!   witness task, admin ─────────────┘                 └─► witness task
//! ```
//!
//! The store thread owns the image and the standby; the driver waits for it only where a mark must be durable before
//! the next command.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use romulus_config::VmLimits;
use romulus_daemon::RecordFile;
use romulus_host_sys::process_clock::Clock;
use romulus_hypervisor::fault;
use romulus_protocol::{
    Backup, BackupCommand, BackupEvent, BackupMessage, NotProtected, Notice, Protection, Remembered,
    WitnessRequest,
};
use romulus_types::{Epoch, Session, Term};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tracing::info;

use crate::inbox::{EventSink, Input};
use crate::session::{SessionIn, words};
use crate::starts::Starts;
use crate::status::VmStatus;
use crate::store_jobs::{StoreJob, StoreSender};

/// How long what already arrived may take to reach the inbox.
const DRAIN: Duration = Duration::from_millis(2);

/// How long the store may take to come to a job whose end is waited for: it may be reading all memory, or loading a checkpoint into a standby.
/// One that waits for this driver instead, whose inbox its primary keeps full, waits for ever; then all is begun anew.
const STORE_AT_MOST: Duration = Duration::from_mins(15);

/// What the driver works with.
pub struct VmDriver {
    /// The protocol.
    pub backup: Backup,
    /// The inbox.
    pub inbox: mpsc::Receiver<Input>,
    /// For tasks that report back.
    pub events: EventSink,
    /// The image and the standby.
    pub store: StoreSender,
    /// Requests to the witness.
    pub witness: mpsc::Sender<WitnessRequest>,
    /// The connection of the session.
    pub session: Option<SessionIn>,
    /// Connections that said hello and are not answered yet. The protocol bounds their number.
    pub asking: Vec<SessionIn>,
    /// What this VM may use.
    pub limits: VmLimits,
    /// Whose guest is started when.
    pub starts: Starts,
    /// When its primary was last heard.
    pub heard: Instant,
    /// Bytes of the machine's memory, as admission counts them: of what is here, and of what those who ask have been promised.
    pub image_bytes: Arc<AtomicU64>,
    /// Of what is here.
    pub accepted_bytes: u64,
    /// Figures.
    pub status: Arc<VmStatus>,
    /// The process's clock.
    pub clock: Clock,
    /// The newest commit that was acknowledged.
    pub acked: Cell<Epoch>,
    /// What must be remembered.
    pub remembered: Arc<Mutex<RecordFile<Remembered>>>,
}

impl VmDriver {
    /// Runs as long as the agent.
    ///
    /// # Errors
    /// When what must be durable can't be written.
    pub async fn run(mut self) -> anyhow::Result<()> {
        loop {
            self.status.pulse.beat();
            while let Some(command) = self.backup.poll_command() {
                self.execute(command).await?;
            }
            self.progress();
            let deadline = self.deadline();
            tokio::select! {
                biased;
                input = self.inbox.recv() => match input {
                    Some(Input::Forget { force, done }) => {
                        let forgotten = self.forget(force).await;
                        let ends = forgotten.is_ok();
                        let _ = done.send(forgotten);
                        if ends {
                            return Ok(());
                        }
                    }
                    Some(input) => self.take(input),
                    None => return Ok(()),
                },
                () = self.store.ended() => bail!("the store's thread has ended"),
                () = tokio::time::sleep_until(deadline) => self.backup.handle_timeout(self.clock.now()),
            }
        }
    }

    fn progress(&self) {
        let term = self.backup.term().unwrap_or(Term(0));
        let committed = self.backup.committed().map_or(Epoch::NONE, |(_, epoch)| epoch);
        self.status.set_progress(term, self.backup.session(), committed);
        let may_start = matches!(
            self.backup.protection(),
            Protection::Protected | Protection::NotProtected(NotProtected::Resolving)
        );
        self.starts
            .heard(self.status.vm_id(), may_start.then_some(self.heard));
    }

    fn deadline(&self) -> tokio::time::Instant {
        let idle = Instant::now() + Duration::from_secs(1);
        let deadline = self
            .backup
            .poll_timeout()
            .map_or(idle, |time| self.clock.instant(time).min(idle));
        tokio::time::Instant::from_std(deadline)
    }

    fn take(&mut self, input: Input) {
        let now = self.clock.now();
        match input {
            Input::Event(event) => {
                match event {
                    BackupEvent::Witness(_) => fault::point("agent.answered"),
                    BackupEvent::Peer(..) | BackupEvent::Verified(..) => self.heard = Instant::now(),
                    _ => {}
                }
                self.backup.handle(now, event);
            }
            Input::Hello {
                session,
                primary,
                term,
                instance,
            } => {
                fault::point("agent.hello");
                let id = session.id();
                self.asking.push(*session);
                self.backup.handle(
                    now,
                    BackupEvent::Hello {
                        session: id,
                        primary,
                        term,
                        instance,
                    },
                );
            }
            Input::Forget { .. } => unreachable!("the loop takes it"),
        }
        if self.backup.poll_timeout().is_some_and(|time| time <= now) {
            self.backup.handle_timeout(now);
        }
    }

    /// Removes all that is kept of a VM that is not protected to here. Without `force` not while a commit is kept that may have
    /// to be taken over.
    async fn forget(&mut self, force: bool) -> Result<(), String> {
        if self.session.is_some() || !self.asking.is_empty() {
            return Err("its primary is connected: unprotect it there first".into());
        }
        if self.backup.committed().is_some() && !force {
            return Err(
                "a commit of it is kept that may have to be taken over; --force if the VM runs elsewhere, or never again".into(),
            );
        }
        let gone =
            || "the store of this VM is gone, and the agent begins with it again: try again soon".to_owned();
        let (done, wait) = oneshot::channel();
        self.store
            .send(StoreJob::Forget { force, done })
            .map_err(|_| gone())?;
        answered(wait).await.map_err(|_| gone())??;
        let path = writer(&self.remembered).path().to_owned();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("could not remove {}: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }

    async fn execute(&mut self, command: BackupCommand) -> anyhow::Result<()> {
        match command {
            BackupCommand::Remember(remembered) => {
                fault::point("agent.before_remember");
                self.remember(remembered).await?;
                fault::point("agent.after_remember");
            }
            BackupCommand::AskWitness(request) => {
                fault::point("agent.before_ask");
                // A full queue means that the witness is slow; the protocol repeats the request.
                let _ = self.witness.try_send(request);
            }
            BackupCommand::MarkUnusable => {
                fault::point("agent.before_unusable");
                let (done, wait) = oneshot::channel();
                self.store.send(StoreJob::MarkUnusable(done))?;
                answered(wait)
                    .await
                    .context("the image could not be marked unusable")?;
                fault::point("agent.after_unusable");
            }
            BackupCommand::Accept(session) => self.accept(session)?,
            BackupCommand::Refuse(session, reason) => {
                if let Some(refused) = self.take_asking(session) {
                    self.claim();
                    refused.refuse(words(reason), true);
                }
            }
            BackupCommand::Disconnect(session) => {
                self.store.send(StoreJob::End(session))?;
                if let Some(ended) = self.take_session(session) {
                    ended.close("the backup ended the session");
                }
            }
            BackupCommand::Send(session, message) => {
                if let Some(current) = self.session.as_ref().filter(|s| s.id() == session) {
                    let acks = self.is_news(&message);
                    if acks {
                        fault::point("agent.before_ack");
                    }
                    current.send(message);
                    if acks {
                        self.status.commit_acked(self.acked.get(), Instant::now());
                        fault::point("agent.after_ack");
                    }
                }
            }
            BackupCommand::TryStandby(session, epoch) => {
                self.store.send(StoreJob::TryStandby { session, epoch })?;
            }
            BackupCommand::Activate { session, epoch, term } => {
                self.status
                    .event("activation_begin", &json!({"epoch": epoch.0, "term": term.0}));
                self.store.send(StoreJob::Activate { session, epoch, term })?;
            }
            BackupCommand::DrainSockets => self.drain(),
            BackupCommand::StopGuest => self.store.send(StoreJob::StopGuest)?,
            BackupCommand::Report(notice) => self.notice(&notice),
        }
        Ok(())
    }

    /// *Durable*. Not on this thread, which all VMs share: a disk may take its time.
    async fn remember(&mut self, remembered: Remembered) -> anyhow::Result<()> {
        let record = Arc::clone(&self.remembered);
        let write = move || writer(&record).write(&remembered);
        Ok(tokio::task::spawn_blocking(write).await??)
    }

    /// Whether it acknowledges a commit for the first time.
    fn is_news(&self, message: &BackupMessage) -> bool {
        matches!(message, BackupMessage::Alive { committed, .. } if *committed != self.acked.replace(*committed))
    }

    fn take_session(&mut self, session: Session) -> Option<SessionIn> {
        if self
            .session
            .as_ref()
            .is_some_and(|current| current.id() == session)
        {
            self.session.take()
        } else {
            None
        }
    }

    fn take_asking(&mut self, session: Session) -> Option<SessionIn> {
        let position = self.asking.iter().position(|asking| asking.id() == session)?;
        Some(self.asking.remove(position))
    }

    /// Claims no more room than what is here takes, or the largest machine of those who ask.
    fn claim(&self) {
        let asked = self.asking.iter().map(|asking| asking.machine().layout.bytes());
        let bytes = asked.fold(self.accepted_bytes, u64::max);
        self.image_bytes.store(bytes, Ordering::Relaxed);
    }

    fn accept(&mut self, session: Session) -> anyhow::Result<()> {
        let accepted = self
            .take_asking(session)
            .context("the protocol accepted nobody who asked")?;
        self.status.session_begins();
        self.heard = Instant::now();
        self.starts.followed(self.status.vm_id(), accepted.primary());
        self.accepted_bytes = accepted.machine().layout.bytes();
        self.claim();
        let current = self.session.insert(accepted);
        self.store.send(StoreJob::Begin {
            session,
            term: current.term(),
            machine: current.machine(),
            held: current.welcome(),
        })?;
        current.start(&self.store, &self.events, self.limits.bandwidth_max);
        fault::point("agent.accepted");
        self.status.event(
            "session",
            &json!({"session": session.to_string(), "primary": current.primary().as_str()}),
        );
        Ok(())
    }

    /// It shares the readers' thread: after a short sleep what had arrived is in the inbox, before this.
    fn drain(&self) {
        let events = self.events.clone();
        let drained = async move {
            tokio::time::sleep(DRAIN).await;
            events.send_async(BackupEvent::Drained).await;
        };
        match &self.session {
            Some(session) => session.spawn(drained),
            None => drop(tokio::spawn(drained)),
        }
    }

    fn notice(&self, notice: &Notice) {
        if let Notice::Protection(protection) = notice {
            self.status.set_protection(*protection);
        }
        let (name, detail) = self.status.notice(notice);
        info!(event = name, vm = self.status.vm(), detail = %detail);
    }
}

fn writer(record: &Mutex<RecordFile<Remembered>>) -> MutexGuard<'_, RecordFile<Remembered>> {
    record.lock().expect("whoever writes does not panic")
}

/// What the store says to a job.
async fn answered<T>(wait: oneshot::Receiver<T>) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(STORE_AT_MOST, wait).await;
    answer
        .context("the store did not come to it")?
        .context("the store has ended")
}
