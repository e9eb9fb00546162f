//! The twin in memory: two [`Connection`]s joined by a cable that a test can cut. No sockets, no certificates.
//!
//! It keeps the contract of the real one: bounded windows, streams that are reset when dropped unfinished, a
//! close that both sides see, limits on open streams.

use std::sync::Arc;

use bytes::Bytes;
use romulus_config::Network;
use romulus_types::HostId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::code::CloseCode;
use crate::connection::{CHUNK_BYTES_MAX, Connection, closed};
use crate::error::{ClosedBy, TransportError};

/// Why the connection is gone, as each side sees it.
#[derive(Clone, Debug)]
enum End {
    Closed {
        by_first: bool,
        code: CloseCode,
        reason: String,
    },
    Cut,
}

/// Makes two connected ends; the first is that of `first` and sees `second` as its peer.
pub fn pair(first: &HostId, second: &HostId, network: &Network) -> (Connection, Connection, Cable) {
    let (end, _) = watch::channel(None);
    let end = Arc::new(end);
    let capacity = usize::from(network.data_streams_max);
    let (data_to_second, data_at_second) = mpsc::channel(capacity);
    let (data_to_first, data_at_first) = mpsc::channel(capacity);
    let (control_to_second, control_at_second) = mpsc::channel(1);
    let (control_to_first, control_at_first) = mpsc::channel(1);
    let side = |is_first, data, control, at| Side {
        is_first,
        end: end.clone(),
        window_bytes: network.receive_window.as_len() / (capacity + 2),
        data_slots: Arc::new(Semaphore::new(capacity)),
        data,
        control,
        arriving: tokio::sync::Mutex::new(at),
    };
    let arriving = |data, control| Arriving { data, control };
    let one = side(
        true,
        data_to_second,
        control_to_second,
        arriving(data_at_first, control_at_first),
    );
    let two = side(
        false,
        data_to_first,
        control_to_first,
        arriving(data_at_second, control_at_second),
    );
    let cable = Cable { end };
    (
        Connection::memory(one, second.clone()),
        Connection::memory(two, first.clone()),
        cable,
    )
}

/// What joins the two ends of a [`pair`].
#[derive(Clone, Debug)]
pub struct Cable {
    end: Arc<watch::Sender<Option<End>>>,
}

impl Cable {
    /// Both sides find the connection lost.
    pub fn cut(&self) {
        set_end(&self.end, End::Cut);
    }
}

/// The first reason stays.
fn set_end(end: &watch::Sender<Option<End>>, reason: End) {
    end.send_if_modified(|end| {
        let first = end.is_none();
        if first {
            *end = Some(reason);
        }
        first
    });
}

type Duplex = (PipeSender, PipeReceiver);

#[derive(Debug)]
struct Arriving {
    data: mpsc::Receiver<PipeReceiver>,
    control: mpsc::Receiver<Duplex>,
}

/// One end.
#[derive(Debug)]
pub(crate) struct Side {
    is_first: bool,
    end: Arc<watch::Sender<Option<End>>>,
    window_bytes: usize,
    data_slots: Arc<Semaphore>,
    data: mpsc::Sender<PipeReceiver>,
    control: mpsc::Sender<Duplex>,
    arriving: tokio::sync::Mutex<Arriving>,
}

impl Drop for Side {
    fn drop(&mut self) {
        self.close(CloseCode::DONE, "");
    }
}

impl Side {
    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        set_end(
            &self.end,
            End::Closed {
                by_first: self.is_first,
                code,
                reason: reason.to_owned(),
            },
        );
    }

    pub(crate) fn close_reason(&self) -> Option<TransportError> {
        self.end.borrow().as_ref().map(|end| seen(end, self.is_first))
    }

    pub(crate) async fn closed(&self) -> TransportError {
        wait_end(&self.end, self.is_first).await
    }

    pub(crate) async fn open_data(&self) -> Result<PipeSender, TransportError> {
        tokio::select! {
            biased;
            error = self.closed() => Err(error),
            slot = self.data_slots.clone().acquire_owned() => {
                let slot = slot.expect("the semaphore is never closed");
                let (sender, receiver) = self.pipe(Some(slot));
                self.data.send(receiver).await.map_err(|_| TransportError::StreamReset)?;
                Ok(sender)
            }
        }
    }

    pub(crate) async fn open_control(&self) -> Result<Duplex, TransportError> {
        let (our_sender, their_receiver) = self.pipe(None);
        let (their_sender, our_receiver) = self.pipe_towards_us();
        tokio::select! {
            biased;
            error = self.closed() => Err(error),
            sent = self.control.send((their_sender, their_receiver)) => {
                sent.map_err(|_| TransportError::StreamReset)?;
                Ok((our_sender, our_receiver))
            }
        }
    }

    pub(crate) async fn accept_data(&self) -> Result<PipeReceiver, TransportError> {
        let next = async { self.arriving.lock().await.data.recv().await };
        tokio::select! {
            biased;
            error = self.closed() => Err(error),
            stream = next => stream.ok_or(TransportError::StreamReset),
        }
    }

    pub(crate) async fn accept_control(&self) -> Result<Duplex, TransportError> {
        let next = async { self.arriving.lock().await.control.recv().await };
        tokio::select! {
            biased;
            error = self.closed() => Err(error),
            stream = next => stream.ok_or(TransportError::StreamReset),
        }
    }

    fn pipe(&self, slot: Option<OwnedSemaphorePermit>) -> Duplex {
        pipe(self.window_bytes, &self.end, self.is_first, slot)
    }

    fn pipe_towards_us(&self) -> Duplex {
        pipe(self.window_bytes, &self.end, !self.is_first, None)
    }
}

