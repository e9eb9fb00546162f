//! The files of one image on this host, wherever its [`Shelf`] has them.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use romulus_types::VmId;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::shelf::{Claim, Shelf};
use super::{Area, FileName, Files, not_open};
use crate::ImageError;

type Place = Option<Arc<File>>;

/// The files of one image on this host.
pub struct HostFiles {
    shelf: Arc<dyn Shelf>,
    vm: VmId,
    layout: Place,
    commit: Place,
    staging: [Place; 2],
    ram: Vec<Place>,
    in_memory: bool,
    /// Files of this image were made that the shelf's keeper may not have yet.
    unsettled: bool,
    _claim: Claim,
}

/// What statfs(2) says of the file systems in memory: tmpfs, which memory files lie on, too, and that of huge pages
/// (`include/uapi/linux/magic.h`).
const MEMORY_MAGICS: [u64; 2] = [0x0102_1994, 0x9584_58f6];

/// Whether a file lies on one of them; not, when that can't be found out.
fn lies_in_memory(file: &File) -> bool {
    let kind = rustix::fs::fstatfs(file).map(|statfs| statfs.f_type.cast_unsigned());
    kind.is_ok_and(|kind| MEMORY_MAGICS.contains(&kind))
}

impl HostFiles {
    /// Claims a place for the `files` files of a VM's image that is to be made.
    ///
    /// # Errors
    /// [`ImageError::Folder`] when it cannot be made, [`ImageError::ShelfFull`] when there is no room,
    /// [`ImageError::InUse`] when another process has it.
    pub fn create(shelf: Arc<dyn Shelf>, vm: &VmId, files: usize) -> Result<Self, ImageError> {
        let claim = shelf.claim(vm, files)?;
        Ok(Self {
            shelf,
            vm: vm.clone(),
            layout: None,
            commit: None,
            staging: [None, None],
            ram: Vec::new(),
            in_memory: false,
            unsettled: false,
            _claim: claim,
        })
    }

    /// Claims the files of an image that was made before.
    ///
    /// # Errors
    /// [`ImageError::Folder`] when they cannot be had, [`ImageError::InUse`] when another process has them.
    pub fn open(shelf: Arc<dyn Shelf>, vm: &VmId) -> Result<Self, ImageError> {
        Self::create(shelf, vm, 0)
    }

    /// Where a file can be opened by another process. A standby maps the one of [`FileName::Ram`].
    pub fn path(&self, name: FileName) -> PathBuf {
        self.shelf.path(&self.vm, name)
    }

    /// Whether the commit slots lie in memory, and so with them all files, and not on a disk that could be waited for.
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }

    fn put(&mut self, name: FileName, file: Arc<File>) {
        if name == FileName::Commit {
            self.in_memory = lies_in_memory(&file);
        }
        *self.place(name) = Some(file);
    }

    fn file(&self, name: FileName) -> io::Result<&File> {
        let file = match name {
            FileName::Layout => self.layout.as_deref(),
            FileName::Commit => self.commit.as_deref(),
            FileName::Staging(Area::A) => self.staging[0].as_deref(),
            FileName::Staging(Area::B) => self.staging[1].as_deref(),
            FileName::Ram(block) => self.ram.get(usize::from(block.0)).and_then(Option::as_deref),
        };
        file.ok_or_else(|| not_open(name))
    }

    fn place(&mut self, name: FileName) -> &mut Place {
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

impl fmt::Debug for HostFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "files of {} on {:?}", self.vm, self.shelf)
    }
}

impl Files for HostFiles {
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>> {
        let Some(file) = self.shelf.open(&self.vm, name)? else {
            return Ok(None);
        };
        let bytes = file.metadata()?.len();
        self.put(name, file);
        Ok(Some(bytes))
    }

    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.unsettled = true;
        let file = self.shelf.create(&self.vm, name)?;
        file.set_len(bytes)?;
        self.put(name, file);
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
        self.file(name)?.sync_data()?;
        // Not for what is made of others meanwhile: a commit would wait for the keeper.
        if self.unsettled {
            self.shelf.settle()?;
            self.unsettled = false;
        }
        Ok(())
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
        self.shelf.remove_all(&self.vm)
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
