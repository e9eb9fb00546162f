//! A session's pages reach the image as they were, however they are encoded.

use std::path::Path;
use std::sync::Arc;

use romulus_hypervisor::fake::FakeSource;
use romulus_hypervisor::source::GuestSource;
use romulus_image::{FolderShelf, Limits, Places, StagingShare};
use romulus_page_codec::{HeldPages, SessionEncoder};
use romulus_types::{PageIndex, VmId};
use romulus_wire::{FrameDecoder, PagesWriter, device_state_frames, device_state_section};

use super::*;

const SESSION: Session = Session(7);
const GUEST_PAGES: u64 = 16;

fn image_in(dir: &Path) -> VmImage {
    let places = Places {
        shelf: Arc::new(FolderShelf::new(dir)),
        spill: Arc::new(FolderShelf::new(dir.join("spill"))),
        share: StagingShare::new(u64::MAX),
    };
    let vm = VmId::new("vm").expect("a name");
    let mut image = VmImage::open(&places, dir, &vm, Limits::default()).expect("a folder");
    let machine = FakeSource::new(GUEST_PAGES, 1).machine().clone();
    image
        .begin(SESSION, Arc::new(machine), |_, _| {})
        .expect("a new image");
    image
}

fn frame(bytes: &[u8]) -> Frame {
    let mut decoder = FrameDecoder::for_session(SESSION);
    assert_eq!(decoder.push(bytes), bytes.len());
    decoder
        .next_frame()
        .expect("a good frame")
        .expect("a whole frame")
}

/// Both ends of a session.
struct Ends {
    encoder: SessionEncoder,
    receiver: Receiver,
    image: VmImage,
    epoch: Epoch,
}

impl Ends {
    fn new(dir: &Path) -> Self {
        // The fake machine has a few pages more than were asked for.
        let held = HeldPages::new(SESSION, GUEST_PAGES + 64);
        Self {
            encoder: SessionEncoder::new(held, 1 << 20),
            receiver: Receiver::new(SESSION, Term(1)),
            image: image_in(dir),
            epoch: Epoch::NONE,
        }
    }

    /// Sends a checkpoint of these pages, and of `same` as one that did not change; how the others were encoded.
    fn checkpoint(&mut self, pages: &[(u64, Page)], same: Option<u64>) -> Vec<Kind> {
        self.epoch = self.epoch.next();
        let mut writer = PagesWriter::new(SESSION, self.epoch, 1 << 20);
        let mut kinds = Vec::new();
        for (index, page) in pages {
            let encoded = self.encoder.encode(PageIndex(*index), page);
            let (kind, payload) = encoded.expect("the page changed");
            assert!(writer.push(PageIndex(*index), kind.number(), payload));
            kinds.push(kind);
        }
        if let Some(same) = same {
            assert!(writer.push(PageIndex(same), Kind::Same.number(), &[]));
        }
        let pages = writer.finish().expect("there are pages");
        let record = CommitRecord {
            session: SESSION,
            epoch: self.epoch,
            captured_ns: 0,
            image_digest: self.encoder.image_digest(),
            pages: pages.section,
            device_state: device_state_section(b"state"),
        };
        let states = device_state_frames(SESSION, self.epoch, b"state").expect("a small state");
        let frames = std::iter::once(pages.frame).chain(states);
        for bytes in frames {
            let received = self.receiver.frame(&frame(&bytes), &mut self.image);
            assert!(matches!(received.expect("a good frame"), Received::More));
        }
        let committed = self.receiver.frame(&frame(&record.frame()), &mut self.image);
        let committed = committed.expect("every digest is right");
        assert!(matches!(committed, Received::Committed { epoch, .. } if epoch == self.epoch));
        kinds
    }

    fn assert_holds(&mut self, pages: &[(u64, Page)]) {
        let mut read = [0; PAGE_BYTES];
        for (index, page) in pages {
            let image = self.image.image().expect("there is one");
            image
                .read_page(PageIndex(*index), &mut read)
                .expect("it can be read");
            assert!(read == *page, "page {index} is another one");
        }
    }
}

/// Bytes that nothing makes shorter.
fn noise(seed: u64) -> Page {
    let mut state = seed;
    std::array::from_fn(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    })
}

/// A few words over and over, beginning at another one.
fn text(shift: usize) -> Page {
    let words = b"the quick brown fox jumps over the lazy dog, ";
    std::array::from_fn(|at| words[(at * 7 + at / 64 + shift) % words.len()])
}

