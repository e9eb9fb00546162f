//! The connection to the backup: one session at a time, its control stream, and the stream of page data.
//!
//! ```text
//!   connect ─► QUIC, mutual TLS ─► Hello ─► Welcome, HeldPages… ─► Connected ┬─► control reader (Alive, StandbyLoaded)
//!                                      └─► Refused ─► Disconnected             ├─► control writer (Heartbeat, …)
//!                                                                              └─► data writer  (frames from the encoder)
//! ```
//!
//! Whatever ends the session ends its task, which says `Disconnected` exactly once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use romulus_hypervisor::fault;
use romulus_page_codec::{HeldPages, NoSuchPage};
use romulus_protocol::{Hello, PrimaryEvent, PrimaryMessage, ToBackup, ToPrimary};
use romulus_transport::{
    CloseCode, Connection, Control, Endpoint, FrameError, FrameReader, PeerAddress, SendStream,
};
use romulus_types::{HostId, Session, Term, VmId, WitnessInstance};
use romulus_wire::{FrameType, HeldPagesFrame, WireError, decode_control, encode_control, encode_message};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::capture::Job;
use crate::encode::EncodeJob;
use crate::events::EventSink;
use crate::status::{RefusedInput, Status};
use crate::tries::Tries;

/// Control messages that wait to be sent, at most. Heartbeats are dropped past that: they would be stale.
const CONTROL_WAITING_MAX: usize = 64;
/// Frames of page data that wait to be sent, at most.
const DATA_WAITING_MAX: usize = 16;
/// How long a backup may take to answer a `Hello`, and for each further part of what it holds: it may have to make an
/// image first.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the last messages may take to get out at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// What every session is opened with.
pub struct LinkConfig {
    /// The VM.
    pub vm: VmId,
    /// This host.
    pub host: HostId,
    /// The backup's address.
    pub backup: PeerAddress,
    /// The backup's host, as the record will name it.
    pub backup_host: HostId,
    /// Length of an epoch in nanoseconds, for the backup's status.
    pub epoch_ns: u64,
    /// The capture thread, which describes the machine afresh: it may have changed since the last session.
    pub jobs: SyncSender<Job>,
}

struct Running {
    session: Session,
    control: mpsc::Sender<PrimaryMessage>,
    end: oneshot::Sender<()>,
    /// Closed when the session's task is over.
    over: oneshot::Receiver<()>,
}

/// The link's handle in the driver.
pub struct Link {
    config: Arc<LinkConfig>,
    endpoint: Arc<Endpoint>,
    encoder: SyncSender<EncodeJob>,
    events: EventSink,
    status: Arc<Status>,
    running: Option<Running>,
    tries: Arc<Tries>,
}

impl Link {
    /// No session yet.
    pub fn new(
        config: LinkConfig,
        endpoint: Arc<Endpoint>,
        encoder: SyncSender<EncodeJob>,
        events: EventSink,
        status: Arc<Status>,
    ) -> Self {
        Self {
            config: Arc::new(config),
            endpoint,
            encoder,
            events,
            status,
            running: None,
            tries: Arc::default(),
        }
    }

    /// Begins a session in a task of its own; how it goes comes as events.
    pub fn connect(&mut self, session: Session, term: Term, instance: WitnessInstance) {
        let (control, control_receiver) = mpsc::channel(CONTROL_WAITING_MAX);
        let (end, ended) = oneshot::channel();
        let task = SessionTask {
            config: Arc::clone(&self.config),
            endpoint: Arc::clone(&self.endpoint),
            encoder: self.encoder.clone(),
            events: self.events.clone(),
            status: Arc::clone(&self.status),
            session,
            described: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            tries: Arc::clone(&self.tries),
        };
        let (running, over) = oneshot::channel::<()>();
        self.endpoint.spawn(async move {
            task.run(term, instance, control_receiver, ended).await;
            drop(running);
        });
        self.running = Some(Running {
            session,
            control,
            end,
            over,
        });
    }

    /// Ends a session; its task says `Disconnected`.
    pub fn disconnect(&mut self, session: Session) {
        if self
            .running
            .as_ref()
            .is_some_and(|running| running.session == session)
        {
            let running = self.running.take().expect("it was there");
            let _ = running.end.send(());
        }
    }

