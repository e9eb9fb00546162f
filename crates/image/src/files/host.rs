//! Files in a folder of the host, `DIR/VM/`, normally on tmpfs.
//!
//! The folder is only for its owner (mode 0700, files 0600): it holds a guest's memory. One process at a
//! time may use it; a lock on the file `lock` sees to that and ends with the process.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use romulus_types::VmId;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Area, FileName, Files, not_open};
use crate::ImageError;

/// The files of one image in a folder of their own.
#[derive(Debug)]
pub struct HostFiles {
    folder: PathBuf,
    layout: Option<File>,
    commit: Option<File>,
    staging: [Option<File>; 2],
    ram: Vec<Option<File>>,
    _lock: File,
}

impl HostFiles {
    /// Makes the folder `dir/vm` if need be and locks it.
    ///
    /// # Errors
    /// [`ImageError::Folder`] when it cannot be made, [`ImageError::InUse`] when another process has it.
    pub fn create(dir: &Path, vm: &VmId) -> Result<Self, ImageError> {
        let folder = dir.join(vm.as_str());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|source| ImageError::Folder {
                folder: folder.clone(),
                source,
            })?;
        Self::open(dir, vm)
    }

    /// Locks the folder `dir/vm`, which must exist.
    ///
    /// # Errors
    /// [`ImageError::Folder`] when it cannot be opened, [`ImageError::InUse`] when another process has it.
    pub fn open(dir: &Path, vm: &VmId) -> Result<Self, ImageError> {
        let folder = dir.join(vm.as_str());
        let lock = open_file(&folder.join("lock"), true).map_err(|source| ImageError::Folder {
            folder: folder.clone(),
            source,
        })?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ImageError::InUse { folder }),
            Err(TryLockError::Error(source)) => return Err(ImageError::Folder { folder, source }),
        }
        Ok(Self {
            folder,
            layout: None,
            commit: None,
            staging: [None, None],
            ram: Vec::new(),
            _lock: lock,
        })
    }

    /// Where a file lies. A standby maps the one of [`FileName::Ram`].
    pub fn path(&self, name: FileName) -> PathBuf {
        self.folder.join(name.to_string())
    }

    fn file(&self, name: FileName) -> io::Result<&File> {
        let file = match name {
            FileName::Layout => self.layout.as_ref(),
            FileName::Commit => self.commit.as_ref(),
            FileName::Staging(Area::A) => self.staging[0].as_ref(),
            FileName::Staging(Area::B) => self.staging[1].as_ref(),
            FileName::Ram(block) => self.ram.get(usize::from(block.0)).and_then(Option::as_ref),
        };
        file.ok_or_else(|| not_open(name))
    }

    fn place(&mut self, name: FileName) -> &mut Option<File> {
        match name {
            FileName::Layout => &mut self.layout,
            FileName::Commit => &mut self.commit,
            FileName::Staging(Area::A) => &mut self.staging[0],
            FileName::Staging(Area::B) => &mut self.staging[1],
            FileName::Ram(block) => {
                let position = usize::from(block.0);
                if self.ram.len() <= position {
                    self.ram.resize_with(position + 1, || None);
                }
                &mut self.ram[position]
            }
        }
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

impl Files for HostFiles {
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>> {
        match open_file(&self.path(name), false) {
            Ok(file) => {
                let bytes = file.metadata()?.len();
                *self.place(name) = Some(file);
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        let file = open_file(&self.path(name), true)?;
        file.set_len(0)?;
        file.set_len(bytes)?;
        File::open(&self.folder)?.sync_all()?;
        *self.place(name) = Some(file);
        Ok(())
    }

    fn read_at(&self, name: FileName, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file(name)?.read_exact_at(into, offset)
    }

    fn write_at(&mut self, name: FileName, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(name)?.write_all_at(bytes, offset)
    }

    fn punch(&mut self, name: FileName, range: Range<u64>) -> io::Result<()> {
        let file = self.file(name)?;
        let length = range.end - range.start;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, flags, range.start, length) {
            Ok(()) => Ok(()),
            // A file system without holes: zeros do as well, they only cost space.
            Err(Errno::OPNOTSUPP) => write_zeros(file, range),
            Err(error) => Err(error.into()),
        }
    }

    fn cut(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        let file = self.file(name)?;
        if file.metadata()?.len() > bytes {
            file.set_len(bytes)?;
        }
        Ok(())
    }

    fn sync(&mut self, name: FileName) -> io::Result<()> {
        self.file(name)?.sync_data()
    }

    fn next_data(&self, name: FileName, from: u64) -> io::Result<Option<Range<u64>>> {
        let file = self.file(name)?;
        let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        Ok(Some(start..end))
    }

    fn touched_bytes(&self, name: FileName) -> io::Result<u64> {
        Ok(self.file(name)?.metadata()?.blocks() * 512)
    }

    fn remove_all(&mut self) -> io::Result<()> {
        for name in [
            FileName::Layout,
            FileName::Commit,
            FileName::Staging(Area::A),
            FileName::Staging(Area::B),
        ] {
            *self.place(name) = None;
        }
        self.ram.clear();
        // The layout goes first: without it what is left after a crash here is not an image any more.
        remove_if_there(&self.path(FileName::Layout))?;
        std::fs::remove_dir_all(&self.folder)
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn write_zeros(file: &File, range: Range<u64>) -> io::Result<()> {
    static ZEROS: [u8; 65536] = [0; 65536];
    let mut offset = range.start;
    while offset < range.end {
        let length = usize::try_from(range.end - offset)
            .unwrap_or(usize::MAX)
            .min(ZEROS.len());
        file.write_all_at(&ZEROS[..length], offset)?;
        offset += length as u64;
    }
    Ok(())
}
