//! The image: its states, its memory, synchronisation. Checkpoints are in `commit.rs`, opening in `recover.rs`.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use romulus_page_codec::{Page, page_digest};
use romulus_types::{BlockId, Digest, Epoch, PageIndex, RamLayout, Session, Term, VmId};

use crate::digests::DigestTable;
use crate::error::Named;
use crate::files::{Area, FileName, Files, HostFiles, PlacedFiles};
use crate::memory::{block_ids, digest_all, locate, survey, sync_blocks, write_page};
use crate::slot::{self, CommitRecord, Slot, Verdict};
use crate::staging::{Contents, Writer};
use crate::{ImageError, Recovery};

/// How much a peer can make an image use besides the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest checkpoint, in bytes of a staging file. There are two of them, and about 1.5 % of it
    /// is needed again as memory of the process (more when pages of zeros are many: 60 bytes each).
    pub staging_bytes_max: u64,
    /// Largest device state, in bytes. Part of `staging_bytes_max`.
    pub device_state_bytes_max: u64,
    /// What a staging file may keep between checkpoints for speed, in bytes.
    pub staging_bytes_kept: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            staging_bytes_max: 1 << 30,
            device_state_bytes_max: 64 << 20,
            staging_bytes_kept: 32 << 20,
        }
    }
}

/// Memory (or disk space) that an image takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the guest's memory: pages that hold something.
    pub ram_bytes: u64,
    /// Of both staging areas, with what they keep between checkpoints for speed.
    pub staging_bytes: u64,
}

impl Usage {
    /// Both together.
    pub fn bytes(self) -> u64 {
        self.ram_bytes + self.staging_bytes
    }
}

/// Why an image cannot be activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnusableReason {
    /// Newly made, marked by [`Image::mark_unusable`], or the agent died while memory was being copied.
    Marked,
    /// Both commit slots are damaged.
    SlotsDamaged,
    /// The committed checkpoint in the staging file is damaged.
    StagingDamaged,
    /// The memory files are not what was committed.
    DigestMismatch {
        /// Digest by the commit slot.
        expected: Digest,
        /// Digest of the files.
        found: Digest,
    },
    /// A write failed half way; what stands is known after opening the image again.
    WriteFailed,
}

impl fmt::Display for UnusableReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Marked => f.write_str("no complete copy yet"),
            Self::SlotsDamaged => f.write_str("both commit slots are damaged"),
            Self::StagingDamaged => f.write_str("the committed checkpoint is damaged"),
            Self::DigestMismatch { expected, found } => {
                write!(f, "memory has digest {found}, {expected} was committed")
            }
            Self::WriteFailed => f.write_str("a write failed half way, open it again"),
        }
    }
}

/// What can be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// It must be copied again.
    Unusable {
        /// Why.
        reason: UnusableReason,
    },
    /// Memory is being copied; not usable yet.
    Syncing {
        /// The session that copies.
        session: Session,
    },
    /// Holds a commit that can be activated, after [`Image::apply`].
    Committed {
        /// The session that made it.
        session: Session,
        /// The committed epoch.
        epoch: Epoch,
        /// The term in its commit record.
        term: Term,
        /// Whether the memory files hold it already.
        applied: bool,
    },
}

impl fmt::Display for ImageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable { reason } => write!(f, "unusable ({reason})"),
            Self::Syncing { session } => write!(f, "being copied by session {session}"),
            Self::Committed {
                session,
                epoch,
                applied: true,
                ..
            } => {
                write!(f, "at epoch {epoch} of session {session}")
            }
            Self::Committed {
                session,
                epoch,
                applied: false,
                ..
            } => {
                write!(
                    f,
                    "committed but not applied at epoch {epoch} of session {session}"
                )
            }
        }
    }
}

/// The standing commit.
pub(crate) struct Committed {
    pub(crate) record: CommitRecord,
    pub(crate) contents: Contents,
    /// How many of its pages are written; `None` once the slot says so.
    pub(crate) pages_written: Option<usize>,
    pub(crate) blocks_touched: BTreeSet<BlockId>,
}

pub(crate) enum Phase {
    Unusable(UnusableReason),
    Syncing(Session),
    Committed(Box<Committed>),
}

