//! One connection to a peer whose certificate was verified: a control stream and streams of page data.
//!
//! The same type stands for a QUIC connection and for its twin in memory ([`crate::memory`]).
//!
//! ```text
//!   control  <====================>  both ways, first in line for every packet
//!   data     ---------------------->  one way; bounded apart from control, so that unread
//!   data     ---------------------->  pages never hold an ack or a heartbeat back
//! ```
//!
//! Invariant: a stream that was not [finished](SendStream::finish) is *reset* when it is dropped, so that a
//! sender that dies half-way is never taken for one that had said everything.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use romulus_types::HostId;

use crate::accept::Slot;
use crate::bulk::Load;
use crate::code::{CloseCode, shorten};
use crate::endpoint;
use crate::error::{ClosedBy, TransportError};
use crate::failure;
use crate::memory::{self, PipeReceiver, PipeSender};

/// Most bytes that one [`RecvStream::recv`] returns.
pub const CHUNK_BYTES_MAX: usize = 64 << 10;

/// Control before data: quinn sends streams of higher priority first.
const CONTROL_PRIORITY: i32 = 100;
const DATA_PRIORITY: i32 = 0;
/// The error code of a stream that was dropped before its end.
const RESET_CODE: u32 = 1;

/// A connection. Clones stand for the same one; it closes when the last clone and stream are gone.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: Kind,
    peer: HostId,
    /// The place among a server's connections, given back when this one is gone.
    _slot: Option<Slot>,
    /// Where its tasks are; none: where they are spawned.
    load: Option<Arc<Load>>,
}

#[derive(Debug)]
enum Kind {
    Quic(quinn::Connection),
    Memory(memory::Side),
}

/// A two-way stream.
#[derive(Debug)]
pub struct Control {
    /// Towards the peer.
    pub sender: SendStream,
    /// From the peer.
    pub receiver: RecvStream,
}

/// Counters of a connection. All zero for one in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionStats {
    /// Smoothed round trip in nanoseconds.
    pub rtt_ns: u64,
    /// UDP payload bytes sent.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Packets that had to be declared lost.
    pub lost_packets: u64,
    /// Bytes in them.
    pub lost_bytes: u64,
    /// Times that the congestion window was cut.
    pub congestion_events: u64,
    /// The congestion window in bytes.
    pub window_bytes: u64,
    /// UDP payload bytes of a full packet.
    pub mtu_bytes: u16,
}

