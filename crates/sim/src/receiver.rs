//! The backup's end of the data stream: frames become staged pages and verified commits, as the agent makes them.

use romulus_image::{Expected, Image, ImageError, device_state_digest};
use romulus_page_codec::{DecodeError, Page, decode, page_digest};
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, Session, Term, Time};
use romulus_wire::{
    CommitRecord, DeviceStateAssembler, DeviceStateChunk, Frame, FrameType, Pages, PagesSection, WireError,
};

use crate::store::SimFiles;

/// Why a session's data is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("a frame that has no place here")]
    Misplaced,
}

struct Incoming {
    epoch: Epoch,
    sent: PagesSection,
    digest: Digest,
    device_state: DeviceStateAssembler,
}

/// One session's checkpoints as they arrive.
pub(crate) struct Receiver {
    session: Session,
    term: Term,
    incoming: Option<Incoming>,
    last: Epoch,
    /// Pages of the last checkpoint and of the one before, for a planted mistake.
    pages: Vec<(PageIndex, Page)>,
    last_pages: Vec<(PageIndex, Page)>,
}

impl Receiver {
    pub(crate) fn new(session: Session, term: Term) -> Self {
        Self {
            session,
            term,
            incoming: None,
            last: Epoch::NONE,
            pages: Vec::new(),
            last_pages: Vec::new(),
        }
    }

    /// The pages of the checkpoint before the last one.
    pub(crate) fn take_last_pages(&mut self) -> Vec<(PageIndex, Page)> {
        std::mem::replace(&mut self.last_pages, std::mem::take(&mut self.pages))
    }

    /// The checkpoint that is coming in, or came last.
    pub(crate) fn epoch(&self) -> Epoch {
        self.incoming
            .as_ref()
            .map_or(self.last, |incoming| incoming.epoch)
    }

    /// Takes a frame; when it completes a checkpoint, that epoch and when the primary captured it.
    pub(crate) fn take(
        &mut self,
        frame: &Frame,
        image: &mut Image<SimFiles>,
    ) -> Result<Option<(Epoch, Time)>, Refused> {
        match frame.frame_type {
            FrameType::Pages => self.pages(&Pages::parse(frame)?, image)?,
            FrameType::DeviceState => {
                let chunk = DeviceStateChunk::parse(frame)?;
                self.incoming(chunk.epoch, image)?.device_state.push(chunk)?;
            }
            FrameType::Commit => {
                let record = CommitRecord::from_frame(frame)?;
                let epoch = self.commit(&record, image)?;
                return Ok(Some((epoch, Time::from_ns(record.captured_ns))));
            }
            _ => return Err(Refused::Misplaced),
        }
        Ok(None)
    }

    fn pages(&mut self, pages: &Pages<'_>, image: &mut Image<SimFiles>) -> Result<(), Refused> {
        let mut page: Page = [0; PAGE_BYTES];
        let mut base: Page = [0; PAGE_BYTES];
        let first_copy = pages.epoch() == Epoch::NONE;
        if !first_copy {
            self.incoming(pages.epoch(), image)?.sent.add(pages.section());
        } else if self.last != Epoch::NONE {
            return Err(Refused::Misplaced);
        }
        for entry in pages.entries() {
            image.read_page(entry.page, &mut base)?;
            decode(entry.kind, entry.payload, Some(&base), &mut page)?;
            if first_copy {
                image.sync_page(entry.page, &page)?;
            } else {
                self.stage(entry.page, &page, image)?;
            }
        }
        Ok(())
    }

    fn stage(&mut self, index: PageIndex, page: &Page, image: &mut Image<SimFiles>) -> Result<(), Refused> {
        let incoming = self.incoming.as_mut().expect("begun by the caller");
        incoming.digest = Digest(incoming.digest.0.wrapping_add(page_digest(index, page).0));
        image.stage_page(index, page)?;
        self.pages.push((index, *page));
        Ok(())
    }

    fn incoming(&mut self, epoch: Epoch, image: &mut Image<SimFiles>) -> Result<&mut Incoming, Refused> {
        if self
            .incoming
            .as_ref()
            .is_some_and(|incoming| incoming.epoch != epoch)
        {
            return Err(Refused::Misplaced);
        }
        if self.incoming.is_none() {
            image.begin(self.session, epoch)?;
            let device_state = DeviceStateAssembler::new(epoch);
            let sent = PagesSection::default();
            self.incoming = Some(Incoming {
                epoch,
                sent,
                digest: Digest(0),
                device_state,
            });
        }
        Ok(self.incoming.as_mut().expect("there is one now"))
    }

    fn commit(&mut self, record: &CommitRecord, image: &mut Image<SimFiles>) -> Result<Epoch, Refused> {
        self.incoming(record.epoch, image)?;
        let incoming = self.incoming.take().expect("there is one now");
        if incoming.sent != record.pages {
            return Err(Refused::Misplaced);
        }
        let state = incoming.device_state.finish(&record.device_state)?;
        image.stage_device_state(&state)?;
        // Deltas of the next checkpoint refer to this one, and the files must be free for it.
        image.verify_and_commit(&Expected {
            session: self.session,
            epoch: record.epoch,
            term: self.term,
            page_count: record.pages.pages,
            pages_digest: incoming.digest,
            device_state_bytes: record.device_state.bytes,
            device_state_digest: device_state_digest(&state),
            image_digest: record.image_digest,
            first: self.last == Epoch::NONE,
        })?;
        self.last = record.epoch;
        Ok(record.epoch)
    }
}