    /// Sends a control message; a full queue drops it, which only heartbeats ever meet.
    pub fn send(&mut self, session: Session, message: PrimaryMessage) {
        if let Some(running) = self.running.as_ref().filter(|running| running.session == session)
            && running.control.try_send(message).is_err()
        {
            warn!("the control stream does not keep up; a message was dropped");
        }
    }

    /// Lets the last messages out, and ends the session.
    pub async fn close(&mut self) {
        if let Some(running) = self.running.take() {
            drop(running.control);
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, running.over).await;
        }
    }
}

/// A message of the backup that has no place where it came.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unexpected(&'static str);

struct SessionTask {
    config: Arc<LinkConfig>,
    endpoint: Arc<Endpoint>,
    encoder: SyncSender<EncodeJob>,
    events: EventSink,
    status: Arc<Status>,
    session: Session,
    /// The guest stood still for this session.
    described: AtomicBool,
    /// The backup accepted the session.
    connected: AtomicBool,
    tries: Arc<Tries>,
}

impl SessionTask {
    async fn run(
        self,
        term: Term,
        instance: WitnessInstance,
        control: mpsc::Receiver<PrimaryMessage>,
        ended: oneshot::Receiver<()>,
    ) {
        tokio::pin!(ended);
        let result = tokio::select! {
            result = self.session(term, instance, control) => result,
            _ = &mut ended => Ok(()),
        };
        if let Err(error) = result {
            self.count_if_refused(&error);
            warn!(event = "session_ended", error = format!("{error:#}"));
            self.status.set_detail(format!("{error:#}"));
            self.status
                .add_event("session_ended", &json!({"error": format!("{error:#}")}));
            if !self.connected.load(Ordering::Relaxed) {
                let wait = if self.described.load(Ordering::Relaxed) {
                    self.tries.refused()
                } else {
                    self.tries.unreached()
                };
                let _ = tokio::time::timeout(wait, ended).await;
            }
        }
        self.events
            .send_async(PrimaryEvent::Disconnected(self.session))
            .await;
    }

    async fn session(
        &self,
        term: Term,
        instance: WitnessInstance,
        control: mpsc::Receiver<PrimaryMessage>,
    ) -> anyhow::Result<()> {
        let mut connection = self.reach_backup().await?;
        // The guest is paused for its description: only for a backup that is there.
        let (machine, page_count) = self.describe().await?;
        self.described.store(true, Ordering::Relaxed);
        if connection.close_reason().is_some() {
            // A large guest takes its time, and a backup does not wait long for a hello.
            connection = self.reach_backup().await?;
        }
        let Control { mut sender, receiver } = connection.open_control().await?;
        let hello = Hello {
            vm: self.config.vm.clone(),
            primary: self.config.host.clone(),
            session: self.session,
            term,
            instance,
            epoch_ns: self.config.epoch_ns,
            machine,
        };
        sender
            .send(encode_message(FrameType::Hello, self.session, &hello)?)
            .await?;
        fault::point("replicator.after_hello");
        let mut reader = FrameReader::for_session(receiver, self.session);
        tokio::time::timeout(WELCOME_TIMEOUT, self.welcome(&mut reader))
            .await
            .context("the backup did not answer in time")??;
        let held = self.held_pages(&mut reader, page_count).await?;
        let data = connection.open_data().await?;
        let (sink, frames) = mpsc::channel(DATA_WAITING_MAX);
        self.begin_encoding(held, sink).await?;
        info!(event = "session", session = %self.session);
        self.connected.store(true, Ordering::Relaxed);
        self.status.count_session();
        self.tries.accepted();
        fault::point("replicator.connected");
        self.events
            .send_async(PrimaryEvent::Connected(self.session))
            .await;
        tokio::select! {
            result = self.read_control(&mut reader) => result,
            result = write_control(self.session, sender, control, &connection) => result,
            result = write_data(data, frames) => result,
        }
    }

    async fn reach_backup(&self) -> anyhow::Result<Connection> {
        let connected = self.endpoint.connect(&self.config.backup).await;
        connected.with_context(|| format!("the backup {} can't be reached", self.config.backup))
    }

    async fn describe(&self) -> anyhow::Result<(Vec<u8>, u64)> {
        let jobs = self.config.jobs.clone();
        tokio::task::spawn_blocking(move || {
            let (answer, described) = std::sync::mpsc::sync_channel(1);
            jobs.send(Job::Describe(answer))
                .context("the capture thread is gone")?;
            described.recv().context("the capture thread is gone")?
        })
        .await?
        .context("the machine could not be described")
    }