impl Connection {
    pub(crate) fn quic(
        connection: quinn::Connection,
        peer: HostId,
        slot: Option<Slot>,
        load: Option<Arc<Load>>,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                kind: Kind::Quic(connection),
                peer,
                _slot: slot,
                load,
            }),
        }
    }

    pub(crate) fn memory(side: memory::Side, peer: HostId) -> Self {
        Self {
            inner: Arc::new(Inner {
                kind: Kind::Memory(side),
                peer,
                _slot: None,
                load: None,
            }),
        }
    }

    /// The peer's name, as its certificate has it.
    pub fn peer(&self) -> &HostId {
        &self.inner.peer
    }

    /// The peer's address; none in memory.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        match &self.inner.kind {
            Kind::Quic(connection) => Some(connection.remote_address()),
            Kind::Memory(_) => None,
        }
    }

    /// Runs a task that uses this connection, on the thread that the connection is on, which may change.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        endpoint::spawn(self.inner.load.as_ref(), task);
    }

    /// Opens a two-way stream. The peer learns of it with the first bytes sent.
    ///
    /// # Errors
    /// The connection is gone. Waits while the peer's limit of streams is reached.
    pub async fn open_control(&self) -> Result<Control, TransportError> {
        match &self.inner.kind {
            Kind::Quic(connection) => {
                let (sender, receiver) = connection.open_bi().await.map_err(failure::of_connection)?;
                Ok(self.control(sender, receiver))
            }
            Kind::Memory(side) => Ok(self.memory_control(side.open_control().await?)),
        }
    }

    /// Waits for a two-way stream that the peer opened. Cancel safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn accept_control(&self) -> Result<Control, TransportError> {
        match &self.inner.kind {
            Kind::Quic(connection) => {
                let (sender, receiver) = connection.accept_bi().await.map_err(failure::of_connection)?;
                Ok(self.control(sender, receiver))
            }
            Kind::Memory(side) => Ok(self.memory_control(side.accept_control().await?)),
        }
    }

    /// Opens a one-way stream for page data. The peer learns of it with the first bytes sent.
    ///
    /// # Errors
    /// The connection is gone. Waits while the peer's limit of streams is reached.
    pub async fn open_data(&self) -> Result<SendStream, TransportError> {
        let kind = match &self.inner.kind {
            Kind::Quic(connection) => {
                let stream = connection.open_uni().await.map_err(failure::of_connection)?;
                Sending::quic(stream, DATA_PRIORITY)
            }
            Kind::Memory(side) => Sending::Memory(side.open_data().await?),
        };
        Ok(SendStream {
            kind,
            _connection: self.clone(),
        })
    }

    /// Waits for a one-way stream that the peer opened. Cancel safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn accept_data(&self) -> Result<RecvStream, TransportError> {
        let kind = match &self.inner.kind {
            Kind::Quic(connection) => {
                Receiving::Quic(connection.accept_uni().await.map_err(failure::of_connection)?)
            }
            Kind::Memory(side) => Receiving::Memory(side.accept_data().await?),
        };
        Ok(RecvStream {
            kind,
            _connection: self.clone(),
        })
    }

    /// Closes the connection at once; what was sent and not yet acknowledged may be lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        let reason = shorten(reason);
        match &self.inner.kind {
            Kind::Quic(connection) => connection.close(code.number().into(), reason.as_bytes()),
            Kind::Memory(side) => side.close(code, reason),
        }
    }

    /// Waits until the connection is gone and says why.
    pub async fn closed(&self) -> TransportError {
        match &self.inner.kind {
            Kind::Quic(connection) => failure::of_connection(connection.closed().await),
            Kind::Memory(side) => side.closed().await,
        }
    }

    /// Why the connection is gone, or `None` while it is not known to be.
    pub fn close_reason(&self) -> Option<TransportError> {
        match &self.inner.kind {
            Kind::Quic(connection) => connection.close_reason().map(failure::of_connection),
            Kind::Memory(side) => side.close_reason(),
        }
    }

    /// Counters so far.
    pub fn stats(&self) -> ConnectionStats {
        let Kind::Quic(connection) = &self.inner.kind else {
            return ConnectionStats::default();
        };
        let stats = connection.stats();
        ConnectionStats {
            rtt_ns: u64::try_from(stats.path.rtt.as_nanos()).unwrap_or(u64::MAX),
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            congestion_events: stats.path.congestion_events,
            window_bytes: stats.path.cwnd,
            mtu_bytes: stats.path.current_mtu,
        }
    }

    fn control(&self, sender: quinn::SendStream, receiver: quinn::RecvStream) -> Control {
        Control {
            sender: SendStream {
                kind: Sending::quic(sender, CONTROL_PRIORITY),
                _connection: self.clone(),
            },
            receiver: RecvStream {
                kind: Receiving::Quic(receiver),
                _connection: self.clone(),
            },
        }
    }

    fn memory_control(&self, (sender, receiver): (PipeSender, PipeReceiver)) -> Control {
        Control {
            sender: SendStream {
                kind: Sending::Memory(sender),
                _connection: self.clone(),
            },
            receiver: RecvStream {
                kind: Receiving::Memory(receiver),
                _connection: self.clone(),
            },
        }
    }
}

/// The sending end of a stream.
#[derive(Debug)]
pub struct SendStream {
    kind: Sending,
    _connection: Connection,
}

#[derive(Debug)]
enum Sending {
    Quic {
        stream: quinn::SendStream,
        finished: bool,
    },
    Memory(PipeSender),
}

impl Sending {
    fn quic(stream: quinn::SendStream, priority: i32) -> Self {
        // Fails only for a stream that is closed already, which the next send reports.
        let _ = stream.set_priority(priority);
        Self::Quic {
            stream,
            finished: false,
        }
    }
}

