//! The store of one VM: its image and its standby. It has a thread, whose jobs come in order from the driver and from the reader of the
//! session's data stream; the frames of small checkpoints the reader's thread works at itself (`store_jobs.rs`), as long as
//! nothing waits for the store's.
//!
//! ```text
//!   Pages ─► decode against the applied image ─► stage
//!   Commit ─► verify count, digests ─► durable slot ─► Verified (the driver acks) ─► apply ─► next epoch
//! ```
//!
//! Epoch n+1 is decoded only after n was applied, so deltas always refer to the applied image.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use romulus_host_sys::PidFd;
use romulus_host_sys::priority::Turns;
use romulus_hypervisor::fault;
use romulus_hypervisor::spec::MachineSpec;
use romulus_hypervisor::standby::StandbyError;
use romulus_page_codec::PageHasher;
use romulus_protocol::BackupEvent;
use romulus_types::{Epoch, Session, Term, VmId};
use romulus_wire::{Frame, HeldPagesWriter};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use crate::guest::{Guest, ram_paths};
use crate::huge;
use crate::inbox::EventSink;
use crate::receive::{Received, Receiver};
use crate::starts::Starts;
use crate::status::VmStatus;
use crate::store_jobs::StoreJob;
use crate::vm_image::VmImage;

/// One wait for the end of a guest; then it is waited for again.
const GUEST_LOOK: Duration = Duration::from_secs(3600);
/// Commits between two looks at the image's size; the first is after the first one.
const SIZE_EVERY_COMMITS: u64 = 64;
const FIRST_SIZE: u64 = 1;

/// A commit that is not yet in the memory files.
#[derive(Clone, Copy)]
pub struct Unapplied {
    session: Session,
    epoch: Epoch,
    pages: u64,
    verify_ns: u64,
}

/// Its state.
pub struct Store {
    /// For those who watch the guest; does not keep the store at work.
    pub own_jobs: mpsc::WeakSender<StoreJob>,
    /// To the driver.
    pub events: EventSink,
    /// The image's place and limits.
    pub image: VmImage,
    /// The standby and the guest that it becomes.
    pub guest: Guest,
    /// The checkpoint being received.
    pub receiver: Option<Receiver>,
    /// What has to be applied before anything else is done.
    pub unapplied: Option<Unapplied>,
    /// Figures.
    pub status: Arc<VmStatus>,
    /// Whether the memory of an image goes onto huge pages once a standby has loaded it.
    pub huge_pages: bool,
    /// How often another standby is started when one fails before it has the whole checkpoint.
    pub activation_retries_max: u16,
    /// Whose guest is started when.
    pub starts: Starts,
    /// The VM.
    pub vm: VmId,
}

impl Store {
    /// The store's thread: works until the driver is gone.
    ///
    /// # Panics
    /// When whoever worked at the store last did: what it holds is not known then.
    pub fn run(store: &Mutex<Self>, mut jobs: mpsc::Receiver<StoreJob>) {
        let lock = || store.lock().expect("the store is as whoever had it last left it");
        // It computes, and the hypervisors that it starts inherit from it.
        let mut turns = Turns::ordinary();
        // One that an earlier life of the agent started.
        lock().watch_guest();
        while let Some(job) = jobs.blocking_recv() {
            let mut store = lock();
            let awaited = store.receiver.as_ref().is_some_and(Receiver::is_awaited);
            turns.awaited(awaited && matches!(job, StoreJob::Frame(..)));
            store.job(job);
        }
    }

