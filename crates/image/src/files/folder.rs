//! A folder of the host, normally on a tmpfs, with a folder for each VM.
//!
//! A VM's folder is only for its owner (mode 0700, files 0600): it holds a guest's memory. One process at a
//! time may use it; a lock on the file `lock` sees to that and ends with the process.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use romulus_types::VmId;
use rustix::fs::OFlags;

use super::FileName;
use super::shelf::{Claim, Shelf};
use crate::ImageError;

/// Images in a folder, `DIR/VM/NAME`.
#[derive(Clone, Debug)]
pub struct FolderShelf {
    dir: PathBuf,
}

impl FolderShelf {
    /// Images in `dir`, which need not exist.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn folder(&self, vm: &VmId) -> PathBuf {
        self.dir.join(vm.as_str())
    }
}

/// Opens without following a symbolic link: the folder may lie in a place that others can write to.
fn open_file(path: &Path, create: bool) -> io::Result<File> {
    let no_follow = i32::try_from(OFlags::NOFOLLOW.bits()).expect("open flags fit in a C int");
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(no_follow)
        .open(path)
}

fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

impl Shelf for FolderShelf {
    fn claim(&self, vm: &VmId, files: usize) -> Result<Claim, ImageError> {
        let folder = self.folder(vm);
        let failed = |source| ImageError::Folder {
            folder: folder.clone(),
            source,
        };
        if files > 0 {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(failed)?;
        }
        let lock = open_file(&folder.join("lock"), true).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Box::new(lock)),
            Err(TryLockError::WouldBlock) => Err(ImageError::InUse {
                place: folder.display().to_string(),
            }),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }

    fn open(&self, vm: &VmId, name: FileName) -> io::Result<Option<Arc<File>>> {
        match open_file(&self.path(vm, name), false) {
            Ok(file) => Ok(Some(Arc::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&self, vm: &VmId, name: FileName) -> io::Result<Arc<File>> {
        let file = open_file(&self.path(vm, name), true)?;
        file.set_len(0)?;
        File::open(self.folder(vm))?.sync_all()?;
        Ok(Arc::new(file))
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    fn path(&self, vm: &VmId, name: FileName) -> PathBuf {
        self.folder(vm).join(name.to_string())
    }

    fn has(&self, vm: &VmId) -> bool {
        self.folder(vm).exists()
    }

    fn vms(&self) -> io::Result<Vec<VmId>> {
        let mut vms = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir()
                && let Ok(vm) = VmId::new(name)
            {
                vms.push(vm);
            }
        }
        Ok(vms)
    }

    fn remove_all(&self, vm: &VmId) -> io::Result<()> {
        // The layout goes first: without it what is left after a crash here is not an image any more.
        unless_missing(std::fs::remove_file(self.path(vm, FileName::Layout)))?;
        unless_missing(std::fs::remove_dir_all(self.folder(vm)))
    }

    fn size_bytes(&self) -> io::Result<Option<u64>> {
        let status = rustix::fs::statvfs(&self.dir)?;
        Ok(Some(status.f_blocks.saturating_mul(status.f_frsize)))
    }
}
