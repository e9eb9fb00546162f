//! Everything that can go wrong with an image, by name.

use std::io;
use std::path::PathBuf;

use romulus_types::{Digest, Epoch, PageIndex, Session};

use crate::ImageState;
use crate::files::FileName;

/// Why an operation on an image was refused or failed.
///
/// Unless a variant says otherwise nothing has changed and the last commit stands.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The image's folder cannot be made, opened or removed.
    #[error("the image folder {} cannot be used: check that it exists and belongs to the agent", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the file system said.
        #[source]
        source: io::Error,
    },
    /// Another process has the image open.
    #[error("the image in {place} is in use: stop the other agent first")]
    InUse {
        /// Where it lies.
        place: String,
    },
    /// The place of the images holds no more files.
    #[error(
        "the image needs {needed} files, and the fd store has room for {files_max}, of which {used} are taken: raise \
         FileDescriptorStoreMax= (and FDSTORE) in the agent's unit"
    )]
    ShelfFull {
        /// Files of this image.
        needed: usize,
        /// Files of all images now.
        used: usize,
        /// Most files.
        files_max: usize,
    },
    /// There is a valid image already.
    #[error("there is an image already: open it, or remove it first")]
    Exists,
    /// A file operation failed. What was being written may be there in part; the image stays redo-safe.
    #[error("cannot {action} {file}: check the space that is left where the images lie")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        file: FileName,
        /// What the file system said.
        #[source]
        source: io::Error,
    },
    /// The file `layout` is missing or damaged: the image was never completed, or bad memory hit it.
    #[error("the image has no valid layout: remove it, it is filled again by a full copy")]
    LayoutDamaged,
    /// Written by another version of this program.
    #[error(
        "{file} has format version {found}, this program knows {known}: remove the image, or run the program that wrote it"
    )]
    Version {
        /// The file.
        file: FileName,
        /// Its version.
        found: u32,
        /// The version known here.
        known: u32,
    },
    /// A file is missing or has another length than the layout or the commit slots say.
    #[error(
        "{file} has {found} bytes instead of {expected}: remove the image, it is filled again by a full copy"
    )]
    FileLength {
        /// The file.
        file: FileName,
        /// Length by the layout, in bytes.
        expected: u64,
        /// Length found, in bytes; 0 when the file is missing.
        found: u64,
    },
    /// A commit slot or a page could not be written, so it is not known what the files hold.
    #[error("an earlier write failed half way: open the image again to find out which commit stands")]
    MustReopen,
    /// Not possible in this state.
    #[error("cannot {action} while the image is {state}")]
    WrongState {
        /// What was tried.
        action: &'static str,
        /// The state.
        state: ImageState,
    },
    /// A checkpoint is being staged already.
    #[error("epoch {epoch} is being staged: commit or discard it first")]
    StagingInProgress {
        /// The epoch being staged.
        epoch: Epoch,
    },
    /// Nothing is being staged.
    #[error("no checkpoint is being staged")]
    NoStaging,
    /// The checkpoint committed before has not been applied yet.
    #[error("epoch {epoch} is committed but not applied: apply it first")]
    PreviousNotApplied {
        /// The epoch to apply.
        epoch: Epoch,
    },
    /// A message of another session.
    #[error("this is of session {found}, the image belongs to session {expected}")]
    SessionMismatch {
        /// The image's session.
        expected: Session,
        /// The session named by the peer.
        found: Session,
    },
    /// An epoch that is committed already, or epoch 0.
    #[error("epoch {found} is replayed: epoch {last} is committed already")]
    EpochReplayed {
        /// The last commit.
        last: Epoch,
        /// The epoch named by the peer.
        found: Epoch,
    },
    /// An epoch that leaves one out.
    #[error("epoch {found} cannot follow epoch {last}: the ones between are missing")]
    EpochSkipped {
        /// The last commit.
        last: Epoch,
        /// The epoch named by the peer.
        found: Epoch,
    },
    /// The commit record is for another epoch than the one that was staged. The staging is discarded.
    #[error("the commit record is for epoch {found}, epoch {staged} was staged")]
    EpochMismatch {
        /// The epoch staged.
        staged: Epoch,
        /// The epoch in the record.
        found: Epoch,
    },
    /// The commit record says "first of its session" where it is not, or the other way round. The staging is
    /// discarded.
    #[error("the commit record says first = {found}, but the image is {state}")]
    FirstMismatch {
        /// What the record says.
        found: bool,
        /// The image's state.
        state: ImageState,
    },
    /// A page that the guest does not have.
    #[error("page {} is not one of the guest's {page_count} pages", page.0)]
    PageOutOfRange {
        /// The page.
        page: PageIndex,
        /// Pages of the guest.
        page_count: u64,
    },
    /// The same page twice in one checkpoint.
    #[error("page {} was staged twice in one checkpoint", page.0)]
    PageTwice {
        /// The page.
        page: PageIndex,
    },
    /// The checkpoint is larger than allowed.
    #[error(
        "the checkpoint does not fit in staging_bytes_max = {limit_bytes} bytes: raise it, or let epochs be shorter"
    )]
    StagingFull {
        /// The limit, in bytes.
        limit_bytes: u64,
    },
    /// The device state is larger than allowed.
    #[error("the device state is over device_state_bytes_max = {limit_bytes} bytes")]
    DeviceStateTooLarge {
        /// The limit, in bytes.
        limit_bytes: u64,
    },
    /// Pages are missing or surplus. The staging is discarded.
    #[error("{found} pages were received, the commit record lists {expected}")]
    PageCount {
        /// Pages by the record.
        expected: u64,
        /// Pages staged.
        found: u64,
    },
    /// The pages are not those that were sent. The staging is discarded.
    #[error("the received pages have digest {found}, the commit record says {expected}")]
    PagesDigest {
        /// Digest by the record.
        expected: Digest,
        /// Digest of what was staged.
        found: Digest,
    },
    /// The device state is too short or too long. The staging is discarded.
    #[error("{found} bytes of device state were received, the commit record says {expected}")]
    DeviceStateBytes {
        /// Bytes by the record.
        expected: u64,
        /// Bytes staged.
        found: u64,
    },
    /// The device state is not what was sent. The staging is discarded.
    #[error("the received device state has digest {found}, the commit record says {expected}")]
    DeviceStateDigest {
        /// Digest by the record.
        expected: Digest,
        /// Digest of what was staged.
        found: Digest,
    },
    /// With this checkpoint applied the image would not be the guest's memory. The staging is discarded.
    #[error(
        "the image would have digest {found}, the commit record says {expected}: memory must be copied again"
    )]
    ImageDigest {
        /// Digest by the record.
        expected: Digest,
        /// Digest computed here.
        found: Digest,
    },
    /// What lies in the staging file is not what was committed: bad memory, or somebody else wrote to it.
    #[error("{file} is damaged at byte {offset}: the image must be copied again")]
    StagingDamaged {
        /// The file.
        file: FileName,
        /// Where, in bytes.
        offset: u64,
    },
    /// A page of the memory files is not what was committed: bad memory, or somebody else wrote to it.
    #[error("page {} is not what was committed: the image must be copied again", page.0)]
    PageDamaged {
        /// The first such page.
        page: PageIndex,
    },
}

/// Names the file and the action of a failed file operation.
pub(crate) trait Named<T> {
    fn named(self, action: &'static str, file: FileName) -> Result<T, ImageError>;
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, action: &'static str, file: FileName) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::Io { action, file, source })
    }
}
