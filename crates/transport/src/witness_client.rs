//! Asks the witness, over a connection that is kept ready.
//!
//! A background task keeps the connection up, so that the one request that matters (the peer is lost) does not
//! wait for a handshake. Each request travels on a stream of its own:
//!
//! ```text
//!   host ── WitnessRequest frame, end ──► witness
//!   host ◄── WitnessReply frame, end ──── witness         both frames carry the request's nonce as session
//! ```
//!
//! A try that gets no answer is repeated, unchanged, on a new connection, until the deadline; the nonce makes
//! repeating safe.

use std::sync::{Arc, Weak};
use std::time::Duration;

use romulus_config::PeerAddress;
use romulus_protocol::{WitnessReply, WitnessRequest};
use romulus_types::Session;
use romulus_wire::{FrameType, WireError, decode_message, encode_message};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, info, warn};

use crate::code::CloseCode;
use crate::connection::Connection;
use crate::endpoint::Endpoint;
use crate::error::TransportError;
use crate::frames::{FrameError, FrameReader};

/// How long a request may take with all its tries.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long one try may take before another connection is tried. A witness answers after an fsync.
const TRY: Duration = Duration::from_millis(500);
/// Rest after a failed connection attempt.
const REST: Duration = Duration::from_millis(200);

/// No answer from the witness before the deadline. The request may have been granted all the same.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the witness did not answer within {} ms: {cause}", deadline.as_millis())]
pub struct WitnessUnreachable {
    /// The deadline.
    pub deadline: Duration,
    /// What happened last.
    #[source]
    pub cause: WitnessFailure,
}

/// Why a try failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WitnessFailure {
    /// There is no connection.
    #[error("no connection: {0}")]
    Connect(#[source] TransportError),
    /// There is no connection yet.
    #[error("no connection yet")]
    Connecting,
    /// Settings name no witness.
    #[error("no witness is set: set `witness`")]
    NoWitness,
    /// The connection is there, but no answer comes.
    #[error("no answer came")]
    Silent,
    /// The connection broke.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The answer is no answer.
    #[error("the witness sent something wrong: {0}")]
    Wire(#[from] WireError),
    /// The stream ended without an answer.
    #[error("the witness ended the stream without an answer")]
    Ended,
    /// The answer is to another request.
    #[error("the witness answered another request")]
    OtherRequest,
}

/// Asks the witness. Clones share one connection, which lasts as long as the last of them.
#[derive(Debug, Clone)]
pub struct WitnessClient {
    shared: Arc<Shared>,
    deadline: Duration,
    attempt: Duration,
}

#[derive(Debug)]
struct Shared {
    endpoint: Arc<Endpoint>,
    addresses: Vec<PeerAddress>,
    link: watch::Sender<Link>,
}

#[derive(Debug, Clone)]
enum Link {
    /// The connection, and how many there were before it.
    Up(Connection, u64),
    Down(WitnessFailure),
}

impl WitnessClient {
    /// For the witness at `addresses`, which are tried in order; `endpoint` is one for [`crate::Service::Witness`].
    /// Begins to connect. Must be called within a tokio runtime.
    pub fn new(endpoint: Arc<Endpoint>, addresses: Vec<PeerAddress>) -> Self {
        let none = if addresses.is_empty() {
            WitnessFailure::NoWitness
        } else {
            WitnessFailure::Connecting
        };
        let (link, _) = watch::channel(Link::Down(none));
        let shared = Arc::new(Shared {
            endpoint,
            addresses,
            link,
        });
        if !shared.addresses.is_empty() {
            tokio::spawn(keep_connected(Arc::downgrade(&shared)));
        }
        Self {
            shared,
            deadline: DEADLINE,
            attempt: TRY,
        }
    }

    /// Sets how long a request may take, and each of its tries.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration, attempt: Duration) -> Self {
        Self {
            deadline,
            attempt,
            ..self
        }
    }

    /// The connection to the witness stands, as far as is known.
    pub fn is_connected(&self) -> bool {
        matches!(&*self.shared.link.borrow(), Link::Up(connection, _) if connection.close_reason().is_none())
    }

    /// Asks, and repeats the request until an answer comes or the deadline has passed.
    ///
    /// # Errors
    /// [`WitnessUnreachable`]. It does not mean that nothing was granted: repeat the same request.
    pub async fn ask(&self, request: WitnessRequest) -> Result<WitnessReply, WitnessUnreachable> {
        let end = Instant::now() + self.deadline;
        let mut link = self.shared.link.subscribe();
        let mut tried = None;
        let mut cause = WitnessFailure::Connecting;
        loop {
            let usable = |link: &Link| matches!(link, Link::Up(_, number) if Some(*number) != tried);
            let found = timeout_at(end, link.wait_for(usable)).await;
            let Ok(Ok(Link::Up(connection, number))) = found.map(|link| link.map(|link| link.clone())) else {
                if let Link::Down(down) = &*self.shared.link.borrow() {
                    cause = down.clone();
                }
                return Err(WitnessUnreachable {
                    deadline: self.deadline,
                    cause,
                });
            };
            let until = end.min(Instant::now() + self.attempt);
            match timeout_at(until, ask_once(&connection, &request)).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(error)) => cause = error,
                Err(_) => cause = WitnessFailure::Silent,
            }
            debug!(error = %cause, "a request to the witness failed, trying another connection");
            tried = Some(number);
            // Ends it for other requests as well, which then use the next one.
            connection.close(CloseCode::FAULT, "no answer");
        }
    }
}

