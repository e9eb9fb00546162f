//! One session's checkpoints as they arrive: frames in, staged pages and verified commits out.
//!
//! Nothing here trusts the peer: a frame that does not fit where it stands is a named error, and the session ends.

use anyhow::{Context, bail, ensure};
use romulus_hypervisor::fault;
use romulus_image::{Expected, device_state_digest};
use romulus_page_codec::{Kind, Page, decode};
use romulus_types::{Digest, Epoch, PAGE_BYTES, Session, Term, Time};
use romulus_wire::{
    CommitRecord, DeviceStateAssembler, DeviceStateChunk, Frame, FrameType, PageEntry, Pages, PagesSection,
};

use crate::vm_image::VmImage;

/// Most pages of a checkpoint for which other threads are made to wait: some milliseconds' work.
const AWAITED_PAGES_MAX: u64 = 1024;

/// Most pages of a checkpoint, and bytes of its device state and of each of its frames, that are brief: a tenth of a millisecond's work
/// or two.
const BRIEF_PAGES_MAX: u64 = 64;
const BRIEF_BYTES_MAX: usize = 256 << 10;

/// What a frame led to.
pub enum Received {
    /// The checkpoint goes on.
    More,
    /// It is complete, verified and durable.
    Committed {
        /// Its epoch.
        epoch: Epoch,
        /// Its pages.
        pages: u64,
        /// When it was captured, by the primary's clock.
        captured: Time,
    },
}

/// A checkpoint that is being received.
struct Incoming {
    epoch: Epoch,
    sent: PagesSection,
    pages_digest: Digest,
    device_state: DeviceStateAssembler,
}

/// Where a page is decoded.
struct Room {
    base: Page,
    page: Page,
}

impl Room {
    /// The page of an entry: as it came when it is raw, otherwise decoded. The version before it is read only for what needs it.
    fn page_of<'a>(&'a mut self, entry: &PageEntry<'a>, image: &mut VmImage) -> anyhow::Result<&'a Page> {
        let kind = Kind::try_from(entry.kind)?;
        if kind == Kind::Raw
            && let Ok(page) = entry.payload.try_into()
        {
            return Ok(page);
        }
        let mut previous = None;
        if kind.needs_previous() {
            image.image()?.read_page(entry.page, &mut self.base)?;
            previous = Some(&self.base);
        }
        decode(entry.kind, entry.payload, previous, &mut self.page)?;
        Ok(&self.page)
    }
}

/// The receiving end of one session's data stream.
pub struct Receiver {
    session: Session,
    term: Term,
    incoming: Option<Incoming>,
    last: Epoch,
    /// Of the last checkpoint.
    last_pages: u64,
}

impl Receiver {
    /// Nothing received yet. `term` is the record's term that the primary named.
    pub fn new(session: Session, term: Term) -> Self {
        Self {
            session,
            term,
            incoming: None,
            last: Epoch::NONE,
            last_pages: 0,
        }
    }

    /// The session.
    pub fn session(&self) -> Session {
        self.session
    }

    /// The epoch that is being received, or the last one.
    pub fn epoch(&self) -> Epoch {
        self.incoming
            .as_ref()
            .map_or(self.last, |incoming| incoming.epoch)
    }

    /// Whether held output waits for what is received, and little of the processor's time is enough for it: not the first copy of
    /// memory, and not the checkpoints of a VM that floods, which is known by the last one.
    pub fn is_awaited(&self) -> bool {
        let pages = self.incoming.as_ref().map_or(0, |incoming| incoming.sent.pages);
        self.last != Epoch::NONE && pages.max(self.last_pages) <= AWAITED_PAGES_MAX
    }

    /// Whether a frame is of a checkpoint that is as brief as the one before it.
    pub fn is_brief(&self, frame: &Frame) -> bool {
        let (pages, state_bytes) = self.incoming.as_ref().map_or((0, 0), |incoming| {
            (incoming.sent.pages, incoming.device_state.bytes())
        });
        let more_pages = match frame.frame_type {
            // What is wrong with it is told by who takes it.
            FrameType::Pages => Pages::parse(frame).map_or(u64::MAX, |pages| pages.section().pages),
            _ => 0,
        };
        self.last != Epoch::NONE
            && self.last_pages.max(pages.saturating_add(more_pages)) <= BRIEF_PAGES_MAX
            && state_bytes.max(frame.payload.len()) <= BRIEF_BYTES_MAX
    }

