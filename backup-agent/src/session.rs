//! One session's connection on the backup: the answer to its `Hello`, its control stream, its page data.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use bytes::Bytes;
use romulus_config::ByteSize;
use romulus_hypervisor::spec::MachineSpec;
use romulus_protocol::{BackupEvent, BackupMessage, RefuseReason, ToBackup, ToPrimary};
use romulus_transport::{CloseCode, Connection, FrameError, FrameReader, SendStream};
use romulus_types::{HostId, Session, Term};
use romulus_wire::{decode_control, encode_control};
use std::sync::Mutex;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::inbox::EventSink;
use crate::pace::Pace;
use crate::refusals::{Refused, RefusedCount};
use crate::status::{RefusedInput, VmStatus};
use crate::store_jobs::StoreSender;

/// Control messages that wait to be sent, at most. Answers to heartbeats are dropped past that: they are cumulative.
const CONTROL_WAITING_MAX: usize = 64;
/// After so many bytes of a checkpoint the next session has its turn: some tens of microseconds' work.
const TURN_BYTES: usize = 32 << 10;
/// How long a refusal may take to reach the primary before the connection is closed under it.
const REFUSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A session that asks to be accepted, and then the session.
pub struct SessionIn {
    session: Session,
    primary: HostId,
    term: Term,
    machine: Arc<MachineSpec>,
    connection: Connection,
    backup: HostId,
    status: Arc<VmStatus>,
    refused: RefusedCount,
    /// Frames for the primary.
    control: mpsc::Sender<Bytes>,
    reader: Mutex<Option<FrameReader>>,
}

/// What the listener found out about a session.
pub struct Asking {
    /// The session.
    pub session: Session,
    /// The primary, by its certificate.
    pub primary: HostId,
    /// The term that it knows.
    pub term: Term,
    /// The machine.
    pub machine: Arc<MachineSpec>,
    /// Its connection.
    pub connection: Connection,
    /// Towards the primary.
    pub sender: SendStream,
    /// From the primary, after its hello.
    pub reader: FrameReader,
    /// This host.
    pub backup: HostId,
    /// Where a refusal is counted.
    pub refused: RefusedCount,
}

impl SessionIn {
    /// Takes the streams over; nothing is answered yet.
    pub fn new(asking: Asking, status: Arc<VmStatus>) -> Self {
        let (control, messages) = mpsc::channel(CONTROL_WAITING_MAX);
        asking.connection.spawn(write_control(asking.sender, messages));
        Self {
            session: asking.session,
            primary: asking.primary,
            term: asking.term,
            machine: asking.machine,
            connection: asking.connection,
            backup: asking.backup,
            status,
            refused: asking.refused,
            control,
            reader: Mutex::new(Some(asking.reader)),
        }
    }

    /// The session.
    pub fn id(&self) -> Session {
        self.session
    }

    /// The primary's host.
    pub fn primary(&self) -> &HostId {
        &self.primary
    }

    /// The record's term that the primary named.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The machine.
    pub fn machine(&self) -> Arc<MachineSpec> {
        Arc::clone(&self.machine)
    }

    /// Says yes. The primary then waits for the list of the pages that the image holds: frames for what is returned.
    pub fn welcome(&self) -> mpsc::Sender<Bytes> {
        self.queue(&ToPrimary::Welcome {
            backup: self.backup.clone(),
        });
        self.control.clone()
    }

    /// Begins to read, pages at no more than `bandwidth_max` a second.
    pub fn start(&self, store: &StoreSender, events: &EventSink, bandwidth_max: Option<ByteSize>) {
        let reader = self
            .reader
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        let Some(reader) = reader else { return };
        let task = ReadTask {
            session: self.session,
            connection: self.connection.clone(),
            store: store.clone(),
            events: events.clone(),
            status: Arc::clone(&self.status),
            bandwidth_max,
        };
        self.connection.spawn(task.run(reader));
    }

    /// Runs a task after what is being read of this connection.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.connection.spawn(task);
    }

    /// For the protocol's messages.
    pub fn send(&self, message: BackupMessage) {
        self.queue(&ToPrimary::Peer(message));
    }

    fn queue(&self, message: &ToPrimary) {
        let queued =
            encode_control(self.session, message).is_ok_and(|frame| self.control.try_send(frame).is_ok());
        if !queued {
            warn!(
                vm = self.status.vm(),
                "the control stream does not keep up; a message was dropped"
            );
        }
    }

    /// Says no, and why, and closes.
    pub fn refuse(self, reason: &str, passing: bool) {
        info!(
            event = "refused",
            vm = self.status.vm(),
            primary = self.primary.as_str(),
            reason
        );
        self.refused.count(Refused::Protocol);
        self.queue(&ToPrimary::Refused {
            reason: reason.into(),
            passing,
        });
        close_refused(self.connection.clone());
    }

    /// Ends the session. A primary whose checkpoint was refused is told why.
    pub fn close(self, reason: &str) {
        match self.status.refusal_of(self.session) {
            Some(refusal) => self.connection.close(CloseCode::BAD_INPUT, &refusal),
            None => self.connection.close(CloseCode::DONE, reason),
        }
    }
}

