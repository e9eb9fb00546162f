//! What a peer, an operator or bad memory may not do to an image, each with an error of its own.

mod support;

use std::collections::BTreeMap;

use romulus_image::{
    Area, Crashing, Expected, FileName, Fuse, Image, ImageError, ImageState, Limits, MemFiles, UnusableReason,
};
use romulus_types::{Epoch, PAGE_BYTES, PageIndex, Session};
use support::{Model, assert_same, committed, layout, limits, page, stage, vm};

/// Stages epoch n + 1 correctly, then commits what `change` makes of the record.
fn commit_changed(change: impl FnOnce(&mut Expected)) -> ImageError {
    let (mut image, model) = committed(MemFiles::new());
    let pages = BTreeMap::from([(0, 3), (5, 0)]);
    let (next, mut expected) = model.checkpoint(&pages, 100, false);
    let right = expected;
    stage(&mut image, &expected, &pages, &next.device_state).unwrap();
    change(&mut expected);
    let error = image.verify_and_commit(&expected).unwrap_err();
    assert_same(&image, &model);
    image.verify_image().unwrap();
    assert!(
        matches!(image.verify_and_commit(&right), Err(ImageError::NoStaging)),
        "it is discarded"
    );
    stage(&mut image, &right, &pages, &next.device_state).unwrap();
    image.verify_and_commit(&right).unwrap();
    image.apply().unwrap();
    assert_same(&image, &next);
    error
}

#[test]
fn a_record_that_is_wrong_anywhere_discards_the_staging_and_keeps_the_last_commit() {
    use ImageError as E;
    assert!(matches!(
        commit_changed(|r| r.page_count += 1),
        E::PageCount {
            expected: 3,
            found: 2
        }
    ));
    assert!(matches!(
        commit_changed(|r| r.pages_digest.0 ^= 1),
        E::PagesDigest { .. }
    ));
    assert!(matches!(
        commit_changed(|r| r.device_state_bytes -= 1),
        E::DeviceStateBytes { found: 100, .. }
    ));
    assert!(matches!(
        commit_changed(|r| r.device_state_digest.0 ^= 1),
        E::DeviceStateDigest { .. }
    ));
    assert!(matches!(
        commit_changed(|r| r.image_digest.0 ^= 1),
        E::ImageDigest { .. }
    ));
    assert!(matches!(
        commit_changed(|r| r.session = Session(8)),
        E::SessionMismatch { .. }
    ));
    assert!(matches!(
        commit_changed(|r| r.epoch = Epoch(3)),
        E::EpochMismatch { .. }
    ));
    assert!(matches!(
        commit_changed(|r| r.first = true),
        E::FirstMismatch { found: true, .. }
    ));
}

#[test]
fn a_page_left_out_is_noticed_by_the_digest_of_the_image() {
    let (mut image, model) = committed(MemFiles::new());
    let all = BTreeMap::from([(0, 3), (5, 0)]);
    let fewer = BTreeMap::from([(0, 3)]);
    let (_, right) = model.checkpoint(&all, 1, false);
    let (next, mut wrong) = model.checkpoint(&fewer, 1, false);
    wrong.image_digest = right.image_digest;
    stage(&mut image, &wrong, &fewer, &next.device_state).unwrap();
    assert!(matches!(
        image.verify_and_commit(&wrong),
        Err(ImageError::ImageDigest { .. })
    ));
}

#[test]
fn only_the_next_epoch_of_the_same_session_may_be_staged() {
    let (mut image, _) = committed(MemFiles::new());
    let mut begin = |session, epoch| image.begin(Session(session), Epoch(epoch));
    assert!(matches!(begin(8, 2), Err(ImageError::SessionMismatch { .. })));
    for replayed in [0, 1] {
        assert!(matches!(
            begin(9, replayed),
            Err(ImageError::EpochReplayed { last: Epoch(1), .. })
        ));
    }
    for skipped in [3, u64::MAX] {
        assert!(matches!(
            begin(9, skipped),
            Err(ImageError::EpochSkipped { last: Epoch(1), .. })
        ));
    }
    begin(9, 2).unwrap();
    assert!(matches!(
        begin(9, 2),
        Err(ImageError::StagingInProgress { epoch: Epoch(2) })
    ));
}

