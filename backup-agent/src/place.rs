//! Where this agent's images lie and what its standbys belong to: as the settings say, or as systemd offers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use romulus_config::{BackupAgent, KeepImages, StandbyUnits};
use romulus_hypervisor::launcher::Launcher;
use romulus_image::{FolderShelf, Keeper, KeptShelf, Places, Shelf, StagingShare};
use romulus_telemetry::FdStore;
use romulus_types::VmId;
use rustix::process::{Resource, getrlimit, setrlimit};
use tracing::{info, warn};

/// The folder for staging that has no room in memory, unless a setting names another.
const SPILL: &str = "spill";

/// Systemd as the keeper of images.
#[derive(Debug)]
struct Systemd(FdStore);

impl Keeper for Systemd {
    fn keep(&self, name: &str, file: &File) -> io::Result<()> {
        self.0.keep(name, file.as_fd())
    }

    fn let_go(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn settle(&self) -> io::Result<()> {
        self.0.barrier()
    }
}

/// The places of the images; without a setting staging spills into a folder in `state_dir`. `inherited` is what systemd handed to
/// this process at its start.
///
/// # Errors
/// As for [`shelf`].
pub fn places(
    settings: &BackupAgent,
    state_dir: &Path,
    inherited: Vec<(String, OwnedFd)>,
) -> anyhow::Result<Places> {
    let spill_dir = settings.spill_dir.clone();
    let spill_dir = spill_dir.unwrap_or_else(|| state_dir.join(SPILL));
    Ok(Places {
        shelf: shelf(settings, inherited)?,
        spill: Arc::new(FolderShelf::new(spill_dir)),
        share: StagingShare::new(settings.staging_max.bytes()),
    })
}

/// The place of the images' memory. `inherited` is what systemd handed to this process at its start.
///
/// # Errors
/// When the settings ask for a fd store and there is none.
fn shelf(settings: &BackupAgent, inherited: Vec<(String, OwnedFd)>) -> anyhow::Result<Arc<dyn Shelf>> {
    let folder = FolderShelf::new(&settings.image_dir);
    let store = match settings.keep_images {
        KeepImages::Folder => None,
        KeepImages::Auto => FdStore::of_this_unit(),
        KeepImages::FdStore => Some(FdStore::of_this_unit().context(
            "keep_images = \"fd-store\", but systemd offers no fd store: the unit needs Type=notify, FileDescriptorStoreMax= and, \
             before systemd 254, the same number in Environment=FDSTORE=",
        )?),
    };
    let Some(store) = store else {
        if !inherited.is_empty() {
            warn!(
                event = "fd_store_unused",
                files = inherited.len(),
                "systemd keeps files for this agent that it does not use (setting keep_images): stopping the unit frees them"
            );
        }
        return Ok(Arc::new(folder));
    };
    for vm in folder.vms().unwrap_or_default() {
        warn!(
            event = "image_unused",
            vm = vm.as_str(),
            dir = %settings.image_dir.display(),
            "an image of this VM lies in image_dir, and is not used as images are in the fd store (setting keep_images)"
        );
    }
    allow_many_files();
    let files_max = store.files_max();
    let found = inherited.len();
    let (shelf, strangers) = KeptShelf::new(Box::new(Systemd(store)), inherited, files_max)
        .context("systemd can't be told about its fd store")?;
    info!(event = "fd_store", found, files_max);
    for name in strangers {
        warn!(
            event = "fd_store_stranger",
            name, "a file in the fd store is no image's"
        );
    }
    Ok(Arc::new(shelf))
}

/// The images alone may have more files than a process may usually open.
fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "the limit of open files can't be raised (LimitNOFILE= of the unit)");
    }
}

/// What starts the standbys of a VM.
pub fn launcher(units: StandbyUnits, vm: &VmId) -> Launcher {
    let by_systemd =
        || std::env::var_os("NOTIFY_SOCKET").is_some() && romulus_telemetry::systemd::is_running();
    let scope = match units {
        StandbyUnits::Scope => true,
        StandbyUnits::None => false,
        StandbyUnits::Auto => by_systemd(),
    };
    if scope {
        Launcher::Scope {
            vm: vm.as_str().to_owned(),
        }
    } else {
        Launcher::Session
    }
}