    fn job(&mut self, job: StoreJob) {
        self.apply_and_tell();
        match job {
            StoreJob::Begin {
                session,
                term,
                machine,
                held,
            } => {
                self.receiver = None;
                let begun = self.guest.make_way();
                match begun.and_then(|()| self.begin(session, machine, &held)) {
                    Ok(()) => {
                        fault::point("agent.image_made");
                        self.receiver = Some(Receiver::new(session, term));
                    }
                    Err(error) => {
                        let told = self.invalid(session, Epoch::NONE, &error);
                        self.events.send(told);
                    }
                }
            }
            StoreJob::Frame(session, frame, received, permit) => {
                let told = self.frame(session, &frame, received);
                told.into_iter().for_each(|event| self.events.send(event));
                self.apply_and_tell();
                drop(permit);
            }
            StoreJob::End(session) => {
                if self
                    .receiver
                    .as_ref()
                    .is_some_and(|receiver| receiver.session() == session)
                {
                    self.receiver = None;
                    self.image.discard_staging();
                    self.status.set_usage(self.image.usage());
                    self.status.set_spilled_bytes(self.image.spilled_bytes());
                }
            }
            StoreJob::MarkUnusable(done) => match self.image.mark_unusable() {
                Ok(()) => drop(done.send(())),
                // The sender is dropped: the driver ends rather than go on with an image that may be used by mistake.
                Err(error) => error!(error = format!("{error:#}"), "could not mark the image unusable"),
            },
            StoreJob::TryStandby { session, epoch } => self.try_standby(session, epoch),
            StoreJob::Activate { session, epoch, term } => self.activate(session, epoch, term),
            StoreJob::StopGuest => self.guest.stop(),
            StoreJob::GuestEnded => self.guest_ended(),
            StoreJob::DismissStandby(done) => {
                self.guest.dismiss_waiting();
                let _ = done.send(());
            }
            // Whoever does not wait any more was told that it is not done.
            StoreJob::Forget { done, .. } if done.is_closed() => {}
            StoreJob::Forget { force, done } => {
                let forgotten = self.forget(force).map_err(|error| format!("{error:#}"));
                let _ = done.send(forgotten);
            }
        }
    }

    fn forget(&mut self, force: bool) -> anyhow::Result<()> {
        if !force {
            self.guest.ensure_known()?;
        }
        self.guest.forget(&self.image)?;
        self.receiver = None;
        self.image.forget()
    }

    fn begin(
        &mut self,
        session: Session,
        machine: Arc<MachineSpec>,
        held: &mpsc::Sender<Bytes>,
    ) -> anyhow::Result<()> {
        let hasher = PageHasher::new(session);
        let mut writer = HeldPagesWriter::new(session);
        let mut pages = 0;
        // A primary that is gone by now leaves the image as it is, for its next session.
        let send = |frame| drop(held.blocking_send(frame));
        self.image.begin(session, machine, |index, page| {
            pages += 1;
            writer.push(index, hasher.hash(page)).into_iter().for_each(send);
        })?;
        writer.finish().for_each(send);
        info!(event = "receiving", vm = self.status.vm(), held_pages = pages);
        Ok(())
    }

    /// Whether `frame` is of a checkpoint that takes so little that any thread may work at it.
    pub fn is_brief(&self, session: Session, frame: &Frame) -> bool {
        let receiver = self.receiver.as_ref();
        receiver.is_some_and(|receiver| receiver.session() == session && receiver.is_brief(frame))
            && self.image.is_at_hand()
    }

    /// Takes a frame of the session's data stream, whose last byte came at `received`. Returns what the driver has to be told, before
    /// [`apply`](Self::apply).
    pub fn frame(&mut self, session: Session, frame: &Frame, received: Instant) -> Option<BackupEvent> {
        let receiver = self
            .receiver
            .as_mut()
            .filter(|receiver| receiver.session() == session)?;
        let began = Instant::now();
        match receiver.frame(frame, &mut self.image) {
            Ok(Received::More) => None,
            Ok(Received::Committed {
                epoch,
                pages,
                captured,
            }) => {
                self.unapplied = Some(Unapplied {
                    session,
                    epoch,
                    pages,
                    verify_ns: elapsed_ns(began),
                });
                self.committed(session, epoch, received);
                Some(BackupEvent::Verified(session, epoch, captured))
            }
            Err(error) => {
                let epoch = receiver.epoch();
                Some(self.invalid(session, epoch, &error))
            }
        }
    }