/// Why the protocol refuses a session, for the operator of the primary.
pub fn words(reason: RefuseReason) -> &'static str {
    match reason {
        RefuseReason::ActiveHere => "the VM runs on this backup host, or is about to: it was taken over",
        RefuseReason::Busy => "another session of this VM is connected: is it protected by someone else?",
        RefuseReason::OldTerm => {
            "the primary's record is older than what this host knows: it was taken over since"
        }
        RefuseReason::OtherWitness => {
            "the primary uses another witness than this host, or one restored from an old copy"
        }
        RefuseReason::Unresolved => "this host waits for the witness's answer; try again",
        RefuseReason::NotNamed => {
            "the witness's record does not name the host that asks as the one that runs this VM"
        }
        RefuseReason::WitnessSilent => {
            "the witness did not tell this host in time who runs the VM: can the backup's host reach it? Try again"
        }
    }
}

/// Closes a connection once a refusal can have arrived.
fn close_refused(connection: Connection) {
    connection.clone().spawn(async move {
        let _ = tokio::time::timeout(REFUSE_TIMEOUT, connection.closed()).await;
        connection.close(CloseCode::REFUSED, "see the refusal");
    });
}

/// Refuses a session that did not come as far as a [`SessionIn`].
pub async fn refuse_early(
    session: Session,
    mut sender: SendStream,
    connection: Connection,
    reason: &str,
    passing: bool,
) {
    info!(event = "refused", reason);
    if let Ok(frame) = encode_control(
        session,
        &ToPrimary::Refused {
            reason: reason.into(),
            passing,
        },
    ) {
        let _ = sender.send(frame).await;
    }
    let _ = tokio::time::timeout(REFUSE_TIMEOUT, connection.closed()).await;
    connection.close(CloseCode::REFUSED, "see the refusal");
}

async fn write_control(mut stream: SendStream, mut frames: mpsc::Receiver<Bytes>) {
    while let Some(frame) = frames.recv().await {
        if stream.send(frame).await.is_err() {
            return;
        }
    }
    // Dropped, it would be reset, and a refusal that was said last could be lost with it.
    stream.finish();
}

struct ReadTask {
    session: Session,
    connection: Connection,
    store: StoreSender,
    events: EventSink,
    status: Arc<VmStatus>,
    bandwidth_max: Option<ByteSize>,
}

impl ReadTask {
    /// Reads both streams until one ends; says `Disconnected` exactly once.
    async fn run(self, control: FrameReader) {
        let result = tokio::select! {
            result = self.control(control) => result,
            result = self.data() => result,
            () = self.events.0.closed() => {
                return self.connection.close(CloseCode::FAULT, "the backup gave this VM up and begins with it again");
            }
        };
        match result {
            Ok(()) => {
                info!(event = "session_ended", vm = self.status.vm());
                self.connection.close(CloseCode::DONE, "the session ended");
            }
            Err(error) => {
                warn!(
                    event = "session_ended",
                    vm = self.status.vm(),
                    error = format!("{error:#}")
                );
                if error
                    .downcast_ref::<FrameError>()
                    .is_none_or(|e| !matches!(e, FrameError::Transport(_)))
                {
                    self.status.count_refused_input(RefusedInput::Session);
                }
                self.connection.close(CloseCode::BAD_INPUT, &format!("{error:#}"));
            }
        }
        self.events
            .send_async(BackupEvent::Disconnected(self.session))
            .await;
    }

    async fn control(&self, mut reader: FrameReader) -> anyhow::Result<()> {
        while let Some(frame) = reader.next().await? {
            let ToBackup::Peer(message) = decode_control(&frame)?;
            self.events
                .send_async(BackupEvent::Peer(self.session, message))
                .await;
        }
        Ok(())
    }

    async fn data(&self) -> anyhow::Result<()> {
        let stream = self
            .connection
            .accept_data()
            .await
            .map_err(FrameError::Transport)?;
        let mut reader = FrameReader::for_session(stream, self.session);
        let limit = self.bandwidth_max.map(ByteSize::bytes);
        let mut pace = limit.map(|limit| Pace::new(limit, Instant::now()));
        while let Some(frame) = reader.next().await? {
            let bytes = frame.payload.len();
            let received = reader.received_at();
            if !self
                .store
                .frame(self.session, frame, received, &self.events)
                .await
            {
                bail!("the store of this VM is gone");
            }
            let wait = pace.as_mut().and_then(|pace| pace.read(bytes, Instant::now()));
            match wait {
                Some(until) => tokio::time::sleep_until(until.into()).await,
                // Sessions share a thread: one with much to read lets the others have their turn.
                None if bytes >= TURN_BYTES => tokio::task::yield_now().await,
                None => {}
            }
        }
        // The data stream may end first; the control stream says what the session does.
        std::future::pending().await
    }
}
