//! The encoder thread: turns captured pages into frames, off the guest's pause, and gives them to the session's sender.
//!
//! What it knows of the backup's image is in its [`SessionEncoder`]. A new session starts that afresh, from what the
//! backup says that it holds.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use net_buffer::LearntAddress;
use romulus_host_sys::priority;
use romulus_hypervisor::fault;
use romulus_hypervisor::source::Checkpoint;
use romulus_page_codec::{HeldPages, Kind, Page, SessionEncoder};
use romulus_protocol::PrimaryEvent;
use romulus_types::{Epoch, PAGE_BYTES, PageIndex, Session, Time};
use romulus_wire::{
    CommitRecord, PagesFrame, PagesSection, PagesWriter, WireError, device_state_frames,
    device_state_section, pack_guest_state,
};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::{debug, error, info};

use crate::buffers::BufferReturn;
use crate::events::EventSink;
use crate::status::Status;

/// Bytes of one frame of pages: small enough that a commit never waits long behind one.
const FRAME_BYTES: usize = 128 << 10;
/// The epoch that frames of the first copy carry: they belong to no checkpoint.
pub const FIRST_COPY_EPOCH: Epoch = Epoch::NONE;

/// What the encoder is asked to do, in order.
pub enum EncodeJob {
    /// A session begins; its frames go to `sink`.
    Begin {
        /// The session.
        session: Session,
        /// What the backup has of the guest's pages.
        held: HeldPages,
        /// Where frames go; bounded, so that a slow link holds the encoder and not memory.
        sink: mpsc::Sender<Bytes>,
    },
    /// Consecutive pages of the first copy.
    FirstCopy {
        /// The session.
        session: Session,
        /// The first of them.
        first: PageIndex,
        /// Their contents.
        data: Vec<u8>,
    },
    /// Pages that changed during the first copy.
    Precopy {
        /// The session.
        session: Session,
        /// The pages.
        buffer: Checkpoint,
    },
    /// The first copy is complete.
    FirstCopyDone {
        /// The session.
        session: Session,
    },
    /// One checkpoint.
    Checkpoint {
        /// The session.
        session: Session,
        /// Its epoch.
        epoch: Epoch,
        /// Pages and device state.
        buffer: Checkpoint,
        /// Addresses that the guest was heard to use.
        learnt: Vec<LearntAddress>,
        /// When the guest was captured.
        captured: Time,
    },
}

/// The state of one session.
struct Sending {
    session: Session,
    sink: mpsc::Sender<Bytes>,
    /// Pages of the first copy that were sent.
    first_copy_sent: u64,
    /// What that took on the wire.
    first_copy_bytes: u64,
    /// Pages that the backup held when the session began.
    held: u64,
}

/// The session's connection is gone; what is encoded for it has no receiver.
struct Gone;

/// The encoder thread's state.
pub struct Encoder {
    sending: Option<Sending>,
    pages: SessionEncoder,
    buffers: BufferReturn,
    events: EventSink,
    status: Arc<Status>,
}

/// What one pass over pages produced.
#[derive(Default)]
struct Tally {
    section: PagesSection,
    wire_bytes: u64,
    page_bytes: u64,
    kinds: [u64; 8],
}

impl Encoder {
    /// An encoder that keeps at most `delta_bytes_max` bytes of previous versions.
    pub fn new(delta_bytes_max: u64, buffers: BufferReturn, events: EventSink, status: Arc<Status>) -> Self {
        Self {
            sending: None,
            pages: SessionEncoder::new(HeldPages::new(Session(0), 0), delta_bytes_max),
            buffers,
            events,
            status,
        }
    }

    /// Works until every sender of jobs is gone.
    pub fn run(mut self, jobs: &Receiver<EncodeJob>) {
        priority::lower();
        while let Ok(job) = jobs.recv() {
            self.job(job);
        }
    }

    fn job(&mut self, job: EncodeJob) {
        match job {
            EncodeJob::Begin { session, held, sink } => self.begin(session, held, sink),
            EncodeJob::FirstCopy { session, first, data } => {
                let (pages, _) = data.as_chunks::<PAGE_BYTES>();
                let pages = (first.0..).map(PageIndex).zip(pages);
                self.first_copy(session, pages);
            }
            EncodeJob::Precopy { session, buffer } => {
                self.first_copy(session, buffer.page_contents());
                self.buffers.give(buffer);
            }
            EncodeJob::FirstCopyDone { session } => self.first_copy_done(session),
            EncodeJob::Checkpoint {
                session,
                epoch,
                buffer,
                learnt,
                captured,
            } => {
                self.checkpoint(session, epoch, &buffer, &learnt, captured);
                self.buffers.give(buffer);
            }
        }
    }

    fn is_current(&self, session: Session) -> bool {
        self.sending
            .as_ref()
            .is_some_and(|sending| sending.session == session)
    }

    fn begin(&mut self, session: Session, held: HeldPages, sink: mpsc::Sender<Bytes>) {
        self.sending = Some(Sending {
            session,
            sink,
            first_copy_sent: 0,
            first_copy_bytes: 0,
            held: held.left(),
        });
        self.pages.begin(held);
    }