#[test]
fn a_page_arrives_as_it_was_however_it_is_encoded() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut ends = Ends::new(dir.path());
    let first = [
        (0, noise(1)),
        (2, text(0)),
        (3, noise(3)),
        (4, noise(4)),
        (9, noise(9)),
    ];
    let mut kinds = ends.checkpoint(&first, None);
    ends.assert_holds(&first);
    ends.image.apply().expect("it is a good commit");
    let mut counted = noise(1);
    counted[800..808].copy_from_slice(&7_u64.to_le_bytes());
    let second = [(0, counted), (2, [0; PAGE_BYTES]), (3, noise(33)), (4, text(1))];
    kinds.extend(ends.checkpoint(&second, Some(9)));
    ends.image.apply().expect("it is a good commit");
    ends.assert_holds(&second);
    ends.assert_holds(&[(9, noise(9))]);
    for kind in [Kind::Zero, Kind::Delta, Kind::Raw] {
        assert!(kinds.contains(&kind), "{kind:?} was not tried, only {kinds:?}");
    }
    assert!(kinds.iter().any(|kind| matches!(kind, Kind::Lz4 | Kind::XorLz4)));
}

#[test]
fn a_raw_page_of_another_length_is_refused_in_the_first_copy_and_later() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut ends = Ends::new(dir.path());
    for epoch in [Epoch::NONE, Epoch(1)] {
        let mut writer = PagesWriter::new(SESSION, epoch, 1 << 20);
        assert!(writer.push(PageIndex(3), Kind::Raw.number(), &[1; PAGE_BYTES - 1]));
        let pages = writer.finish().expect("there is a page");
        let Err(error) = ends.receiver.frame(&frame(&pages.frame), &mut ends.image) else {
            panic!("it was taken");
        };
        let error = format!("{error:#}");
        assert!(error.contains("page 3") && error.contains("4095"), "{error}");
    }
}

#[test]
fn a_page_that_the_guest_does_not_have_is_refused_however_it_is_encoded() {
    for kind in [Kind::Raw, Kind::Zero, Kind::Same] {
        for epoch in [Epoch::NONE, Epoch(1)] {
            let dir = tempfile::tempdir().expect("a folder");
            let mut ends = Ends::new(dir.path());
            let payload = [1; PAGE_BYTES];
            let length = if kind == Kind::Raw { PAGE_BYTES } else { 0 };
            let mut writer = PagesWriter::new(SESSION, epoch, 1 << 20);
            assert!(writer.push(PageIndex(1 << 20), kind.number(), &payload[..length]));
            let pages = writer.finish().expect("there is a page");
            let taken = ends.receiver.frame(&frame(&pages.frame), &mut ends.image);
            assert!(taken.is_err(), "{kind:?} in epoch {epoch}");
        }
    }
}

#[test]
fn a_vm_whose_last_checkpoint_was_large_is_not_waited_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut ends = Ends::new(dir.path());
    assert!(
        !ends.receiver.is_awaited(),
        "nothing is held before the first checkpoint"
    );
    ends.checkpoint(&[(0, noise(1)), (2, text(0))], None);
    ends.image.apply().expect("it is a good commit");
    assert_eq!(ends.receiver.last_pages, 2);
    assert!(ends.receiver.is_awaited());
    ends.receiver.last_pages = AWAITED_PAGES_MAX + 1;
    assert!(!ends.receiver.is_awaited(), "the next one will be large, too");
    ends.checkpoint(&[(0, noise(2))], None);
    assert!(ends.receiver.is_awaited(), "it has calmed down");
}

#[test]
fn brief_is_what_has_few_pages_and_comes_after_the_like() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut ends = Ends::new(dir.path());
    let frame_of = |pages| {
        let mut writer = PagesWriter::new(SESSION, Epoch(2), 1 << 20);
        for page in 0..pages {
            assert!(writer.push(PageIndex(page), Kind::Zero.number(), &[]));
        }
        frame(&writer.finish().expect("there are pages").frame)
    };
    let (few, many) = (frame_of(BRIEF_PAGES_MAX), frame_of(BRIEF_PAGES_MAX + 1));
    assert!(!ends.receiver.is_brief(&few), "the first checkpoint is not known");
    ends.checkpoint(&[(0, noise(1))], None);
    ends.image.apply().expect("it is a good commit");
    assert!(ends.receiver.is_brief(&few));
    assert!(
        !ends.receiver.is_brief(&many),
        "a short frame may have many pages"
    );
    let taken = ends.receiver.frame(&frame_of(1), &mut ends.image);
    assert!(matches!(taken.expect("a good frame"), Received::More));
    assert!(
        !ends.receiver.is_brief(&few),
        "with what came it is one page too many"
    );
    ends.receiver.last_pages = BRIEF_PAGES_MAX + 1;
    assert!(
        !ends.receiver.is_brief(&frame_of(1)),
        "it is likely to be many again"
    );
}

#[test]
fn an_image_is_at_hand_in_memory_and_not_on_a_disk() {
    let [memory, disk] = ["/dev/shm", "/var/tmp"].map(|dir| {
        let dir = tempfile::tempdir_in(dir).expect("a folder");
        image_in(dir.path()).is_at_hand()
    });
    assert!(memory && !disk);
}
