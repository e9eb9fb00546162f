//! A guest of an earlier life of the agent, of which nothing can be told.

use std::path::Path;
use std::sync::Arc;

use romulus_image::{FolderShelf, Limits, Places, StagingShare};

use super::*;

fn image_in(dir: &Path, vm: &VmId) -> VmImage {
    let places = Places {
        shelf: Arc::new(FolderShelf::new(dir)),
        spill: Arc::new(FolderShelf::new(dir.join("spill"))),
        share: StagingShare::new(u64::MAX),
    };
    VmImage::open(&places, dir, vm, Limits::default()).expect("a folder")
}

#[test]
fn a_guest_that_may_run_is_not_overwritten_until_it_is_given_up() {
    let dir = tempfile::tempdir().expect("a folder");
    let vm = VmId::new("web").expect("a name");
    std::fs::write(dir.path().join("web.consumed"), "").expect("a mark");
    std::fs::write(dir.path().join("web.machine.json"), "{\"format\": 99}").expect("a description");
    let image = image_in(dir.path(), &vm);
    let mut guest = Guest::new(GuestConfig {
        vm,
        standby: StandbyKind::Cold,
        standbys: Standbys { vmms: Vec::new() },
        launcher: Launcher::Session,
        bridge: None,
        verify_activation: false,
        run_dir: dir.path().join(".run-web"),
    });
    assert!(guest.make_way().is_ok(), "nothing was looked for");
    guest.adopt(&image).expect_err("the machine is not known");
    let refused = guest.make_way().expect_err("its guest may run").to_string();
    assert!(refused.contains("romulus forget web --force"), "{refused}");
    assert!(guest.ensure_known().is_err());
    guest.forget(&image).expect("it was told to");
    assert!(guest.make_way().is_ok());
}
