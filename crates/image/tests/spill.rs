//! Staging that spills: the commit is the same, at whatever step the process dies, and memory keeps to its share.
#![forbid(unsafe_code)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use romulus_image::{
    Crashing, FileName, Files, FolderShelf, Fuse, HostFiles, Image, ImageError, MemFiles, Places, Spilling,
    StagingShare,
};
use romulus_types::{PAGE_BYTES, Session};
use support::small_disk::SmallDisk;
use support::{Model, assert_same, committed, limits, stage, vm};

type Crash = Spilling<Crashing<MemFiles>, Crashing<MemFiles>>;

/// A share of a page and a half: every checkpoint here spills.
const SHARE: u64 = PAGE_BYTES as u64 * 3 / 2;

/// A disk of two media, which outlive the process.
struct Disk {
    memory: MemFiles,
    spill: MemFiles,
}

impl Disk {
    fn files(&self, fuse: &Fuse, share: &StagingShare) -> Crash {
        Spilling::new(
            Crashing::new(self.memory.clone(), fuse.clone()),
            Crashing::new(self.spill.clone(), fuse.clone()),
            share.clone(),
            true,
        )
    }
}

fn checkpoints() -> [BTreeMap<u64, u8>; 3] {
    [
        BTreeMap::from([(0, 11), (1, 12), (4, 0), (5, 13), (6, 14)]),
        BTreeMap::from([(3, 21)]),
        BTreeMap::from([(0, 31), (1, 32), (2, 33), (3, 34), (5, 35), (7, 36)]),
    ]
}

fn commit<F: Files>(
    image: &mut Image<F>,
    model: &Model,
    pages: &BTreeMap<u64, u8>,
) -> Result<Model, ImageError> {
    let (next, expected) = model.checkpoint(pages, 3000, false);
    stage(image, &expected, pages, &next.device_state)?;
    image.verify_and_commit(&expected)?;
    image.apply()?;
    Ok(next)
}

#[test]
fn whatever_step_a_process_that_spills_dies_at_a_whole_commit_stands() {
    let (mut step, mut died) = (0, 0);
    loop {
        let disk = Disk {
            memory: MemFiles::new(),
            spill: MemFiles::new(),
        };
        let (fuse, share) = (Fuse::never(), StagingShare::new(SHARE));
        let (mut image, mut model) = committed(disk.files(&fuse, &share));
        fuse.set(step, u16::try_from(step * 370 % 1001).expect("small"));
        let mut coming = model.clone();
        for pages in checkpoints() {
            coming = model.checkpoint(&pages, 3000, false).0;
            match commit(&mut image, &model, &pages) {
                Ok(next) => model = next,
                Err(_) => break,
            }
        }
        let blown = fuse.is_blown();
        drop(image);
        assert_eq!((share.used_bytes(), share.spilled_bytes()), (0, 0), "step {step}");
        let share = StagingShare::new(SHARE);
        let mut image = Image::open(disk.files(&Fuse::never(), &share), limits()).expect("it can be opened");
        image.apply().expect("a commit stands");
        if image.image_digest() == coming.image_digest() {
            model = coming;
        }
        assert_same(&image, &model);
        // And it goes on.
        let next = commit(&mut image, &model, &checkpoints()[2]).expect("the next one");
        assert_same(&image, &next);
        if !blown {
            break;
        }
        died += 1;
        step += 1;
    }
    assert!(died > 30, "{died} steps");
}

#[test]
fn memory_keeps_to_its_share_and_gets_back_what_is_not_needed() {
    let (memory, spill) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let share = StagingShare::new(SHARE);
    let files = |share: &StagingShare| {
        Spilling::new(
            HostFiles::create(Arc::new(FolderShelf::new(memory.path())), &vm(), 6).unwrap(),
            HostFiles::create(Arc::new(FolderShelf::new(spill.path())), &vm(), 2).unwrap(),
            share.clone(),
            false,
        )
    };
    let (mut image, mut model) = committed(files(&share));
    let mut spilled = 0;
    for pages in checkpoints() {
        model = commit(&mut image, &model, &pages).unwrap();
        assert!(share.used_bytes() <= SHARE, "{}", share.used_bytes());
        spilled = spilled.max(share.spilled_bytes());
        assert_same(&image, &model);
    }
    assert!(spilled > SHARE, "{spilled}");
    assert!(!image.files().is_ready(1 << 20), "what is next may be spilled");
    drop(image);
    assert_eq!((share.used_bytes(), share.spilled_bytes()), (0, 0));
    let mut image = Image::open(files(&share), limits()).unwrap();
    image.apply().unwrap();
    assert_same(&image, &model);
    // With room again nothing is spilled, from the area's next checkpoint on.
    drop(image);
    let wide = StagingShare::new(1 << 30);
    let mut image = Image::open(files(&wide), limits()).unwrap();
    for _ in 0..2 {
        model = commit(&mut image, &model, &checkpoints()[0]).unwrap();
    }
    assert_eq!(wide.spilled_bytes(), 0);
    assert!(image.files().is_ready(1 << 20));
    assert!(!image.files().is_ready(100), "more than that is given back first");
    assert_same(&image, &model);
    image.remove().unwrap();
    assert_eq!(wide.used_bytes(), 0);
    assert!(!spill.path().join(vm().as_str()).exists());
}