impl SendStream {
    /// Hands `bytes` over for sending; waits while the peer has no room. Not cancel safe: after a cancelled
    /// call it is not known how much of `bytes` was taken.
    ///
    /// # Errors
    /// The connection is gone or the peer wants no more of this stream.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        match &mut self.kind {
            Sending::Quic { stream, .. } => stream.write_chunk(bytes).await.map_err(failure::of_write),
            Sending::Memory(pipe) => pipe.send(bytes).await,
        }
    }

    /// As [`SendStream::send`] for several pieces, in order.
    ///
    /// # Errors
    /// As [`SendStream::send`].
    pub async fn send_all(&mut self, pieces: &mut [Bytes]) -> Result<(), TransportError> {
        match &mut self.kind {
            Sending::Quic { stream, .. } => stream.write_all_chunks(pieces).await.map_err(failure::of_write),
            Sending::Memory(pipe) => {
                for piece in pieces {
                    pipe.send(std::mem::take(piece)).await?;
                }
                Ok(())
            }
        }
    }

    /// Says that nothing more comes. What was sent is still delivered.
    pub fn finish(mut self) {
        match &mut self.kind {
            Sending::Quic { stream, finished } => {
                // Fails only when the stream is closed already.
                let _ = stream.finish();
                *finished = true;
            }
            Sending::Memory(pipe) => pipe.finish(),
        }
    }

    /// As [`SendStream::finish`], and waits until the peer's transport has everything.
    ///
    /// # Errors
    /// The connection is gone or the peer wants no more of this stream.
    pub async fn finish_and_flush(mut self) -> Result<(), TransportError> {
        match &mut self.kind {
            Sending::Quic { stream, finished } => {
                let _ = stream.finish();
                *finished = true;
                match stream.stopped().await {
                    Ok(None) => Ok(()),
                    Ok(Some(_)) => Err(TransportError::StreamReset),
                    Err(error) => Err(failure::of_stopped(error)),
                }
            }
            Sending::Memory(pipe) => {
                pipe.finish();
                Ok(())
            }
        }
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        if let Sending::Quic {
            stream,
            finished: false,
        } = &mut self.kind
        {
            // quinn would finish it, and a half-sent stream would look whole.
            let _ = stream.reset(RESET_CODE.into());
        }
    }
}

/// The receiving end of a stream.
#[derive(Debug)]
pub struct RecvStream {
    kind: Receiving,
    _connection: Connection,
}

#[derive(Debug)]
enum Receiving {
    Quic(quinn::RecvStream),
    Memory(PipeReceiver),
}

impl RecvStream {
    /// The next bytes, in order and at most [`CHUNK_BYTES_MAX`]; `None` after the end. Cancel safe.
    ///
    /// # Errors
    /// The connection is gone, or the stream was reset by the peer.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, TransportError> {
        match &mut self.kind {
            Receiving::Quic(stream) => {
                let chunk = stream
                    .read_chunk(CHUNK_BYTES_MAX, true)
                    .await
                    .map_err(failure::of_read)?;
                Ok(chunk.map(|chunk| chunk.bytes))
            }
            Receiving::Memory(pipe) => pipe.recv().await,
        }
    }

    /// Everything up to the end, if it is at most `max` bytes.
    ///
    /// # Errors
    /// As [`RecvStream::recv`], and [`TransportError::TooLarge`].
    pub async fn recv_to_end(&mut self, max: usize) -> Result<Vec<u8>, TransportError> {
        let mut all = Vec::new();
        while let Some(chunk) = self.recv().await? {
            if chunk.len() > max - all.len() {
                return Err(TransportError::TooLarge { max });
            }
            all.extend_from_slice(&chunk);
        }
        Ok(all)
    }
}

/// The error for a connection that was closed on purpose.
pub(crate) fn closed(by: ClosedBy, code: CloseCode, reason: &str) -> TransportError {
    TransportError::Closed {
        by,
        code,
        reason: shorten(reason).to_owned(),
    }
}
