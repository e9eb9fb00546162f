//! Where the files of images lie: one way to open them by name, and several places.
//!
//! ```text
//!   Image ──► HostFiles ──► Shelf ──┬── FolderShelf   DIR/VM/NAME, normally on a tmpfs
//!                                   └── KeptShelf     memory files without a name of their own; whoever started us keeps them
//! ```

use std::any::Any;
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use romulus_types::VmId;

use super::FileName;
use crate::ImageError;

/// The right to use one VM's files; given back when it is dropped.
pub type Claim = Box<dyn Any + Send + Sync>;

/// A place for the files of many images.
pub trait Shelf: Debug + Send + Sync {
    /// Claims the files of a VM for the caller alone, which may come to `files` more than there are now.
    ///
    /// # Errors
    /// [`ImageError::InUse`] when somebody has them, [`ImageError::ShelfFull`], [`ImageError::Folder`].
    fn claim(&self, vm: &VmId, files: usize) -> Result<Claim, ImageError>;

    /// Opens a file for reading and writing; `None` when there is none of this name.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn open(&self, vm: &VmId, name: FileName) -> io::Result<Option<Arc<File>>>;

    /// Makes an empty file, in the place of one of the same name.
    ///
    /// # Errors
    /// Whatever the file system or the keeper reports.
    fn create(&self, vm: &VmId, name: FileName) -> io::Result<Arc<File>>;

    /// Waits until every file that was made is where it survives us.
    ///
    /// # Errors
    /// Whatever the keeper reports.
    fn settle(&self) -> io::Result<()>;

    /// Where another process of this host can open a file of an image that is open.
    fn path(&self, vm: &VmId, name: FileName) -> PathBuf;

    /// Whether there is any file of this VM.
    fn has(&self, vm: &VmId) -> bool;

    /// The VMs that have files here.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn vms(&self) -> io::Result<Vec<VmId>>;

    /// Removes all files of a VM; no error when there are none.
    ///
    /// # Errors
    /// Whatever the file system or the keeper reports.
    fn remove_all(&self, vm: &VmId) -> io::Result<()>;

    /// How much the place can hold, in bytes; `None` when only the host's memory limits it.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn size_bytes(&self) -> io::Result<Option<u64>>;
}