    /// Before it can be acknowledged. `received`: when its last byte came.
    fn committed(&self, session: Session, epoch: Epoch, received: Instant) {
        debug!(
            target: "epochs",
            event = "commit",
            vm = self.status.vm(),
            session = %session,
            epoch = epoch.0
        );
        fault::point("agent.after_commit");
        self.status.commit_received(epoch, received);
    }

    /// Writes the last commit into the memory files, unless that is done. Returns what the driver has to be told.
    pub fn apply(&mut self) -> Option<BackupEvent> {
        let commit = self.unapplied.take()?;
        fault::point("agent.before_apply");
        let began = Instant::now();
        if let Err(error) = self.image.apply() {
            return Some(self.invalid(commit.session, commit.epoch, &error));
        }
        fault::point("agent.after_apply");
        self.status
            .add_commit(commit.pages, commit.verify_ns, elapsed_ns(began));
        self.status.set_spilled_bytes(self.image.spilled_bytes());
        if commit.epoch.0 % SIZE_EVERY_COMMITS == FIRST_SIZE {
            self.status.set_usage(self.image.usage());
        }
        None
    }

    fn apply_and_tell(&mut self) {
        let told = self.apply();
        told.into_iter().for_each(|event| self.events.send(event));
    }

    fn invalid(&mut self, session: Session, epoch: Epoch, error: &anyhow::Error) -> BackupEvent {
        error!(
            event = "invalid_checkpoint",
            vm = self.status.vm(),
            epoch = epoch.0,
            error = format!("{error:#}")
        );
        let refusal = format!("checkpoint {epoch} was refused: {error:#}");
        self.status.refuse_session(session, refusal.clone());
        self.status.set_detail(refusal);
        self.receiver = None;
        self.image.discard_staging();
        BackupEvent::Invalid(session, epoch)
    }

    fn try_standby(&mut self, session: Session, epoch: Epoch) {
        let began = Instant::now();
        match self.prove_standby(session) {
            Ok(pid) => {
                let elapsed_ms = elapsed_ns(began) / 1_000_000;
                info!(
                    event = "standby_loaded",
                    vm = self.status.vm(),
                    epoch = epoch.0,
                    elapsed_ms
                );
                self.status.event(
                    "standby_loaded",
                    &json!({"epoch": epoch.0, "elapsed_ms": elapsed_ms}),
                );
                self.status
                    .set_standby(if pid.is_some() { "waiting" } else { "proven" }, pid);
                self.events.send(BackupEvent::StandbyLoaded(session, epoch));
            }
            Err(error) => {
                warn!(
                    event = "standby_failed",
                    vm = self.status.vm(),
                    error = format!("{error:#}")
                );
                self.status
                    .set_detail(format!("the standby could not load a checkpoint: {error:#}"));
                self.events.send(BackupEvent::StandbyFailed(session));
            }
        }
    }

    fn prove_standby(&mut self, session: Session) -> anyhow::Result<Option<u32>> {
        let committed = self.image.committed().context("nothing is committed")?;
        anyhow::ensure!(
            committed.session == session,
            "the last commit is of another session"
        );
        self.guest.prove(&self.image).context("trial load")?;
        fault::point("agent.proven");
        let pid = self
            .guest
            .wait_warm(&self.image)
            .context("start of the waiting standby")?;
        fault::point("agent.waiting");
        if self.huge_pages {
            huge::begin(ram_paths(&self.image)?, Arc::clone(&self.status));
        }
        Ok(pid)
    }