async fn ask_once(connection: &Connection, request: &WitnessRequest) -> Result<WitnessReply, WitnessFailure> {
    let session = Session(request.nonce.0);
    let mut control = connection.open_control().await?;
    control
        .sender
        .send(encode_message(FrameType::WitnessRequest, session, request)?)
        .await?;
    control.sender.finish();
    let mut reader = FrameReader::for_session(control.receiver, session);
    let frame = match reader.next().await {
        Ok(Some(frame)) => frame,
        Ok(None) | Err(FrameError::Cut(_)) => return Err(WitnessFailure::Ended),
        Err(FrameError::Transport(error)) => return Err(error.into()),
        Err(FrameError::Wire(error)) => return Err(error.into()),
    };
    let reply: WitnessReply = decode_message(FrameType::WitnessReply, &frame)?;
    if reply.nonce != request.nonce || reply.vm != request.vm {
        return Err(WitnessFailure::OtherRequest);
    }
    Ok(reply)
}

/// Connects, waits until the connection is gone, connects again; ends with the last client.
async fn keep_connected(shared: Weak<Shared>) {
    let mut count = 0;
    while let Some(strong) = shared.upgrade() {
        let connection = match connect(&strong).await {
            Ok(connection) => connection,
            Err(error) => {
                let known = matches!(&*strong.link.borrow(), Link::Down(WitnessFailure::Connect(_)));
                if !known {
                    warn!(event = "witness_unreachable", %error, "no connection to the witness");
                }
                strong
                    .link
                    .send_replace(Link::Down(WitnessFailure::Connect(error)));
                drop(strong);
                sleep(REST).await;
                continue;
            }
        };
        info!(event = "witness_connected", witness = %connection.peer());
        strong.link.send_replace(Link::Up(connection.clone(), count));
        let mut clients = strong.link.subscribe();
        drop(strong);
        count += 1;
        let error = tokio::select! {
            error = connection.closed() => error,
            // The last client is gone: so is the sender of its news.
            () = async { while clients.changed().await.is_ok() {} } => break,
        };
        if let Some(strong) = shared.upgrade() {
            debug!(%error, "the connection to the witness ended");
            strong
                .link
                .send_replace(Link::Down(WitnessFailure::Connect(error)));
        }
    }
}

/// Each address in turn, the later ones without waiting out the whole handshake timeout of a silent one.
async fn connect(shared: &Shared) -> Result<Connection, TransportError> {
    let mut last = TransportError::EndpointClosed;
    for address in &shared.addresses {
        match timeout(DEADLINE / 2, shared.endpoint.connect(address)).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => last = error,
            Err(_) => {
                last = TransportError::NoAnswer {
                    peer: address.to_string(),
                }
            }
        }
    }
    Err(last)
}