fn seen(end: &End, is_first: bool) -> TransportError {
    match end {
        End::Cut => TransportError::Lost("the cable was cut".into()),
        End::Closed {
            by_first,
            code,
            reason,
        } => {
            let by = if *by_first == is_first {
                ClosedBy::Us
            } else {
                ClosedBy::Peer
            };
            closed(by, *code, reason)
        }
    }
}

async fn wait_end(end: &watch::Sender<Option<End>>, is_first: bool) -> TransportError {
    let mut ends = end.subscribe();
    let found = ends
        .wait_for(Option::is_some)
        .await
        .expect("the sender is borrowed");
    seen(found.as_ref().expect("waited for"), is_first)
}

enum Piece {
    Bytes(Bytes),
    Finished,
}

fn pipe(
    window_bytes: usize,
    end: &Arc<watch::Sender<Option<End>>>,
    sender_is_first: bool,
    slot: Option<OwnedSemaphorePermit>,
) -> Duplex {
    let (pieces, arriving) = mpsc::unbounded_channel();
    let credit = Arc::new(Semaphore::new(window_bytes));
    let piece_max = window_bytes.clamp(1, CHUNK_BYTES_MAX);
    let sender = PipeSender {
        pieces,
        credit: credit.clone(),
        piece_max,
        end: end.clone(),
        is_first: sender_is_first,
        _slot: slot,
    };
    let receiver = PipeReceiver {
        arriving,
        credit,
        end: end.clone(),
        is_first: !sender_is_first,
        finished: false,
    };
    (sender, receiver)
}

/// The sending end of a stream in memory. Dropped before `finish`, it resets the stream.
pub(crate) struct PipeSender {
    pieces: mpsc::UnboundedSender<Piece>,
    credit: Arc<Semaphore>,
    piece_max: usize,
    end: Arc<watch::Sender<Option<End>>>,
    is_first: bool,
    _slot: Option<OwnedSemaphorePermit>,
}

impl PipeSender {
    pub(crate) async fn send(&mut self, mut bytes: Bytes) -> Result<(), TransportError> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(self.piece_max));
            let wanted = u32::try_from(piece.len()).expect("a piece is at most CHUNK_BYTES_MAX");
            tokio::select! {
                biased;
                error = wait_end(&self.end, self.is_first) => return Err(error),
                () = self.pieces.closed() => return Err(TransportError::StreamReset),
                credit = self.credit.acquire_many(wanted) => {
                    credit.expect("the semaphore is never closed").forget();
                    self.pieces.send(Piece::Bytes(piece)).map_err(|_| TransportError::StreamReset)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn finish(&mut self) {
        // A receiver that is gone needs no end.
        let _ = self.pieces.send(Piece::Finished);
    }
}

/// The receiving end of a stream in memory.
pub(crate) struct PipeReceiver {
    arriving: mpsc::UnboundedReceiver<Piece>,
    credit: Arc<Semaphore>,
    end: Arc<watch::Sender<Option<End>>>,
    is_first: bool,
    finished: bool,
}

impl PipeReceiver {
    pub(crate) async fn recv(&mut self) -> Result<Option<Bytes>, TransportError> {
        if self.finished {
            return Ok(None);
        }
        tokio::select! {
            biased;
            error = wait_end(&self.end, self.is_first) => Err(error),
            piece = self.arriving.recv() => match piece {
                Some(Piece::Bytes(bytes)) => {
                    self.credit.add_permits(bytes.len());
                    Ok(Some(bytes))
                }
                Some(Piece::Finished) => {
                    self.finished = true;
                    Ok(None)
                }
                None => Err(TransportError::StreamReset),
            }
        }
    }
}

impl std::fmt::Debug for PipeSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PipeSender").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for PipeReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PipeReceiver").finish_non_exhaustive()
    }
}