#[test]
fn pages_that_the_guest_does_not_have_and_pages_sent_twice_are_refused() {
    let (mut image, _) = committed(MemFiles::new());
    assert!(matches!(
        image.stage_page(PageIndex(0), &page(1)),
        Err(ImageError::NoStaging)
    ));
    image.begin(Session(9), Epoch(2)).unwrap();
    for outside in [8, u64::MAX] {
        let refused = image.stage_page(PageIndex(outside), &page(1));
        assert!(matches!(
            refused,
            Err(ImageError::PageOutOfRange { page_count: 8, .. })
        ));
        assert!(image.read_page(PageIndex(outside), &mut [0; PAGE_BYTES]).is_err());
    }
    image.stage_page(PageIndex(4), &page(0)).unwrap();
    let refused = image.stage_page(PageIndex(4), &page(1));
    assert!(matches!(
        refused,
        Err(ImageError::PageTwice { page: PageIndex(4) })
    ));
}

#[test]
fn a_checkpoint_uses_no_more_than_its_limits() {
    let tight = Limits {
        staging_bytes_max: 3 * 4112 + 16,
        device_state_bytes_max: 100,
        ..limits()
    };
    let files = MemFiles::new();
    let (image, _) = committed(files.clone());
    drop(image);
    let mut image = Image::open(files.clone(), tight).unwrap();
    image.begin(Session(9), Epoch(2)).unwrap();
    assert!(matches!(
        image.stage_device_state(&[0; 101]),
        Err(ImageError::DeviceStateTooLarge { limit_bytes: 100 })
    ));
    for index in 0..3 {
        image.stage_page(PageIndex(index), &page(9)).unwrap();
    }
    image.stage_page(PageIndex(3), &page(0)).unwrap();
    assert!(matches!(
        image.stage_page(PageIndex(4), &page(0)),
        Err(ImageError::StagingFull { .. })
    ));
    assert!(matches!(
        image.stage_device_state(&[1]),
        Err(ImageError::StagingFull { .. })
    ));
    assert_eq!(image.staging_bytes(), tight.staging_bytes_max);
}

#[test]
fn a_staging_file_gives_the_space_of_a_large_checkpoint_back() {
    let files = MemFiles::new();
    let (mut image, mut model) = committed(files.clone());
    let length = |area| files.contents(FileName::Staging(area)).unwrap().len();
    for state_bytes in [150_000, 10, 10] {
        let (next, expected) = model.checkpoint(&BTreeMap::new(), state_bytes, false);
        stage(&mut image, &expected, &BTreeMap::new(), &next.device_state).unwrap();
        image.verify_and_commit(&expected).unwrap();
        image.apply().unwrap();
        model = next;
    }
    assert!(length(Area::A) <= 8192 && length(Area::B) <= 8192);
}

#[test]
fn nothing_is_staged_or_read_before_the_image_is_usable() {
    let mut image = Image::create(MemFiles::new(), &vm(), layout(), limits()).unwrap();
    assert!(matches!(
        image.begin(Session(1), Epoch(1)),
        Err(ImageError::WrongState { .. })
    ));
    assert!(matches!(image.apply(), Err(ImageError::WrongState { .. })));
    assert!(matches!(
        image.sync_page(PageIndex(0), &page(1)),
        Err(ImageError::WrongState { .. })
    ));
    assert!(matches!(
        image.survey(|_, _| ()),
        Err(ImageError::WrongState { .. })
    ));
    assert!(matches!(image.device_state(), Err(ImageError::WrongState { .. })));
    let (mut image, _) = committed(MemFiles::new());
    assert!(matches!(
        image.sync_page(PageIndex(0), &page(1)),
        Err(ImageError::WrongState { .. })
    ));
}

