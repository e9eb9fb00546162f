//! Bad memory: a bit flipped in any file is noticed, and nobody is given an image that was not committed.

mod support;

use std::collections::BTreeMap;

use romulus_image::{
    Area, Crashing, FileName, Files, Fuse, Image, ImageError, ImageState, MemFiles, UnusableReason,
};
use romulus_types::{BlockId, Epoch, PageIndex, Session, VmId};
use support::{committed, layout, limits, stage};

/// Flips bits of a file of an image with a commit, one at a time, and opens it.
fn open_with_flips(
    applied: bool,
    file: FileName,
    mut judge: impl FnMut(Result<Image<MemFiles>, ImageError>),
) {
    let mem = MemFiles::new();
    let (mut image, model) = committed(mem.clone());
    let pages = BTreeMap::from([(0, 3), (3, 0), (6, 2)]);
    let (next, expected) = model.checkpoint(&pages, 90, false);
    stage(&mut image, &expected, &pages, &next.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    if applied {
        image.apply().unwrap();
    }
    let bytes = mem.contents(file).unwrap().len() as u64;
    for offset in (0..bytes).filter(|offset| offset % 4096 < 300 || offset % 61 == 0) {
        for bit in 0..8 {
            let flipped = mem.fork();
            flipped.flip_bit(file, offset, bit);
            judge(Image::open(flipped, limits()));
        }
    }
}

#[test]
fn a_flipped_bit_in_memory_or_in_the_committed_staging_makes_the_image_unusable() {
    for file in [
        FileName::Ram(BlockId(0)),
        FileName::Ram(BlockId(1)),
        FileName::Staging(Area::B),
    ] {
        open_with_flips(true, file, |opened| {
            let image = opened.unwrap();
            let ImageState::Unusable { reason } = image.state() else {
                panic!("{file}: {image:?}")
            };
            let fits = match file {
                FileName::Staging(_) => reason == UnusableReason::StagingDamaged,
                _ => matches!(reason, UnusableReason::DigestMismatch { .. }),
            };
            assert!(fits, "{file}: {reason}");
        });
    }
    open_with_flips(false, FileName::Staging(Area::B), |opened| {
        let unusable = ImageState::Unusable {
            reason: UnusableReason::StagingDamaged,
        };
        assert_eq!(opened.unwrap().state(), unusable);
    });
}

#[test]
fn a_flipped_bit_in_a_slot_falls_back_to_the_other_one_and_is_reported() {
    let mut damaged = 0;
    open_with_flips(true, FileName::Commit, |opened| {
        let image = opened.unwrap();
        let right = matches!(
            image.state(),
            ImageState::Committed {
                epoch: Epoch(2),
                applied: true,
                ..
            }
        );
        assert!(right, "both slots are of epoch 2, found {image:?}");
        image.verify_image().unwrap();
        damaged += u32::from(image.recovery().damaged_slots);
    });
    assert_eq!(
        damaged,
        512 * 8,
        "each bit of both slots counts, the zeros between them do not"
    );
}

#[test]
fn a_flipped_bit_in_the_layout_is_refused_by_name() {
    open_with_flips(true, FileName::Layout, |opened| {
        assert!(matches!(opened, Err(ImageError::LayoutDamaged)));
    });
}

#[test]
fn damage_is_found_while_running_too() {
    let mem = MemFiles::new();
    let (mut image, model) = committed(mem.clone());
    mem.flip_bit(FileName::Ram(BlockId(1)), 4096 + 77, 2);
    assert!(matches!(
        image.verify_image(),
        Err(ImageError::PageDamaged { page: PageIndex(6) })
    ));
    mem.flip_bit(FileName::Ram(BlockId(1)), 4096 + 77, 2);
    image.verify_image().unwrap();
    let pages = BTreeMap::from([(0, 3)]);
    let (next, expected) = model.checkpoint(&pages, 0, false);
    stage(&mut image, &expected, &pages, &next.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    mem.flip_bit(FileName::Staging(Area::B), 1000, 0);
    assert!(matches!(image.apply(), Err(ImageError::StagingDamaged { .. })));
    image.mark_unusable().unwrap();
    assert_eq!(
        image.state(),
        ImageState::Unusable {
            reason: UnusableReason::Marked
        }
    );
}

#[test]
fn once_marked_unusable_no_damaged_slot_brings_a_commit_back() {
    let mem = MemFiles::new();
    let (mut image, _) = committed(mem.clone());
    image.begin_sync(Session(10)).unwrap();
    for offset in [100, 4096 + 100] {
        let flipped = mem.fork();
        flipped.flip_bit(FileName::Commit, offset, 0);
        let image = Image::open(flipped, limits()).unwrap();
        assert_eq!(
            image.state(),
            ImageState::Unusable {
                reason: UnusableReason::Marked
            }
        );
        assert_eq!(image.recovery().damaged_slots, 1);
    }
    mem.flip_bit(FileName::Commit, 0, 0);
    mem.flip_bit(FileName::Commit, 4096, 0);
    let image = Image::open(mem, limits()).unwrap();
    assert_eq!(
        image.state(),
        ImageState::Unusable {
            reason: UnusableReason::SlotsDamaged
        }
    );
}

#[test]
fn a_crash_while_marking_unusable_is_made_good_by_the_next_open() {
    let (mem, fuse) = (MemFiles::new(), Fuse::never());
    let (mut image, _) = committed(Crashing::new(mem.clone(), fuse.clone()));
    // The first slot is written and synced, the second one not begun.
    fuse.set(2, 0);
    assert!(image.begin_sync(Session(10)).is_err());
    drop(Image::open(mem.clone(), limits()).unwrap());
    for offset in [100, 4096 + 100] {
        let flipped = mem.fork();
        flipped.flip_bit(FileName::Commit, offset, 0);
        let image = Image::open(flipped, limits()).unwrap();
        assert_eq!(
            image.state(),
            ImageState::Unusable {
                reason: UnusableReason::Marked
            }
        );
    }
}

#[test]
fn the_commit_slots_of_another_image_are_not_believed() {
    let (mut mem, other) = (MemFiles::new(), MemFiles::new());
    let (image, _) = committed(other.clone());
    drop(image);
    drop(Image::create(mem.clone(), &VmId::new("another").unwrap(), layout(), limits()).unwrap());
    mem.write_at(FileName::Commit, 0, &other.contents(FileName::Commit).unwrap())
        .unwrap();
    let image = Image::open(mem, limits()).unwrap();
    assert_eq!(
        image.state(),
        ImageState::Unusable {
            reason: UnusableReason::SlotsDamaged
        }
    );
}
