//! A plain model of an image, and the primary's side of a checkpoint.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::collections::BTreeMap;

use romulus_image::{Expected, Files, Image, ImageError, Limits, device_state_digest};
use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, RamBlock, RamLayout, Session, Term, VmId};

pub(crate) type Page = [u8; PAGE_BYTES];

/// Pages of the test guest: a block of 5 and one of 3.
pub(crate) const PAGES: usize = 8;

pub(crate) fn layout() -> RamLayout {
    let block = |name: &str, pages: u64| RamBlock {
        name: name.into(),
        bytes: pages * PAGE_BYTES as u64,
    };
    RamLayout::new(vec![block("pc.ram", 5), block("vga.vram", 3)]).unwrap()
}

pub(crate) fn vm() -> VmId {
    VmId::new("guest").unwrap()
}

pub(crate) fn limits() -> Limits {
    Limits {
        staging_bytes_max: 1 << 20,
        device_state_bytes_max: 200_000,
        staging_bytes_kept: 8192,
    }
}

/// 0 is a page of zeros.
pub(crate) fn page(content: u8) -> Page {
    std::array::from_fn(|i| if i % 64 < 8 { content } else { 0 })
}

pub(crate) fn device_state(epoch: u64, length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i as u64 * 31 + epoch) % 256).unwrap())
        .collect()
}

/// The primary's memory, one byte a page (see [`page`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) memory: [u8; PAGES],
    pub(crate) session: u128,
    pub(crate) epoch: u64,
    pub(crate) device_state: Vec<u8>,
}

impl Model {
    pub(crate) fn image_digest(&self) -> Digest {
        let mut digest = ImageDigest::ZERO;
        for (index, content) in self.memory.iter().enumerate() {
            digest.replace(Digest(0), page_digest(PageIndex(index as u64), &page(*content)));
        }
        digest.digest()
    }

    /// The memory and the record after a checkpoint of these pages.
    pub(crate) fn checkpoint(
        &self,
        pages: &BTreeMap<u64, u8>,
        state_bytes: usize,
        first: bool,
    ) -> (Self, Expected) {
        let mut next = self.clone();
        next.epoch += 1;
        next.device_state = device_state(next.epoch, state_bytes);
        let mut digest = ImageDigest::ZERO;
        for (index, content) in pages {
            next.memory[usize::try_from(*index).unwrap()] = *content;
            digest.replace(Digest(0), page_digest(PageIndex(*index), &page(*content)));
        }
        let expected = Expected {
            session: Session(next.session),
            epoch: Epoch(next.epoch),
            term: Term(4),
            page_count: pages.len() as u64,
            pages_digest: digest.digest(),
            device_state_bytes: next.device_state.len() as u64,
            device_state_digest: device_state_digest(&next.device_state),
            image_digest: next.image_digest(),
            first,
        };
        (next, expected)
    }
}

/// Stages the pages and the state in two pieces, without committing.
pub(crate) fn stage<F: Files>(
    image: &mut Image<F>,
    expected: &Expected,
    pages: &BTreeMap<u64, u8>,
    state: &[u8],
) -> Result<(), ImageError> {
    image.begin(expected.session, expected.epoch)?;
    let (head, tail) = state.split_at(state.len() / 2);
    image.stage_device_state(head)?;
    for (index, content) in pages {
        image.stage_page(PageIndex(*index), &page(*content))?;
    }
    image.stage_device_state(tail)
}

/// Panics unless the image holds exactly what the model holds.
pub(crate) fn assert_same<F: Files>(image: &Image<F>, model: &Model) {
    let mut read = [0; PAGE_BYTES];
    for (index, content) in model.memory.iter().enumerate() {
        image.read_page(PageIndex(index as u64), &mut read).unwrap();
        assert!(read == page(*content), "page {index} is not {content}");
    }
    assert_eq!(image.device_state().unwrap(), model.device_state);
    assert_eq!(image.image_digest(), model.image_digest());
}

/// A synchronised image with one applied commit, and its model.
pub(crate) fn committed<F: Files>(files: F) -> (Image<F>, Model) {
    let mut image = Image::create(files, &vm(), layout(), limits()).unwrap();
    let mut model = Model {
        session: 9,
        ..Model::default()
    };
    image.begin_sync(Session(9)).unwrap();
    model.memory = [1, 2, 0, 4, 5, 6, 0, 8];
    for (index, content) in model.memory.iter().enumerate() {
        image.sync_page(PageIndex(index as u64), &page(*content)).unwrap();
    }
    let pages = BTreeMap::from([(1, 20), (7, 0), (2, 30)]);
    let (model, expected) = model.checkpoint(&pages, 1000, true);
    stage(&mut image, &expected, &pages, &model.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    image.apply().unwrap();
    (image, model)
}