#[test]
fn a_first_commit_on_a_base_that_is_not_the_primarys_memory_is_refused() {
    let mut image = Image::create(MemFiles::new(), &vm(), layout(), limits()).unwrap();
    let model = Model {
        session: 5,
        memory: [1; 8],
        ..Model::default()
    };
    image.begin_sync(Session(5)).unwrap();
    for index in 0..7 {
        image.sync_page(PageIndex(index), &page(1)).unwrap();
    }
    let (next, expected) = model.checkpoint(&BTreeMap::from([(0, 2)]), 4, true);
    let pages = BTreeMap::from([(0, 2)]);
    stage(&mut image, &expected, &pages, &next.device_state).unwrap();
    assert!(matches!(
        image.verify_and_commit(&expected),
        Err(ImageError::ImageDigest { .. })
    ));
    assert_eq!(image.state(), ImageState::Syncing { session: Session(5) });
    image.sync_page(PageIndex(7), &page(1)).unwrap();
    stage(&mut image, &expected, &pages, &next.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    assert_same(&image, &next);
}

#[test]
fn the_next_epoch_is_received_while_the_last_is_applied_but_committed_only_after() {
    let (mut image, model) = committed(MemFiles::new());
    let first = BTreeMap::from([(0, 9), (6, 9)]);
    let (one, expected) = model.checkpoint(&first, 50, false);
    stage(&mut image, &expected, &first, &one.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    assert_same(&image, &one);
    assert!(matches!(
        image.verify_image(),
        Err(ImageError::PreviousNotApplied { epoch: Epoch(2) })
    ));
    let second = BTreeMap::from([(6, 1)]);
    let (two, expected) = one.checkpoint(&second, 60, false);
    stage(&mut image, &expected, &second, &two.device_state).unwrap();
    assert!(!image.apply_some(1).unwrap());
    assert_same(&image, &one);
    assert!(matches!(
        image.verify_and_commit(&expected),
        Err(ImageError::PreviousNotApplied { epoch: Epoch(2) })
    ));
    image.apply().unwrap();
    image.verify_and_commit(&expected).unwrap();
    image.apply().unwrap();
    assert_same(&image, &two);
    image.verify_image().unwrap();
}

#[test]
fn after_a_failed_slot_write_everything_is_refused_until_the_image_is_opened_again() {
    let fuse = Fuse::never();
    let mem = MemFiles::new();
    let (mut image, model) = committed(Crashing::new(mem.clone(), fuse.clone()));
    let (next, expected) = model.checkpoint(&BTreeMap::from([(3, 3)]), 8, false);
    stage(
        &mut image,
        &expected,
        &BTreeMap::from([(3, 3)]),
        &next.device_state,
    )
    .unwrap();
    // Staging is written and synced, then the slot is torn.
    fuse.set(2, 300);
    assert!(matches!(
        image.verify_and_commit(&expected),
        Err(ImageError::Io { .. })
    ));
    assert_eq!(
        image.state(),
        ImageState::Unusable {
            reason: UnusableReason::WriteFailed
        }
    );
    assert!(matches!(image.apply(), Err(ImageError::MustReopen)));
    assert!(matches!(
        image.begin_sync(Session(1)),
        Err(ImageError::MustReopen)
    ));
    assert!(image.device_state().is_err());
    let image = Image::open(mem, limits()).unwrap();
    assert_eq!(image.recovery().damaged_slots, 1);
    assert_same(&image, &model);
}

#[test]
fn old_content_is_kept_for_a_new_session_and_its_digests_survive_a_crash() {
    let mem = MemFiles::new();
    let (mut image, model) = committed(mem.clone());
    image.begin_sync(Session(10)).unwrap();
    drop(image);
    let mut image = Image::open(mem, limits()).unwrap();
    assert_eq!(image.image_digest(), model.image_digest());
    image.begin_sync(Session(10)).unwrap();
    let next_session = Model { session: 10, ..model };
    let pages = BTreeMap::from([(4, 1)]);
    let (next, expected) = Model {
        epoch: 6,
        ..next_session
    }
    .checkpoint(&pages, 3, true);
    stage(&mut image, &expected, &pages, &next.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    image.apply().unwrap();
    assert_same(&image, &next);
}