    fn activate(&mut self, session: Session, epoch: Epoch, term: Term) {
        let began = Instant::now();
        match self.try_activate(session, epoch) {
            Ok(report) => {
                let elapsed_us = elapsed_ns(began) / 1000;
                let detail = json!({"term": term.0, "elapsed_us": elapsed_us, "report": report});
                info!(event = "activated", vm = self.status.vm(), detail = %detail);
                self.status.event("activated", &detail);
                self.status.set_activation(detail);
                self.status.set_standby("active", self.guest.pid());
                self.events.send(BackupEvent::Activated);
                self.watch_guest();
            }
            Err(error) => {
                error!(
                    event = "activation_failed",
                    vm = self.status.vm(),
                    error = format!("{error:#}")
                );
                self.status
                    .event("activation_failed", &json!({"error": format!("{error:#}")}));
                self.status.set_detail(format!("activation failed: {error:#}"));
                self.events.send(BackupEvent::ActivationFailed);
            }
        }
    }

    fn try_activate(&mut self, session: Session, epoch: Epoch) -> anyhow::Result<serde_json::Value> {
        self.receiver = None;
        self.image.discard_staging();
        self.image.apply()?;
        let committed = self.image.committed().context("nothing is committed")?;
        // Output commit: what was acknowledged is in the image, and the image is of the session that was granted.
        assert_eq!(
            committed.session, session,
            "an activation names the session of the commit"
        );
        assert!(committed.epoch >= epoch, "a commit that was acknowledged is gone");
        let turn = self.starts.take(&self.vm);
        let report = self.start_guest()?;
        drop(turn);
        fault::point("agent.activated");
        Ok(report)
    }

    /// Has the store told when the guest's process ends: powered off, panicked, or killed.
    fn watch_guest(&mut self) {
        if !self.guest.is_active() {
            return;
        }
        let Some(process) = self.guest.pid().and_then(|pid| PidFd::open(pid).ok()) else {
            return self.guest_ended();
        };
        let jobs = self.own_jobs.clone();
        let watch = move || {
            while let Ok(false) = process.wait_ended(GUEST_LOOK) {}
            // Without a store nobody wants to know.
            if let Some(jobs) = jobs.upgrade() {
                let _ = jobs.blocking_send(StoreJob::GuestEnded);
            }
        };
        let watcher = std::thread::Builder::new().name(format!("guest-{}", self.status.vm()));
        if let Err(error) = watcher.spawn(watch) {
            warn!(%error, vm = self.status.vm(), "the end of the guest will not be noticed");
        }
    }

    fn guest_ended(&mut self) {
        let Some(end) = self.guest.end() else {
            return;
        };
        let detail = json!({"how": end});
        warn!(event = "guest_ended", vm = self.status.vm(), detail = %detail);
        self.status.event("guest_ended", &detail);
        self.status
            .set_detail(format!("the guest that was taken over has ended: {end}"));
        self.status.set_standby("ended", None);
    }

    /// Marks the image as consumed right before a standby may read it, and lets the guest run. A standby that fails before it
    /// has read everything leaves the image as it was: then another one is started.
    fn start_guest(&mut self) -> anyhow::Result<serde_json::Value> {
        let mut retries_left = self.activation_retries_max;
        loop {
            let image = &self.image;
            let mut consume = || {
                fault::point("agent.before_consumed");
                image
                    .mark_consumed()
                    .map_err(|error| StandbyError::new("the image can't be marked", error))?;
                fault::point("agent.after_consumed");
                Ok(())
            };
            let error = match self.guest.activate(image, &mut consume) {
                Ok(report) => return Ok(report),
                Err(error) => error,
            };
            let failed = error.downcast_ref::<StandbyError>();
            if !failed.is_some_and(|error| error.untouched) {
                return Err(error);
            }
            self.image.unmark_consumed()?;
            if retries_left == 0 {
                return Err(error.context(
                    "no standby took the checkpoint, which is still whole: restart the agent to try again",
                ));
            }
            let detail = json!({"error": format!("{error:#}"), "retries_left": retries_left});
            warn!(event = "activation_retry", vm = self.status.vm(), detail = %detail);
            self.status.event("activation_retry", &detail);
            retries_left -= 1;
        }
    }
}

fn elapsed_ns(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
