//! What a VM's store is asked to do, and who does it: its thread, or at once whoever has a frame that is soon done.
//!
//! ```text
//!   driver ──────── jobs ─────────────────────────►┐
//!   reader ──┬───── frames ──► channel ──► thread ─┴► store
//!            └ brief, and nothing waits ────────────►   │
//! ```
//! A checkpoint of a few pages is acknowledged in less time than it takes to wake a thread and be woken by it, and with many VMs on
//! few cores those wakings would be most of the work.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::anyhow;
use bytes::Bytes;
use romulus_hypervisor::spec::MachineSpec;
use romulus_protocol::BackupEvent;
use romulus_types::{Epoch, Session, Term};
use romulus_wire::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::yield_now;

use crate::inbox::EventSink;
use crate::store::Store;

/// Frames of page data that wait for the store, at most; the wire format bounds each.
const FRAMES_WAITING_MAX: usize = 32;
/// Jobs of the driver that wait besides, at most.
const JOBS_WAITING_MAX: usize = 64;

/// What the store is asked to do.
pub enum StoreJob {
    /// A session was accepted: make an image for this machine and receive its memory.
    Begin {
        /// The session.
        session: Session,
        /// The record's term that the primary named.
        term: Term,
        /// The machine.
        machine: Arc<MachineSpec>,
        /// Where frames go that tell the primary what the image holds already.
        held: mpsc::Sender<Bytes>,
    },
    /// A frame of the session's data stream and when its last byte came; the permit bounds how many wait.
    Frame(Session, Frame, Instant, OwnedSemaphorePermit),
    /// The session ended: what is staged and not committed is dropped.
    End(Session),
    /// The image must never be used again as it is.
    MarkUnusable(oneshot::Sender<()>),
    /// Show that a standby loads this commit, then have one waiting.
    TryStandby {
        /// The session.
        session: Session,
        /// The epoch, or a newer one.
        epoch: Epoch,
    },
    /// Let the guest run from the last commit.
    Activate {
        /// Its session.
        session: Session,
        /// The epoch, or a newer one.
        epoch: Epoch,
        /// The term in which this host speaks.
        term: Term,
    },
    /// Stop the guest that a forced takeover started, for good.
    StopGuest,
    /// The process of the guest that was activated has ended.
    GuestEnded,
    /// End the standby that waits: the agent is told to end.
    DismissStandby(oneshot::Sender<()>),
    /// Remove the image, the waiting standby, and whatever else there is of this VM.
    Forget {
        /// Also when it is not known whether a guest runs from the image.
        force: bool,
        /// What came of it.
        done: oneshot::Sender<Result<(), String>>,
    },
}

/// The channel to a store's thread.
pub fn store_channel() -> (mpsc::Sender<StoreJob>, mpsc::Receiver<StoreJob>) {
    mpsc::channel(FRAMES_WAITING_MAX + JOBS_WAITING_MAX)
}

/// Has the store work.
#[derive(Clone)]
pub struct StoreSender {
    jobs: mpsc::Sender<StoreJob>,
    frames: Arc<Semaphore>,
    store: Arc<Mutex<Store>>,
}

impl StoreSender {
    /// For a store whose thread receives `jobs`.
    pub fn new(jobs: mpsc::Sender<StoreJob>, store: Arc<Mutex<Store>>) -> Self {
        Self {
            jobs,
            frames: Arc::new(Semaphore::new(FRAMES_WAITING_MAX)),
            store,
        }
    }

    /// Hands in a job of the driver. Never waits: frames can't fill the room for jobs.
    ///
    /// # Errors
    /// When the store thread is gone, or so many jobs wait that it must hang.
    pub fn send(&self, job: StoreJob) -> anyhow::Result<()> {
        self.jobs
            .try_send(job)
            .map_err(|_| anyhow!("the store thread is gone or hangs"))
    }

    /// The end for those who do not keep the store at work.
    pub fn weak(&self) -> mpsc::WeakSender<StoreJob> {
        self.jobs.downgrade()
    }

    /// Waits until the store's thread has ended.
    pub async fn ended(&self) {
        self.jobs.closed().await;
    }

    /// The store, for who waits until nobody else is at work at it any more.
    pub fn store(&self) -> Arc<Mutex<Store>> {
        Arc::clone(&self.store)
    }

    /// Hands in a frame whose last byte came at `received`; waits while too many do. `false` when the store is gone.
    pub async fn frame(&self, session: Session, frame: Frame, received: Instant, events: &EventSink) -> bool {
        match self.at_once(session, &frame, received) {
            AtOnce::Done(None) => true,
            AtOnce::Done(Some(told)) => {
                events.send_async(told).await;
                // The driver acknowledges a commit before it is applied.
                yield_now().await;
                if let Some(told) = self.apply() {
                    events.send_async(told).await;
                }
                true
            }
            AtOnce::NotNow => {
                let Ok(permit) = Arc::clone(&self.frames).acquire_owned().await else {
                    return false;
                };
                self.jobs
                    .send(StoreJob::Frame(session, frame, received, permit))
                    .await
                    .is_ok()
            }
        }
    }

    /// Works at a frame on this thread if that is soon done: nobody is at the store, and no frame waits for it.
    fn at_once(&self, session: Session, frame: &Frame, received: Instant) -> AtOnce {
        let Ok(mut store) = self.store.try_lock() else {
            return AtOnce::NotNow;
        };
        // Frames stay in their order. A job of the driver that waits may come after one: they come from different tasks.
        let none_waits = self.frames.available_permits() == FRAMES_WAITING_MAX;
        let _wakes = WhenPanicking(self, session);
        if none_waits && store.unapplied.is_none() && store.is_brief(session, frame) {
            AtOnce::Done(store.frame(session, frame, received))
        } else {
            AtOnce::NotNow
        }
    }

    /// Applies the commit that [`at_once`](Self::at_once) made, if the store's thread has not begun with that.
    fn apply(&self) -> Option<BackupEvent> {
        self.store.try_lock().ok()?.apply()
    }
}

/// The store of whoever panics with it is of no use to anybody: its thread finds that out as soon as it has something to do.
struct WhenPanicking<'a>(&'a StoreSender, Session);

impl Drop for WhenPanicking<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(StoreJob::End(self.1));
        }
    }
}

/// What came of a frame that was to be worked at on the reader's thread.
enum AtOnce {
    /// It was; what the driver has to be told.
    Done(Option<BackupEvent>),
    /// It takes long, or others wait.
    NotNow,
}