    /// Takes one frame.
    ///
    /// # Errors
    /// Anything that is not exactly what may come next. What was staged must be discarded then.
    pub fn frame(&mut self, frame: &Frame, image: &mut VmImage) -> anyhow::Result<Received> {
        match frame.frame_type {
            FrameType::Pages => self.pages(&Pages::parse(frame)?, image)?,
            FrameType::DeviceState => {
                let chunk = DeviceStateChunk::parse(frame)?;
                self.incoming(chunk.epoch, image)?.device_state.push(chunk)?;
            }
            FrameType::Commit => return self.commit(&CommitRecord::from_frame(frame)?, image),
            other => bail!("a {other:?} frame has no place in the data stream"),
        }
        Ok(Received::More)
    }

    fn pages(&mut self, pages: &Pages<'_>, image: &mut VmImage) -> anyhow::Result<()> {
        let mut room = Room {
            base: [0; PAGE_BYTES],
            page: [0; PAGE_BYTES],
        };
        if pages.epoch() == Epoch::NONE {
            ensure!(
                self.last == Epoch::NONE,
                "pages of the first copy came after the first checkpoint"
            );
            for entry in pages.entries() {
                let page = room
                    .page_of(&entry, image)
                    .with_context(|| format!("page {} of the first copy", entry.page.0))?;
                image.image()?.sync_page(entry.page, page)?;
            }
            fault::point("agent.first_copy");
            return Ok(());
        }
        let incoming = self.incoming(pages.epoch(), image)?;
        incoming.sent.add(pages.section());
        for entry in pages.entries() {
            let page = room
                .page_of(&entry, image)
                .with_context(|| format!("page {} of epoch {}", entry.page.0, pages.epoch()))?;
            let digest = image.image()?.stage_page(entry.page, page)?;
            incoming.pages_digest = Digest(incoming.pages_digest.0.wrapping_add(digest.0));
        }
        fault::point("agent.staged");
        Ok(())
    }

    /// The checkpoint of `epoch`, begun with its first frame.
    fn incoming(&mut self, epoch: Epoch, image: &mut VmImage) -> anyhow::Result<&mut Incoming> {
        if let Some(incoming) = &self.incoming {
            ensure!(
                incoming.epoch == epoch,
                "a frame of epoch {epoch} came inside the checkpoint of epoch {}",
                incoming.epoch
            );
        } else {
            image.image()?.begin(self.session, epoch)?;
            self.incoming = Some(Incoming {
                epoch,
                sent: PagesSection::default(),
                pages_digest: Digest(0),
                device_state: DeviceStateAssembler::new(epoch),
            });
        }
        Ok(self.incoming.as_mut().expect("there is one now"))
    }

    fn commit(&mut self, record: &CommitRecord, image: &mut VmImage) -> anyhow::Result<Received> {
        let first = self.last == Epoch::NONE;
        self.incoming(record.epoch, image)?;
        let incoming = self.incoming.take().expect("there is one now");
        ensure!(
            incoming.sent == record.pages,
            "the pages that came ({} of them) are not the {} that the commit record names",
            incoming.sent.pages,
            record.pages.pages
        );
        let device_state = incoming.device_state.finish(&record.device_state)?;
        image.image()?.stage_device_state(&device_state)?;
        fault::point("agent.before_commit");
        image.image()?.verify_and_commit(&Expected {
            session: self.session,
            epoch: record.epoch,
            term: self.term,
            page_count: record.pages.pages,
            pages_digest: incoming.pages_digest,
            device_state_bytes: record.device_state.bytes,
            device_state_digest: device_state_digest(&device_state),
            image_digest: record.image_digest,
            first,
        })?;
        self.last = record.epoch;
        self.last_pages = record.pages.pages;
        Ok(Received::Committed {
            epoch: record.epoch,
            pages: record.pages.pages,
            captured: Time::from_ns(record.captured_ns),
        })
    }
}

#[cfg(test)]
#[path = "receive_tests.rs"]
mod tests;
