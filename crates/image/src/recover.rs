//! Making an image, and opening one after a crash.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use romulus_types::{Digest, RamLayout, VmId};

use crate::digests::DigestTable;
use crate::error::Named;
use crate::files::{Area, FileName, Files, FolderShelf, HostFiles, PlacedFiles, Places, Shelf};
use crate::image::{Committed, Phase};
use crate::memory::{apply_pages, block_ids, digest_all, sync_blocks};
use crate::slot::{self, COMMIT_FILE_BYTES, CommitRecord, Slot, Verdict};
use crate::staging::{self, Contents};
use crate::window::Window;
use crate::{Image, ImageError, Limits, UnusableReason, layout_file};

/// What [`Image::open`] found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// A commit was complete but not applied, and has been applied now.
    pub redone: bool,
    /// Commit slots that were torn or damaged: one after a crash in the middle of writing it. When no such
    /// crash was possible, a commit that was acknowledged may be lost with it.
    pub damaged_slots: u8,
}

/// Files of an image besides one for each RAM block.
const FILES_BESIDES_RAM: usize = 4;

impl Image<HostFiles> {
    /// [`create`](Self::create) on a shelf.
    ///
    /// # Errors
    /// As for [`create`](Self::create); [`ImageError::Folder`], [`ImageError::ShelfFull`], [`ImageError::InUse`].
    pub fn create_on(
        shelf: &Arc<dyn Shelf>,
        vm: &VmId,
        layout: RamLayout,
        limits: Limits,
    ) -> Result<Self, ImageError> {
        let files = FILES_BESIDES_RAM + layout.blocks().len();
        Self::create(
            HostFiles::create(Arc::clone(shelf), vm, files)?,
            vm,
            layout,
            limits,
        )
    }

    /// [`open`](Self::open) on a shelf.
    ///
    /// # Errors
    /// As for [`open`](Self::open); [`ImageError::Folder`], [`ImageError::InUse`].
    pub fn open_on(shelf: &Arc<dyn Shelf>, vm: &VmId, limits: Limits) -> Result<Self, ImageError> {
        Self::open(HostFiles::open(Arc::clone(shelf), vm)?, limits)
    }

    /// [`create`](Self::create) in the folder `dir/vm`.
    ///
    /// # Errors
    /// As for [`create_on`](Self::create_on).
    pub fn create_in(dir: &Path, vm: &VmId, layout: RamLayout, limits: Limits) -> Result<Self, ImageError> {
        Self::create_on(&folder(dir), vm, layout, limits)
    }

    /// [`open`](Self::open) in the folder `dir/vm`.
    ///
    /// # Errors
    /// As for [`open_on`](Self::open_on).
    pub fn open_in(dir: &Path, vm: &VmId, limits: Limits) -> Result<Self, ImageError> {
        Self::open_on(&folder(dir), vm, limits)
    }
}

impl Image<PlacedFiles> {
    /// [`create`](Self::create) in the places of this host.
    ///
    /// # Errors
    /// As for [`create_on`](Image::create_on).
    pub fn create_at(
        places: &Places,
        vm: &VmId,
        layout: RamLayout,
        limits: Limits,
    ) -> Result<Self, ImageError> {
        let files = FILES_BESIDES_RAM + layout.blocks().len();
        let memory = HostFiles::create(Arc::clone(&places.shelf), vm, files)?;
        Self::create(places.files(memory, vm), vm, layout, limits)
    }

    /// [`open`](Self::open) in the places of this host.
    ///
    /// # Errors
    /// As for [`open_on`](Image::open_on).
    pub fn open_at(places: &Places, vm: &VmId, limits: Limits) -> Result<Self, ImageError> {
        let memory = HostFiles::open(Arc::clone(&places.shelf), vm)?;
        Self::open(places.files(memory, vm), limits)
    }
}

fn folder(dir: &Path) -> Arc<dyn Shelf> {
    Arc::new(FolderShelf::new(dir))
}

impl<F: Files> Image<F> {
    /// Makes a new image, all zeros and unusable. What an earlier attempt left half done is replaced.
    ///
    /// # Errors
    /// [`ImageError::Exists`] when there is a complete one, [`ImageError::Version`] when another program made
    /// it, [`ImageError::Io`].
    pub fn create(mut files: F, vm: &VmId, layout: RamLayout, limits: Limits) -> Result<Self, ImageError> {
        match layout_file::read(&mut files) {
            Ok(_) => return Err(ImageError::Exists),
            Err(ImageError::LayoutDamaged) => {}
            Err(error) => return Err(error),
        }
        let create = |files: &mut F, file, bytes| files.create(file, bytes).named("create", file);
        create(&mut files, FileName::Layout, 0)?;
        for (id, block) in block_ids(&layout).zip(layout.blocks()) {
            create(&mut files, FileName::Ram(id), block.bytes)?;
        }
        create(&mut files, FileName::Staging(Area::A), 0)?;
        create(&mut files, FileName::Staging(Area::B), 0)?;
        create(&mut files, FileName::Commit, COMMIT_FILE_BYTES)?;
        let bytes = layout_file::encode(vm, &layout);
        let layout_digest = layout_file::digest(&bytes);
        let mut image = Self::assemble(files, vm.clone(), layout, layout_digest, limits);
        image.write_unusable_slots()?;
        image
            .files
            .write_at(FileName::Layout, 0, &bytes)
            .named("write", FileName::Layout)?;
        image
            .files
            .sync(FileName::Layout)
            .named("sync", FileName::Layout)?;
        Ok(image)
    }