/// The memory image of one VM. See the crate's head for the states.
pub struct Image<F: Files> {
    pub(crate) files: F,
    pub(crate) vm: VmId,
    pub(crate) layout: RamLayout,
    pub(crate) limits: Limits,
    pub(crate) layout_digest: Digest,
    /// Of the last slot written.
    pub(crate) sequence: u64,
    /// The committed memory (or, while synchronising, what the files hold).
    pub(crate) table: DigestTable,
    pub(crate) phase: Phase,
    pub(crate) staging: Option<Writer>,
    pub(crate) recovery: Recovery,
    /// A slot or a page may be half written: refuse everything.
    pub(crate) write_failed: bool,
    /// Memory for the next [`Writer`] and the next [`Window`](crate::window::Window).
    pub(crate) write_buffer: Vec<u8>,
    pub(crate) read_buffer: Vec<u8>,
}

impl<F: Files> Image<F> {
    /// Whose image this is.
    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    /// The RAM blocks.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// What can be done with the image now.
    pub fn state(&self) -> ImageState {
        if self.write_failed {
            return ImageState::Unusable {
                reason: UnusableReason::WriteFailed,
            };
        }
        match &self.phase {
            Phase::Unusable(reason) => ImageState::Unusable { reason: *reason },
            Phase::Syncing(session) => ImageState::Syncing { session: *session },
            Phase::Committed(committed) => ImageState::Committed {
                session: committed.record.session,
                epoch: committed.record.epoch,
                term: committed.record.term,
                applied: committed.pages_written.is_none(),
            },
        }
    }

    /// What [`open`](Self::open) found and did.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// Marks the image unusable, durably: on return no crash and no single damaged slot brings the last
    /// commit back. Discards what is being staged.
    ///
    /// # Errors
    /// [`ImageError::Io`]; the image must then be opened again.
    pub fn mark_unusable(&mut self) -> Result<(), ImageError> {
        self.check_writable()?;
        self.discard_staging();
        if matches!(self.phase, Phase::Committed(_)) {
            self.write_unusable_slots()?;
        }
        self.phase = Phase::Unusable(UnusableReason::Marked);
        Ok(())
    }

    /// Starts to copy memory: marks the image unusable first, durably. Old content stays: call
    /// [`survey`](Self::survey) before the first page is written.
    ///
    /// # Errors
    /// [`ImageError::Io`]; the image must then be opened again.
    pub fn begin_sync(&mut self, session: Session) -> Result<(), ImageError> {
        self.mark_unusable()?;
        self.phase = Phase::Syncing(session);
        Ok(())
    }

    /// Writes a page straight to the image while synchronising.
    ///
    /// # Errors
    /// [`ImageError::WrongState`], [`ImageError::PageOutOfRange`]; [`ImageError::Io`] makes it
    /// necessary to open the image again.
    pub fn sync_page(&mut self, index: PageIndex, page: &Page) -> Result<(), ImageError> {
        self.check_writable()?;
        self.check_syncing("copy a page")?;
        let place = locate(&self.layout, index)?;
        let digest = page_digest(index, page);
        if digest == Digest(0) && self.table.page(index) == Digest(0) {
            return Ok(());
        }
        let written = write_page(&mut self.files, place, digest, page);
        self.note_failure(written)?;
        self.table.set(index, digest);
        Ok(())
    }

    /// Reads what an earlier session left in memory, while synchronising, so that pages that are equal need not be sent.
    /// `visit` sees each page that is not all zeros, in ascending order. Only the files count: an agent that died may have
    /// left any page half written.
    ///
    /// # Errors
    /// [`ImageError::WrongState`]; [`ImageError::Io`] makes it necessary to open the image again.
    pub fn survey(&mut self, mut visit: impl FnMut(PageIndex, &Page)) -> Result<(), ImageError> {
        self.check_writable()?;
        self.check_syncing("read memory")?;
        let table = survey(&self.files, &self.layout, &mut visit);
        self.table = self.note_failure(table)?;
        Ok(())
    }

    /// Reads a page as it is after the last commit, whether that is applied already or not; while
    /// synchronising as it was copied. Deltas of epoch n + 1 refer to this once n is committed.
    ///
    /// # Errors
    /// [`ImageError::PageOutOfRange`], [`ImageError::Io`].
    pub fn read_page(&self, index: PageIndex, into: &mut Page) -> Result<(), ImageError> {
        self.check_writable()?;
        let (block, offset) = locate(&self.layout, index)?;
        if self.table.page(index) == Digest(0) {
            into.fill(0);
            return Ok(());
        }
        let (file, offset) = match &self.phase {
            Phase::Committed(committed) if committed.pages_written.is_some() => {
                match committed.contents.page(index) {
                    Some(staged) => (FileName::Staging(committed.record.area), staged.offset),
                    None => (FileName::Ram(block), offset),
                }
            }
            _ => (FileName::Ram(block), offset),
        };
        self.files.read_at(file, offset, into).named("read", file)
    }