#[test]
fn a_full_spill_disk_ends_the_checkpoint_that_needed_it_by_name_and_hurts_no_other_image() {
    let share = StagingShare::new(SHARE);
    let disk = SmallDisk::new(1 << 30);
    let files = || Spilling::new(MemFiles::new(), disk.folder(), share.clone(), false);
    let (mut first, first_model) = committed(files());
    let (mut second, second_model) = committed(files());
    let before = disk.used_bytes();
    disk.resize(before + PAGE_BYTES as u64 * 5);
    // Most of its pages are spilled, and there is no room for them.
    let large = &checkpoints()[2];
    let error = commit(&mut first, &first_model, large).expect_err("there is no room");
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(source) = cause {
        words = format!("{words}: {source}");
        cause = source.source();
    }
    for word in [
        "cannot write staging-",
        "staging_max",
        "spill_dir",
        "no room (a test)",
    ] {
        assert!(words.contains(word), "{words}");
    }
    first.discard_staging();
    first.release_staging().unwrap();
    assert_eq!(disk.used_bytes(), before, "what it took is given back");
    // Its last commit stands, and it takes checkpoints that have room.
    assert_same(&first, &first_model);
    let small = BTreeMap::from([(3, 21)]);
    let next = commit(&mut first, &first_model, &small).expect("there is room for this");
    assert_same(&first, &next);
    // The other image spills as before.
    let next = commit(&mut second, &second_model, &BTreeMap::from([(3, 21), (5, 22)])).expect("it has room");
    assert_same(&second, &next);
    assert!(share.spilled_ever_bytes() > 0);
}

#[test]
fn what_may_be_committed_is_not_given_back_when_its_slot_can_not_be_synced() {
    let pages = &checkpoints()[2];
    let staged = |disk: &SmallDisk| {
        let files = disk.folder();
        let (mut image, model) = committed(files.clone());
        let before = disk.used_bytes();
        let (next, expected) = model.checkpoint(pages, 3000, false);
        stage(&mut image, &expected, pages, &next.device_state).unwrap();
        (image, files, next, expected, before)
    };
    let disk = SmallDisk::new(1 << 30);
    let (mut image, _, _, expected, before) = staged(&disk);
    image.verify_and_commit(&expected).unwrap();
    let commit_bytes = disk.used_bytes() - before;

    let disk = SmallDisk::new(1 << 30);
    let (mut image, files, next, expected, before) = staged(&disk);
    disk.resize(before + commit_bytes);
    image
        .verify_and_commit(&expected)
        .expect_err("the slot is written, and its sync fails");
    image.discard_staging();
    assert!(matches!(image.release_staging(), Err(ImageError::MustReopen)));
    drop(image);
    disk.resize(1 << 30);
    let image = Image::open(files, limits()).unwrap();
    assert!(image.recovery().redone);
    assert_same(&image, &next);
}

#[test]
fn nothing_is_made_in_the_folder_for_spill_before_it_is_needed() {
    let (memory, spill) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let spill = spill.path().join("made when needed");
    let places = |bytes_max| Places {
        shelf: Arc::new(FolderShelf::new(memory.path())),
        spill: Arc::new(FolderShelf::new(&spill)),
        share: StagingShare::new(bytes_max),
    };
    let image = Image::create_at(&places(1 << 20), &vm(), support::layout(), limits()).unwrap();
    drop(image);
    assert!(!spill.exists());
    let narrow = places(SHARE);
    let mut image = Image::open_at(&narrow, &vm(), limits()).unwrap();
    image.begin_sync(Session(9)).unwrap();
    let model = Model {
        session: 9,
        ..Model::default()
    };
    let pages = &checkpoints()[2];
    let (next, expected) = model.checkpoint(pages, 3000, true);
    stage(&mut image, &expected, pages, &next.device_state).unwrap();
    image.verify_and_commit(&expected).unwrap();
    assert!(image.files().spilled_bytes() > SHARE && narrow.share.used_bytes() <= SHARE);
    assert_eq!(narrow.share.spilled_bytes(), image.files().spilled_bytes());
    assert!(spill.join(vm().as_str()).exists());
    // Not applied yet: another life of the agent does it, from both places.
    drop(image);
    let image = Image::open_at(&narrow, &vm(), limits()).unwrap();
    assert!(image.recovery().redone);
    assert_same(&image, &next);
    drop(image);
    narrow.remove_all(&vm()).unwrap();
    assert!(!spill.join(vm().as_str()).exists() && !memory.path().join(vm().as_str()).exists());
}

#[test]
fn an_area_that_is_cut_reads_as_any_file_would() {
    let staging = FileName::Staging(romulus_image::Area::A);
    let (mut plain, share) = (MemFiles::new(), StagingShare::new(100));
    let mut spilling = Spilling::new(MemFiles::new(), MemFiles::new(), share.clone(), false);
    plain.create(staging, 0).unwrap();
    spilling.create(staging, 0).unwrap();
    let bytes: Vec<u8> = (0..200).collect();
    for (write_at, cut_to) in [
        (0, 150),
        (150, 120),
        (100, 90),
        (90, 300),
        (40, 10),
        (0, 0),
        (30, 20),
    ] {
        for files in [&mut plain as &mut dyn Files, &mut spilling] {
            files.write_at(staging, write_at, &bytes).unwrap();
            files.cut(staging, cut_to).unwrap();
        }
        let length = plain.open(staging).unwrap().unwrap();
        let bytes = usize::try_from(length).unwrap();
        let mut read = [vec![0; bytes], vec![0; bytes]];
        plain.read_at(staging, 0, &mut read[0]).unwrap();
        spilling.read_at(staging, 0, &mut read[1]).unwrap();
        assert_eq!(read[0], read[1], "written at {write_at}, cut to {cut_to}");
        assert!(share.used_bytes() <= 100);
    }
}
