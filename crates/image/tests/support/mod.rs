//! A plain model of an image, and the primary's side of a checkpoint.

#![allow(dead_code, reason = "each test file uses a part of this")]

pub(crate) mod small_disk;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use romulus_image::{
    Area, Expected, FileName, Files, FolderShelf, HostFiles, Image, ImageError, Keeper, KeptShelf, Limits,
    Shelf, device_state_digest,
};
use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{
    BlockId, Digest, Epoch, PAGE_BYTES, PageIndex, RamBlock, RamLayout, Session, Term, VmId,
};

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

/// Systemd's place: it holds on to files while the agent is gone. Clones are the same keeper.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestKeeper(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    held: Vec<(String, OwnedFd)>,
    /// What it was told and has not done yet, in order.
    told: Vec<Told>,
    /// How often it was waited for.
    settled: usize,
}

#[derive(Debug)]
enum Told {
    Keep(String, OwnedFd),
    LetGo(String),
}

impl Kept {
    fn perform(&mut self, orders: Vec<Told>) {
        for order in orders {
            match order {
                Told::Keep(name, fd) => self.held.push((name, fd)),
                Told::LetGo(gone) => self.held.retain(|(name, _)| *name != gone),
            }
        }
    }
}

impl TestKeeper {
    /// What is held.
    pub(crate) fn held(&self) -> Vec<(String, OwnedFd)> {
        let kept = self.0.lock().unwrap();
        let copy = |(name, fd): &(String, OwnedFd)| (name.clone(), fd.try_clone().unwrap());
        kept.held.iter().map(copy).collect()
    }

    /// The next life of the agent, with what is held when everything that was told so far is done.
    pub(crate) fn shelf(&self, files_max: usize) -> Arc<dyn Shelf> {
        self.settle().unwrap();
        self.shelf_of_what_is_settled(files_max)
    }

    /// The same, of an agent after which nothing was done that had not been waited for.
    pub(crate) fn shelf_of_what_is_settled(&self, files_max: usize) -> Arc<dyn Shelf> {
        self.lose_what_is_not_done();
        Arc::new(
            KeptShelf::new(Box::new(self.clone()), self.held(), files_max)
                .unwrap()
                .0,
        )
    }

    /// Does the first `count` things that it was told and has not done.
    pub(crate) fn do_some(&self, count: usize) {
        let mut kept = self.0.lock().unwrap();
        let count = count.min(kept.told.len());
        let some: Vec<Told> = kept.told.drain(..count).collect();
        kept.perform(some);
    }

    fn lose_what_is_not_done(&self) {
        self.0.lock().unwrap().told.clear();
    }

    /// Names of what is held.
    pub(crate) fn names(&self) -> Vec<String> {
        let kept = self.0.lock().unwrap();
        kept.held.iter().map(|(name, _)| name.clone()).collect()
    }

    /// How often it was waited for.
    pub(crate) fn settled(&self) -> usize {
        self.0.lock().unwrap().settled
    }
}

impl Keeper for TestKeeper {
    fn keep(&self, name: &str, file: &File) -> io::Result<()> {
        let told = Told::Keep(name.to_owned(), file.try_clone()?.into());
        self.0.lock().unwrap().told.push(told);
        Ok(())
    }

    fn let_go(&self, name: &str) -> io::Result<()> {
        self.0.lock().unwrap().told.push(Told::LetGo(name.to_owned()));
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        let mut kept = self.0.lock().unwrap();
        kept.settled += 1;
        let all = std::mem::take(&mut kept.told);
        kept.perform(all);
        Ok(())
    }
}

/// The files of a new image of the test guest in a folder.
pub(crate) fn in_folder(dir: &Path) -> HostFiles {
    HostFiles::create(Arc::new(FolderShelf::new(dir)), &vm(), FILES).unwrap()
}

/// The files of an image, in the order in which it makes them, and their lengths in bytes.
pub(crate) fn files_of(layout: &RamLayout) -> Vec<(FileName, u64)> {
    let ram = (0..).map(|block| FileName::Ram(BlockId(block)));
    let ram = ram.zip(layout.blocks().iter().map(|block| block.bytes));
    [(FileName::Layout, 0)]
        .into_iter()
        .chain(ram)
        .chain([
            (FileName::Staging(Area::A), 0),
            (FileName::Staging(Area::B), 0),
            (FileName::Commit, 8192),
        ])
        .collect()
}

/// Files of an image of the test guest.
pub(crate) const FILES: usize = 6;

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