    /// The digest of the whole image after the last commit, or of what is copied so far.
    pub fn image_digest(&self) -> Digest {
        self.table.image().digest()
    }

    /// The device state of the last commit.
    ///
    /// # Errors
    /// [`ImageError::WrongState`] without a commit, [`ImageError::StagingDamaged`], [`ImageError::Io`].
    pub fn device_state(&self) -> Result<Vec<u8>, ImageError> {
        match &self.phase {
            Phase::Committed(committed) if !self.write_failed => committed
                .contents
                .device_state(&self.files, committed.record.area),
            _ => Err(ImageError::WrongState {
                action: "read the device state",
                state: self.state(),
            }),
        }
    }

    /// Memory (or disk space) in use by the guest's memory and the staging areas.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn usage(&self) -> Result<Usage, ImageError> {
        let ram: Vec<FileName> = block_ids(&self.layout).map(FileName::Ram).collect();
        Ok(Usage {
            ram_bytes: self.touched_bytes(&ram)?,
            staging_bytes: self.touched_bytes(&[Area::A, Area::B].map(FileName::Staging))?,
        })
    }

    fn touched_bytes(&self, files: &[FileName]) -> Result<u64, ImageError> {
        let mut bytes = 0;
        for &file in files {
            bytes += self.files.touched_bytes(file).named("measure", file)?;
        }
        Ok(bytes)
    }

    /// Computes everything again from the memory files and compares.
    ///
    /// # Errors
    /// [`ImageError::PageDamaged`] with the first page that differs; [`ImageError::PreviousNotApplied`],
    /// [`ImageError::MustReopen`], [`ImageError::Io`].
    pub fn verify_image(&self) -> Result<(), ImageError> {
        self.check_writable()?;
        self.check_applied()?;
        let found = digest_all(&self.files, &self.layout)?;
        match self.table.first_difference(&found) {
            Some(page) => Err(ImageError::PageDamaged { page }),
            None => Ok(()),
        }
    }

    /// Removes the image and all its files.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn remove(mut self) -> Result<(), ImageError> {
        self.files
            .remove_all()
            .named("remove the files beside", FileName::Layout)
    }

    /// The files under the image.
    pub fn files(&self) -> &F {
        &self.files
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub(crate) fn check_writable(&self) -> Result<(), ImageError> {
        if self.write_failed {
            Err(ImageError::MustReopen)
        } else {
            Ok(())
        }
    }

    pub(crate) fn check_applied(&self) -> Result<(), ImageError> {
        match &self.phase {
            Phase::Committed(committed) if committed.pages_written.is_some() => {
                Err(ImageError::PreviousNotApplied {
                    epoch: committed.record.epoch,
                })
            }
            _ => Ok(()),
        }
    }

    fn check_syncing(&self, action: &'static str) -> Result<(), ImageError> {
        match self.phase {
            Phase::Syncing(_) => Ok(()),
            _ => Err(ImageError::WrongState {
                action,
                state: self.state(),
            }),
        }
    }

    /// After a failure of this kind it is not known what the files hold.
    pub(crate) fn note_failure<T>(&mut self, result: Result<T, ImageError>) -> Result<T, ImageError> {
        self.write_failed |= result.is_err();
        result
    }

    pub(crate) fn write_slot(&mut self, verdict: Verdict) -> Result<(), ImageError> {
        let sequence = self
            .sequence
            .checked_add(1)
            .expect("sequence numbers are never exhausted");
        let slot = Slot {
            sequence,
            layout_digest: self.layout_digest,
            verdict,
        };
        let written = slot::write(&mut self.files, slot);
        self.note_failure(written)?;
        self.sequence = sequence;
        Ok(())
    }

    /// Both slots, so that no single damaged one brings an old commit back.
    pub(crate) fn write_unusable_slots(&mut self) -> Result<(), ImageError> {
        self.write_slot(Verdict::Unusable)?;
        self.write_slot(Verdict::Unusable)
    }

    pub(crate) fn sync_memory(&mut self) -> Result<(), ImageError> {
        sync_blocks(&mut self.files, block_ids(&self.layout))
    }
}

impl Image<HostFiles> {
    /// The file that holds a block's memory, for a standby to map.
    pub fn ram_path(&self, block: BlockId) -> PathBuf {
        self.files.path(FileName::Ram(block))
    }
}

impl Image<PlacedFiles> {
    /// The file that holds a block's memory, for a standby to map.
    pub fn ram_path(&self, block: BlockId) -> PathBuf {
        self.files.memory().path(FileName::Ram(block))
    }
}

impl<F: Files> fmt::Debug for Image<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image of {}, {}", self.vm, self.state())
    }
}
