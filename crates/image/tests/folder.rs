//! An image in a folder of the host.

mod support;

use romulus_image::{Image, ImageError};
use romulus_types::{BlockId, Digest, PageIndex, RamBlock, RamLayout, Session, VmId};
use support::{committed, in_folder, layout, limits, page, vm};

#[test]
fn an_image_in_a_folder_is_private_sparse_locked_and_removed_whole() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::Builder::new()
        .prefix("romulus-image-")
        .tempdir()
        .unwrap();
    let large = RamLayout::new(vec![RamBlock {
        name: "ram".into(),
        bytes: 1 << 32,
    }])
    .unwrap();
    let mut image = Image::create_in(dir.path(), &vm(), large, limits()).unwrap();
    let refused = Image::open_in(dir.path(), &vm(), limits());
    assert!(matches!(refused, Err(ImageError::InUse { .. })));
    let ram = image.ram_path(BlockId(0));
    assert_eq!(
        std::fs::metadata(&ram).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(
        std::fs::metadata(ram.parent().unwrap())
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    image.begin_sync(Session(1)).unwrap();
    let far = PageIndex((1 << 20) - 1);
    image.sync_page(far, &page(3)).unwrap();
    let usage = image.usage().unwrap();
    assert!((4096..1 << 20).contains(&usage.ram_bytes));
    assert_eq!(usage.staging_bytes, 0, "nothing was staged: {usage:?}");
    image.sync_page(far, &page(0)).unwrap();
    assert_eq!(image.usage().unwrap().bytes(), 0);
    assert_eq!(image.image_digest(), Digest(0));
    drop(image);
    let image = Image::open_in(dir.path(), &vm(), limits()).unwrap();
    assert_eq!(image.vm(), &vm());
    image.remove().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(matches!(
        Image::open_in(dir.path(), &vm(), limits()),
        Err(ImageError::Folder { .. })
    ));
}

#[test]
fn a_complete_image_is_never_replaced_and_a_cut_file_is_named() {
    let dir = tempfile::Builder::new()
        .prefix("romulus-image-")
        .tempdir()
        .unwrap();
    let (image, _) = committed(in_folder(dir.path()));
    let ram = image.ram_path(BlockId(1));
    drop(image);
    let again = Image::create_in(dir.path(), &VmId::new("guest").unwrap(), layout(), limits());
    assert!(matches!(again, Err(ImageError::Exists)));
    std::fs::OpenOptions::new()
        .write(true)
        .open(ram)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let opened = Image::open_in(dir.path(), &vm(), limits());
    assert!(matches!(
        opened,
        Err(ImageError::FileLength {
            expected: 12_288,
            found: 4096,
            ..
        })
    ));
}
