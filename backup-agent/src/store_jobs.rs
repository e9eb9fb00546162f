//! What a VM's store thread is asked to do, and the channel that takes it there.

use std::sync::Arc;
use std::time::Instant;

use anyhow::anyhow;
use bytes::Bytes;
use romulus_hypervisor::spec::MachineSpec;
use romulus_types::{Epoch, Session, Term};
use romulus_wire::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

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
    Forget(oneshot::Sender<Result<(), String>>),
}

/// The sending end.
#[derive(Clone)]
pub struct StoreSender {
    jobs: mpsc::Sender<StoreJob>,
    frames: Arc<Semaphore>,
}

/// The channel to a store thread.
pub fn store_channel() -> (StoreSender, mpsc::Receiver<StoreJob>) {
    let (jobs, receiver) = mpsc::channel(FRAMES_WAITING_MAX + JOBS_WAITING_MAX);
    (
        StoreSender {
            jobs,
            frames: Arc::new(Semaphore::new(FRAMES_WAITING_MAX)),
        },
        receiver,
    )
}

impl StoreSender {
    /// Hands in a job of the driver. Never waits: frames can't fill the room for jobs.
    ///
    /// # Errors
    /// When the store thread is gone, or so many jobs wait that it must hang.
    pub fn send(&self, job: StoreJob) -> anyhow::Result<()> {
        self.jobs
            .try_send(job)
            .map_err(|_| anyhow!("the store thread is gone or hangs"))
    }

    /// The end for the store's own watchers.
    pub fn weak(&self) -> mpsc::WeakSender<StoreJob> {
        self.jobs.downgrade()
    }

    /// Hands in a frame whose last byte came at `received`; waits while too many do. `false` when the store is gone.
    pub async fn frame(&self, session: Session, frame: Frame, received: Instant) -> bool {
        let Ok(permit) = Arc::clone(&self.frames).acquire_owned().await else {
            return false;
        };
        self.jobs
            .send(StoreJob::Frame(session, frame, received, permit))
            .await
            .is_ok()
    }
}
