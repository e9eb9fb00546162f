//! The encoder thread: turns captured pages into frames, off the guest's pause, and gives them to the session's sender.
//!
//! It keeps the three things that an incremental checkpoint needs on the primary: previous versions of pages for
//! deltas (bounded), the digest of each page (16 bytes a page), and the digest of the whole image. A new session starts
//! all three afresh: nothing is assumed about what a backup holds.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use net_buffer::LearntAddress;
use romulus_host_sys::priority;
use romulus_hypervisor::source::Checkpoint;
use romulus_page_codec::{ImageDigest, Kind, PreviousPages, Scratch, encode, page_digest};
use romulus_protocol::PrimaryEvent;
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, Session, Time};
use romulus_wire::{
    CommitRecord, PagesFrame, PagesSection, PagesWriter, WireError, device_state_frames,
    device_state_section, pack_guest_state,
};
use tokio::sync::mpsc;
use tracing::{debug, error};

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
        /// Pages of the guest.
        page_count: u64,
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
    digests: Vec<Digest>,
    image: ImageDigest,
}

/// The session's connection is gone; what is encoded for it has no receiver.
struct Gone;

/// The encoder thread's state.
pub struct Encoder {
    sending: Option<Sending>,
    previous: PreviousPages,
    scratch: Scratch,
    payload: Vec<u8>,
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
            previous: PreviousPages::new(delta_bytes_max),
            scratch: Scratch::new(),
            payload: Vec::with_capacity(2 * PAGE_BYTES),
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
            EncodeJob::Begin {
                session,
                page_count,
                sink,
            } => self.begin(session, page_count, sink),
            EncodeJob::FirstCopy { session, first, data } => {
                let (pages, _) = data.as_chunks::<PAGE_BYTES>();
                let pages = (first.0..).map(PageIndex).zip(pages);
                self.send_pages(session, FIRST_COPY_EPOCH, pages);
            }
            EncodeJob::Precopy { session, buffer } => {
                self.send_pages(session, FIRST_COPY_EPOCH, buffer.page_contents());
                self.buffers.give(buffer);
            }
            EncodeJob::FirstCopyDone { session } => {
                if self.is_current(session) {
                    self.events.send(PrimaryEvent::FirstCopyDone(session));
                }
            }
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

    fn begin(&mut self, session: Session, page_count: u64, sink: mpsc::Sender<Bytes>) {
        self.previous.clear();
        let page_count = usize::try_from(page_count).expect("a guest's pages fit in memory");
        let digests = vec![Digest(0); page_count];
        self.sending = Some(Sending {
            session,
            sink,
            digests,
            image: ImageDigest::ZERO,
        });
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
        let notes = serde_json::to_vec(learnt).expect("addresses are plain values");
        let state = pack_guest_state(&notes, &buffer.device_state);
        match self.send_commit(session, epoch, &state, captured, tally.section) {
            Ok(Ok(())) => {}
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
        for frame in device_state_frames(session, epoch, state)? {
            if sending.sink.blocking_send(frame).is_err() {
                return Ok(Err(Gone));
            }
        }
        let record = CommitRecord {
            session,
            epoch,
            captured_ns: captured.ns,
            image_digest: sending.image.digest(),
            pages,
            device_state: device_state_section(state),
        };
        Ok(sending.sink.blocking_send(record.frame()).map_err(|_| Gone))
    }

    /// Encodes pages, in ascending order, and sends them. `None` when the session is not current or its connection
    /// is gone.
    fn send_pages<'p>(
        &mut self,
        session: Session,
        epoch: Epoch,
        pages: impl Iterator<Item = (PageIndex, &'p [u8; PAGE_BYTES])>,
    ) -> Option<Tally> {
        if !self.is_current(session) {
            return None;
        }
        let mut tally = Tally::default();
        let mut writer = PagesWriter::new(session, epoch, FRAME_BYTES);
        for (index, page) in pages {
            let Some(kind) = self.encode_page(index, page) else {
                continue;
            };
            tally.page_bytes += PAGE_BYTES as u64;
            tally.kinds[usize::from(kind as u8) % tally.kinds.len()] += 1;
            if writer.push(index, kind as u8, &self.payload) {
                continue;
            }
            let full = std::mem::replace(&mut writer, PagesWriter::new(session, epoch, FRAME_BYTES));
            self.send_frame(full.finish(), &mut tally).ok()?;
            assert!(
                writer.push(index, kind as u8, &self.payload),
                "an empty frame takes any page"
            );
        }
        self.send_frame(writer.finish(), &mut tally).ok()?;
        Some(tally)
    }

    /// Encodes one page into `self.payload`; `None` when the backup has this very content already.
    fn encode_page(&mut self, index: PageIndex, page: &[u8; PAGE_BYTES]) -> Option<Kind> {
        let sending = self.sending.as_mut().expect("checked by the caller");
        let position = usize::try_from(index.0).expect("a guest's pages fit in memory");
        let old = sending.digests[position];
        let new = page_digest(index, page);
        // Both all zeros: known without trusting a hash.
        if old == Digest(0) && new == Digest(0) {
            return None;
        }
        self.payload.clear();
        let previous = self.previous.get(index);
        let kind = encode(page, previous, &mut self.scratch, &mut self.payload);
        self.previous.put(index, page);
        if kind == Kind::Same {
            return None;
        }
        sending.image.replace(old, new);
        sending.digests[position] = new;
        Some(kind)
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
