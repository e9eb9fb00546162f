//! Where the images of a host lie: on a shelf in memory, with a share for their staging, and a folder for staging past that.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use romulus_types::VmId;

use super::shelf::Shelf;
use super::{FileName, Files, HostFiles, Spilling, StagingShare, not_open};
use crate::ImageError;

/// Staging areas that a spill file can be of.
const SPILL_FILES: usize = 2;

/// The files of an image on this host, whose staging spills.
pub type PlacedFiles = Spilling<HostFiles, LateFiles>;

/// Where the images of a host lie. Clones are the same places.
#[derive(Clone, Debug)]
pub struct Places {
    /// Where images lie.
    pub shelf: Arc<dyn Shelf>,
    /// Where staging goes on that does not fit into `share`.
    pub spill: Arc<dyn Shelf>,
    /// Memory for the staging of all images.
    pub share: StagingShare,
}

impl Places {
    /// Removes all that there is of a VM's image; no error when there is nothing.
    ///
    /// # Errors
    /// Whatever the file system or the keeper reports.
    pub fn remove_all(&self, vm: &VmId) -> io::Result<()> {
        self.shelf.remove_all(vm)?;
        self.spill.remove_all(vm)
    }

    pub(crate) fn files(&self, memory: HostFiles, vm: &VmId) -> PlacedFiles {
        let spill = LateFiles {
            shelf: Arc::clone(&self.spill),
            vm: vm.clone(),
            files: None,
        };
        // What lies in memory does not outlive the host either, so that no sync is worth its wait.
        Spilling::new(memory, spill, self.share.clone(), false)
    }
}

/// Files on a shelf where nothing is made or claimed before it is needed: a place that can't be used troubles nobody who does
/// not use it.
#[derive(Debug)]
pub struct LateFiles {
    shelf: Arc<dyn Shelf>,
    vm: VmId,
    files: Option<HostFiles>,
}

impl LateFiles {
    fn made(&self, name: FileName) -> io::Result<&HostFiles> {
        self.files.as_ref().ok_or_else(|| not_open(name))
    }

    fn made_mut(&mut self, name: FileName) -> io::Result<&mut HostFiles> {
        self.files.as_mut().ok_or_else(|| not_open(name))
    }
}

/// What the file system said when a place could not be claimed, if it was that.
fn io_error(error: ImageError) -> io::Error {
    match error {
        ImageError::Folder { source, .. } => source,
        error => io::Error::other(error),
    }
}

impl Files for LateFiles {
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>> {
        if self.files.is_none() && self.shelf.has(&self.vm) {
            let opened = HostFiles::open(Arc::clone(&self.shelf), &self.vm);
            self.files = Some(opened.map_err(io_error)?);
        }
        match &mut self.files {
            Some(files) => files.open(name),
            None => Ok(None),
        }
    }

    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        let files = match &mut self.files {
            Some(files) => files,
            None => {
                let made = HostFiles::create(Arc::clone(&self.shelf), &self.vm, SPILL_FILES);
                self.files.insert(made.map_err(io_error)?)
            }
        };
        files.create(name, bytes)
    }

    fn read_at(&self, name: FileName, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.made(name)?.read_at(name, offset, into)
    }

    fn write_at(&mut self, name: FileName, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.made_mut(name)?.write_at(name, offset, bytes)
    }

    fn punch(&mut self, name: FileName, range: Range<u64>) -> io::Result<()> {
        self.made_mut(name)?.punch(name, range)
    }

    fn cut(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.made_mut(name)?.cut(name, bytes)
    }

    fn sync(&mut self, name: FileName) -> io::Result<()> {
        self.made_mut(name)?.sync(name)
    }

    fn next_data(&self, name: FileName, from: u64) -> io::Result<Option<Range<u64>>> {
        self.made(name)?.next_data(name, from)
    }

    fn touched_bytes(&self, name: FileName) -> io::Result<u64> {
        self.made(name)?.touched_bytes(name)
    }

    fn remove_all(&mut self) -> io::Result<()> {
        // The claim goes with its folder.
        self.files = None;
        self.shelf.remove_all(&self.vm)
    }
}