    /// Opens an image, after a crash or not. The newest valid commit slot decides; a commit that was not
    /// applied yet is applied now; then the digest of all memory is computed from the files. Whatever is not as
    /// it was committed makes the image unusable, durably, and [`state`](Self::state) says why. Reads all memory
    /// that the guest has touched.
    ///
    /// # Errors
    /// [`ImageError::LayoutDamaged`], [`ImageError::FileLength`], [`ImageError::Version`]: not an image that
    /// this program can use. [`ImageError::Io`].
    pub fn open(mut files: F, limits: Limits) -> Result<Self, ImageError> {
        let (vm, layout, layout_digest) = layout_file::read(&mut files)?;
        for (id, block) in block_ids(&layout).zip(layout.blocks()) {
            open_file(&mut files, FileName::Ram(id), Some(block.bytes))?;
        }
        open_file(&mut files, FileName::Commit, Some(COMMIT_FILE_BYTES))?;
        let staging_bytes = [
            open_file(&mut files, FileName::Staging(Area::A), None)?,
            open_file(&mut files, FileName::Staging(Area::B), None)?,
        ];
        let slots = slot::read(&files, layout_digest)?;
        let mut image = Self::assemble(files, vm, layout, layout_digest, limits);
        image.recovery.damaged_slots = slots.damaged;
        let Some(Slot {
            sequence, verdict, ..
        }) = slots.standing
        else {
            return image.finish_unusable(UnusableReason::SlotsDamaged);
        };
        image.sequence = sequence;
        match verdict {
            // Written again: a crash between the two writes left an old commit in the other slot.
            Verdict::Unusable => image.finish_unusable(UnusableReason::Marked),
            Verdict::Committed { record, applied } => {
                let file_bytes = staging_bytes[usize::from(record.area == Area::B)];
                image.recover_commit(record, applied, file_bytes)
            }
        }
    }

    fn recover_commit(
        mut self,
        record: CommitRecord,
        applied: bool,
        file_bytes: u64,
    ) -> Result<Self, ImageError> {
        let contents = match staging::scan(&self.files, &record, file_bytes, self.layout.page_count()) {
            Ok(contents) => contents,
            Err(ImageError::StagingDamaged { .. }) => {
                return self.finish_unusable(UnusableReason::StagingDamaged);
            }
            Err(error) => return Err(error),
        };
        if !applied {
            self.redo(&record, &contents)?;
        }
        self.table = digest_all(&self.files, &self.layout)?;
        let (expected, found) = (record.image_digest, self.image_digest());
        if found != expected {
            return self.finish_unusable(UnusableReason::DigestMismatch { expected, found });
        }
        if !applied {
            self.write_slot(Verdict::Committed {
                record,
                applied: true,
            })?;
            self.recovery.redone = true;
        }
        self.phase = Phase::Committed(Box::new(Committed {
            record,
            contents,
            pages_written: None,
            blocks_touched: BTreeSet::new(),
        }));
        Ok(self)
    }

    fn redo(&mut self, record: &CommitRecord, contents: &Contents) -> Result<(), ImageError> {
        let file = FileName::Staging(record.area);
        let mut window = Window::new(file, record.staging_bytes);
        let mut touched = BTreeSet::new();
        apply_pages(
            &mut self.files,
            &self.layout,
            contents.pages(),
            &mut window,
            file,
            &mut touched,
        )?;
        sync_blocks(&mut self.files, touched)
    }

    fn finish_unusable(mut self, reason: UnusableReason) -> Result<Self, ImageError> {
        self.write_unusable_slots()?;
        self.table = digest_all(&self.files, &self.layout)?;
        self.phase = Phase::Unusable(reason);
        Ok(self)
    }

    fn assemble(files: F, vm: VmId, layout: RamLayout, layout_digest: Digest, limits: Limits) -> Self {
        let table = DigestTable::new(layout.page_count());
        Self {
            files,
            vm,
            layout,
            limits,
            layout_digest,
            sequence: 0,
            table,
            phase: Phase::Unusable(UnusableReason::Marked),
            staging: None,
            recovery: Recovery::default(),
            write_failed: false,
            write_buffer: Vec::new(),
            read_buffer: Vec::new(),
        }
    }
}

/// Opens a file that must be there, and checks its length where that is known; returns the length.
fn open_file<F: Files>(files: &mut F, file: FileName, expected: Option<u64>) -> Result<u64, ImageError> {
    let found = files.open(file).named("open", file)?;
    match (found, expected) {
        (Some(found), None) => Ok(found),
        (Some(found), Some(expected)) if found == expected => Ok(found),
        (found, expected) => Err(ImageError::FileLength {
            file,
            expected: expected.unwrap_or(0),
            found: found.unwrap_or(0),
        }),
    }
}
