//! An image in memory files that a keeper, such as systemd, holds on to.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use romulus_image::{FileName, HostFiles, Image, ImageError, ImageState, KeptShelf, Shelf};
use romulus_types::{BlockId, Epoch, VmId};
use support::{FILES, TestKeeper, assert_same, committed, layout, limits, stage, vm};

fn new_files(shelf: &Arc<dyn Shelf>) -> HostFiles {
    HostFiles::create(Arc::clone(shelf), &vm(), FILES).unwrap()
}

#[test]
fn an_image_outlives_its_process_with_the_commits_that_it_acknowledged_and_none_that_it_did_not() {
    let keeper = TestKeeper::default();
    let (mut image, mut model) = committed(new_files(&keeper.shelf(FILES)));
    for life in 0..5u8 {
        let pages = BTreeMap::from([(u64::from(life), 70 + life), (7, life)]);
        let (next, expected) = model.checkpoint(&pages, 500, false);
        stage(&mut image, &expected, &pages, &next.device_state).unwrap();
        // Dies with a checkpoint that is staged, committed, or applied.
        if life % 3 > 0 {
            image.verify_and_commit(&expected).unwrap();
            model = next;
        }
        if life % 3 > 1 {
            image.apply().unwrap();
        }
        drop(image);
        image = Image::open_on(&keeper.shelf_of_what_is_settled(FILES), &vm(), limits()).unwrap();
        let ImageState::Committed { epoch, .. } = image.state() else {
            panic!("{}", image.state())
        };
        assert_eq!(epoch, Epoch(model.epoch));
        assert_same(&image, &model);
    }
}

#[test]
fn a_keeper_is_waited_for_when_an_image_is_made_and_not_for_a_commit() {
    let keeper = TestKeeper::default();
    let shelf = keeper.shelf(FILES);
    let before = keeper.settled();
    let (mut image, model) = committed(new_files(&shelf));
    assert_eq!(keeper.names().len(), FILES);
    let made = keeper.settled();
    assert!(made > before);
    // Somebody makes another image at the same time.
    let other = VmId::new("other").unwrap();
    shelf.create(&other, FileName::Commit).unwrap();
    let pages = BTreeMap::from([(3, 9)]);
    let (next, expected) = model.checkpoint(&pages, 500, false);
    stage(&mut image, &expected, &pages, &next.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    image.apply().unwrap();
    assert_eq!(keeper.settled(), made);
}

#[test]
fn a_process_that_dies_before_the_keeper_has_every_file_leaves_no_image() {
    for done in 0..=FILES {
        let keeper = TestKeeper::default();
        let shelf = keeper.shelf(FILES);
        // As the image does it, without the wait at the end.
        let mut files = new_files(&shelf);
        for (name, bytes) in support::files_of(&layout()) {
            romulus_image::Files::create(&mut files, name, bytes).unwrap();
        }
        keeper.do_some(done);
        let shelf = keeper.shelf_of_what_is_settled(FILES);
        let opened = Image::open_on(&shelf, &vm(), limits());
        assert!(matches!(opened, Err(ImageError::LayoutDamaged)), "{done} files");
        // And what is there is in nobody's way.
        committed(new_files(&shelf));
        assert_eq!(keeper.names().len(), FILES);
    }
}

#[test]
fn what_a_standby_opens_by_its_path_is_the_images_own_memory() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let keeper = TestKeeper::default();
    let shelf = keeper.shelf(FILES);
    let (image, _) = committed(new_files(&shelf));
    let path = image.ram_path(BlockId(1));
    let file = File::options().read(true).write(true).open(&path).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 12_288);
    file.write_all_at(b"written by a guest", 4096).unwrap();
    assert!(matches!(
        image.verify_image(),
        Err(ImageError::PageDamaged { .. })
    ));
    let before = file.metadata().unwrap().ino();
    drop(image);
    let image = Image::open_on(&keeper.shelf(FILES), &vm(), limits()).unwrap();
    let after = std::fs::metadata(image.ram_path(BlockId(1))).unwrap().ino();
    assert_eq!(
        before, after,
        "a standby that waits shares memory with the next life"
    );
}

#[test]
fn a_removed_image_is_held_by_nobody_and_makes_room() {
    let keeper = TestKeeper::default();
    let shelf = keeper.shelf(FILES);
    let (image, _) = committed(new_files(&shelf));
    assert_eq!(shelf.vms().unwrap(), [vm()]);
    let other = VmId::new("other").unwrap();
    let refused = Image::create_on(&shelf, &other, layout(), limits());
    let Err(ImageError::ShelfFull {
        needed,
        used,
        files_max,
    }) = refused
    else {
        panic!("there is no room")
    };
    assert_eq!((needed, used, files_max), (FILES, FILES, FILES));
    image.remove().unwrap();
    assert!(keeper.names().is_empty() && !shelf.has(&vm()));
    Image::create_on(&shelf, &other, layout(), limits()).unwrap();
    shelf.remove_all(&other).unwrap();
    shelf.remove_all(&other).unwrap();
    assert!(keeper.names().is_empty());
}

#[test]
fn an_image_has_one_user_at_a_time() {
    let keeper = TestKeeper::default();
    let shelf = keeper.shelf(FILES);
    let (image, model) = committed(new_files(&shelf));
    let second = Image::open_on(&shelf, &vm(), limits());
    assert!(matches!(second, Err(ImageError::InUse { .. })));
    drop(image);
    assert_same(&Image::open_on(&shelf, &vm(), limits()).unwrap(), &model);
}

#[test]
fn files_of_others_are_left_where_they_are_and_a_file_that_is_there_twice_is_none() {
    let keeper = TestKeeper::default();
    drop(committed(new_files(&keeper.shelf(FILES))));
    let memfd = || rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut found = keeper.held();
    let twice = "image/guest/commit".to_owned();
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
    found.extend([
        ("stored".to_owned(), memfd()),
        ("image/guest/ram-9".to_owned(), socket.into()),
        (twice.clone(), memfd()),
    ]);
    let (shelf, strangers) = KeptShelf::new(Box::new(keeper.clone()), found, FILES).unwrap();
    assert_eq!(strangers, ["stored", "image/guest/ram-9"]);
    let shelf: Arc<dyn Shelf> = Arc::new(shelf);
    let opened = Image::open_on(&shelf, &vm(), limits());
    assert!(matches!(opened, Err(ImageError::FileLength { found: 0, .. })));
    shelf.settle().unwrap();
    assert!(!keeper.names().contains(&twice));
}
