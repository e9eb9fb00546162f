//! The primary's end of the data stream: dirty pages become frames, as the replicator makes them.

use std::collections::BTreeSet;

use bytes::Bytes;
use romulus_page_codec::{HeldPages, SessionEncoder};
use romulus_types::{Epoch, PageIndex, Session};
use romulus_wire::{
    CommitRecord, PagesFrame, PagesSection, PagesWriter, device_state_frames, device_state_section,
};

use crate::guest::Memory;

/// Small enough that checkpoints have several frames.
const FRAME_BYTES: usize = 12 << 10;
/// Previous versions that are kept: fewer than the guest's pages.
const PREVIOUS_BYTES: u64 = 16 * 4200;

/// What a capture took while the guest stood still.
#[derive(Debug)]
pub(crate) struct Harvest {
    pub(crate) epoch: Epoch,
    pub(crate) pages: BTreeSet<PageIndex>,
    pub(crate) memory: Memory,
}

/// The state of one session's encoding.
pub(crate) struct Sender {
    session: Session,
    encoder: SessionEncoder,
}

impl Sender {
    /// `held` is what the backup has already.
    pub(crate) fn new(session: Session, held: HeldPages) -> Self {
        Self {
            session,
            encoder: SessionEncoder::new(held, PREVIOUS_BYTES),
        }
    }

    /// A part of the first copy.
    pub(crate) fn first_copy(&mut self, memory: &Memory, pages: std::ops::Range<u64>) -> Vec<Bytes> {
        let pages: Vec<_> = pages.map(PageIndex).collect();
        self.pages(Epoch::NONE, memory, pages).0
    }

    /// All frames of a checkpoint, the commit record last.
    pub(crate) fn checkpoint(&mut self, harvest: &Harvest, captured_ns: u64) -> Vec<Bytes> {
        let epoch = harvest.epoch;
        let (mut frames, pages) = self.pages(epoch, &harvest.memory, harvest.pages.iter().copied());
        let state = device_state(&harvest.memory);
        frames.extend(device_state_frames(self.session, epoch, &state).expect("a small state"));
        let record = CommitRecord {
            session: self.session,
            epoch,
            captured_ns,
            image_digest: self.encoder.image_digest(),
            pages,
            device_state: device_state_section(&state),
        };
        frames.push(record.frame());
        frames
    }

    fn pages(
        &mut self,
        epoch: Epoch,
        memory: &Memory,
        pages: impl IntoIterator<Item = PageIndex>,
    ) -> (Vec<Bytes>, PagesSection) {
        let mut frames = Vec::new();
        let mut section = PagesSection::default();
        let mut finish = |frame: Option<PagesFrame>| {
            if let Some(frame) = frame {
                section.add(frame.section);
                frames.push(frame.frame);
            }
        };
        let mut writer = PagesWriter::new(self.session, epoch, FRAME_BYTES);
        for index in pages {
            let Some((kind, payload)) = self.encoder.encode(index, memory.page(index)) else {
                continue;
            };
            if !writer.push(index, kind.number(), payload) {
                let full = std::mem::replace(&mut writer, PagesWriter::new(self.session, epoch, FRAME_BYTES));
                finish(full.finish());
                assert!(
                    writer.push(index, kind.number(), payload),
                    "an empty frame takes any page"
                );
            }
        }
        finish(writer.finish());
        (frames, section)
    }
}

/// The model guest's device state: nothing but something to compare.
pub(crate) fn device_state(memory: &Memory) -> Vec<u8> {
    memory.counter().to_le_bytes().repeat(20)
}