    fn first_copy<'p>(&mut self, session: Session, pages: impl Iterator<Item = (PageIndex, &'p Page)>) {
        if let Some(tally) = self.send_pages(session, FIRST_COPY_EPOCH, pages) {
            self.status.add_first_copy(tally.wire_bytes);
        }
    }

    fn first_copy_done(&mut self, session: Session) {
        let Some(sending) = self.sending.as_ref().filter(|sending| sending.session == session) else {
            return;
        };
        assert_eq!(
            self.pages.held_left(),
            0,
            "the first copy goes over every page, or the backup keeps an old one"
        );
        let (sent_pages, held_pages) = (sending.first_copy_sent, sending.held);
        let sent_bytes = sending.first_copy_bytes;
        fault::point("replicator.first_copy_sent");
        info!(event = "first_copy_sent", sent_pages, sent_bytes, held_pages);
        self.status.add_event(
            "first_copy_sent",
            &json!({"sent_pages": sent_pages, "sent_bytes": sent_bytes, "held_pages": held_pages}),
        );
        self.events.send(PrimaryEvent::FirstCopyDone(session));
    }

    fn checkpoint(
        &mut self,
        session: Session,
        epoch: Epoch,
        buffer: &Checkpoint,
        learnt: &[LearntAddress],
        captured: Time,
    ) {
        let Some(tally) = self.send_pages(session, epoch, buffer.page_contents()) else {
            return;
        };
        fault::point("replicator.encoded");
        let notes = serde_json::to_vec(learnt).expect("addresses are plain values");
        let state = pack_guest_state(&notes, &buffer.device_state);
        match self.send_commit(session, epoch, &state, captured, tally.section) {
            Ok(Ok(())) => fault::point("replicator.commit_queued"),
            Ok(Err(Gone)) => self.sending = None,
            Err(error) => {
                // The checkpoint can't be sent, so the session can't go on; nothing was released for it.
                error!(%error, epoch = epoch.0, "a checkpoint could not be encoded");
                self.sending = None;
                self.events.send(PrimaryEvent::CaptureFailed(session, epoch));
            }
        }
        self.status.add_encoded(
            tally.page_bytes,
            tally.wire_bytes + state.len() as u64,
            tally.kinds,
        );
        self.status.set_encoder_bytes(self.pages.memory_bytes() as u64);
    }

    fn send_commit(
        &self,
        session: Session,
        epoch: Epoch,
        state: &[u8],
        captured: Time,
        pages: PagesSection,
    ) -> Result<Result<(), Gone>, WireError> {
        let Some(sending) = self.sending.as_ref() else {
            return Ok(Err(Gone));
        };
        // The last part of a small state and the record go as one: each piece wakes the sender, and may leave as a packet of its own.
        let mut last = Bytes::new();
        for frame in device_state_frames(session, epoch, state)? {
            let full = std::mem::replace(&mut last, frame);
            if !full.is_empty() && sending.sink.blocking_send(full).is_err() {
                return Ok(Err(Gone));
            }
        }
        let record = CommitRecord {
            session,
            epoch,
            captured_ns: captured.ns,
            image_digest: self.pages.image_digest(),
            pages,
            device_state: device_state_section(state),
        };
        let end = [last, record.frame()].concat().into();
        Ok(sending.sink.blocking_send(end).map_err(|_| Gone))
    }

    /// Encodes pages, in ascending order, and sends them. `None` when the session is not current or its connection
    /// is gone.
    fn send_pages<'p>(
        &mut self,
        session: Session,
        epoch: Epoch,
        pages: impl Iterator<Item = (PageIndex, &'p Page)>,
    ) -> Option<Tally> {
        if !self.is_current(session) {
            return None;
        }
        let first_copy = epoch == FIRST_COPY_EPOCH;
        let mut tally = Tally::default();
        let mut writer = PagesWriter::new(session, epoch, FRAME_BYTES);
        for (index, page) in pages {
            let Some((kind, payload)) = self.pages.encode(index, page) else {
                tally.kinds[usize::from(Kind::Same.number())] += 1;
                continue;
            };
            tally.page_bytes += PAGE_BYTES as u64;
            tally.kinds[usize::from(kind as u8) % tally.kinds.len()] += 1;
            if writer.push(index, kind as u8, payload) {
                continue;
            }
            let full = std::mem::replace(&mut writer, PagesWriter::new(session, epoch, FRAME_BYTES));
            assert!(
                writer.push(index, kind as u8, payload),
                "an empty frame takes any page"
            );
            self.send_frame(full.finish(), &mut tally).ok()?;
        }
        self.send_frame(writer.finish(), &mut tally).ok()?;
        if let Some(sending) = self.sending.as_mut().filter(|_| first_copy) {
            sending.first_copy_sent += tally.section.pages;
            sending.first_copy_bytes += tally.wire_bytes;
        }
        Some(tally)
    }

    fn send_frame(&mut self, frame: Option<PagesFrame>, tally: &mut Tally) -> Result<(), Gone> {
        let Some(frame) = frame else { return Ok(()) };
        tally.section.add(frame.section);
        tally.wire_bytes += frame.frame.len() as u64;
        let sending = self.sending.as_ref().expect("checked by the caller");
        if sending.sink.blocking_send(frame.frame).is_err() {
            debug!("the session's connection is gone");
            self.sending = None;
            return Err(Gone);
        }
        Ok(())
    }
}