    /// The backup's list of the pages that it holds from an earlier session.
    async fn held_pages(&self, reader: &mut FrameReader, page_count: u64) -> anyhow::Result<HeldPages> {
        let mut held = HeldPages::new(self.session, page_count);
        loop {
            let frame = tokio::time::timeout(WELCOME_TIMEOUT, reader.next())
                .await
                .context("the backup did not say in time what it holds")??
                .context("the backup closed the stream")?;
            if frame.frame_type == FrameType::Control {
                // It changed its mind: the image could not be made, or the record says otherwise by now.
                match decode_control::<ToPrimary>(&frame)? {
                    ToPrimary::Refused { reason, .. } => bail!("the backup refused: {reason}"),
                    _ => bail!(Unexpected("the backup spoke before it had said what it holds")),
                }
            }
            let part = HeldPagesFrame::parse(&frame)?;
            if part.is_end() {
                return Ok(held);
            }
            for (page, hash) in part.entries() {
                held.note(page, hash)?;
            }
        }
    }

    async fn begin_encoding(&self, held: HeldPages, sink: mpsc::Sender<Bytes>) -> anyhow::Result<()> {
        let (encoder, session) = (self.encoder.clone(), self.session);
        tokio::task::spawn_blocking(move || {
            encoder
                .send(EncodeJob::Begin { session, held, sink })
                .context("the encoder is gone")
        })
        .await?
    }

    async fn welcome(&self, reader: &mut FrameReader) -> anyhow::Result<()> {
        let frame = reader.next().await?.context("the backup closed the stream")?;
        match decode_control::<ToPrimary>(&frame)? {
            ToPrimary::Welcome { backup } => {
                // The record names the backup; one that is named otherwise could never take over.
                ensure!(
                    backup == self.config.backup_host,
                    "the backup calls itself {backup}, not {}: say --backup-host {backup}",
                    self.config.backup_host
                );
                info!(backup = backup.as_str(), "the backup accepted the session");
                Ok(())
            }
            ToPrimary::Refused { reason, .. } => bail!("the backup refused: {reason}"),
            ToPrimary::Peer(_) => bail!(Unexpected("the backup spoke before it answered the hello")),
        }
    }

    async fn read_control(&self, reader: &mut FrameReader) -> anyhow::Result<()> {
        loop {
            let frame = reader.next().await?.context("the backup ended the session")?;
            match decode_control::<ToPrimary>(&frame)? {
                ToPrimary::Peer(message) => {
                    self.events
                        .send_async(PrimaryEvent::Peer(self.session, message))
                        .await;
                }
                ToPrimary::Refused { reason, .. } => bail!("the backup ended the session: {reason}"),
                ToPrimary::Welcome { .. } => bail!(Unexpected("the backup welcomed twice")),
            }
        }
    }

    /// What the backup sent may be what ended the session.
    fn count_if_refused(&self, error: &anyhow::Error) {
        let cause = if error.is::<Unexpected>() || error.is::<NoSuchPage>() {
            RefusedInput::Unexpected
        } else if error.is::<WireError>() || matches!(error.downcast_ref(), Some(FrameError::Wire(_))) {
            RefusedInput::Malformed
        } else {
            return;
        };
        self.status.count_refused_input(cause);
    }
}

async fn write_control(
    session: Session,
    mut stream: SendStream,
    mut messages: mpsc::Receiver<PrimaryMessage>,
    connection: &Connection,
) -> anyhow::Result<()> {
    while let Some(message) = messages.recv().await {
        stream
            .send(encode_control(session, &ToBackup::Peer(message))?)
            .await?;
    }
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, stream.finish_and_flush()).await;
    connection.close(CloseCode::DONE, "the replicator is done");
    Ok(())
}

async fn write_data(mut stream: SendStream, mut frames: mpsc::Receiver<Bytes>) -> anyhow::Result<()> {
    let mut batch = Vec::with_capacity(DATA_WAITING_MAX);
    while frames.recv_many(&mut batch, DATA_WAITING_MAX).await > 0 {
        stream.send_all(&mut batch).await?;
        fault::point("replicator.sent");
        batch.clear();
    }
    // The encoder dropped the session; what ends it comes from elsewhere.
    std::future::pending().await
}
