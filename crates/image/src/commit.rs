//! A checkpoint's way into the image: begin, stage, verify and commit, apply.

use std::collections::BTreeSet;

use romulus_page_codec::Page;
use romulus_types::{Digest, Epoch, PageIndex, Session, Term};

use crate::error::Named;
use crate::files::{Area, FileName, Files};
use crate::image::{Committed, Phase};
use crate::memory::{apply_pages, locate, sync_blocks};
use crate::slot::{CommitRecord, Verdict};
use crate::staging::Writer;
use crate::window::Window;
use crate::{Image, ImageError};

/// What the primary says a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The session.
    pub session: Session,
    /// The epoch that ends with this checkpoint.
    pub epoch: Epoch,
    /// The term of the witness's record at the primary; kept with the commit.
    pub term: Term,
    /// Pages in the checkpoint, each counted once.
    pub page_count: u64,
    /// Sum modulo 2^128 of [`romulus_page_codec::page_digest`] of these pages.
    pub pages_digest: Digest,
    /// Bytes of device state.
    pub device_state_bytes: u64,
    /// [`device_state_digest`](crate::device_state_digest) of it.
    pub device_state_digest: Digest,
    /// [`romulus_page_codec::ImageDigest`] of all memory with this checkpoint applied.
    pub image_digest: Digest,
    /// The first commit of its session: it makes the image usable.
    pub first: bool,
}

impl<F: Files> Image<F> {
    /// Starts to stage a checkpoint. The last commit need not be applied yet; it is readable through
    /// [`read_page`](Self::read_page) either way.
    ///
    /// # Errors
    /// [`ImageError::WrongState`] for an unusable image, [`ImageError::StagingInProgress`],
    /// [`ImageError::SessionMismatch`], [`ImageError::EpochReplayed`], [`ImageError::EpochSkipped`].
    pub fn begin(&mut self, session: Session, epoch: Epoch) -> Result<(), ImageError> {
        self.check_writable()?;
        if let Some(staging) = &self.staging {
            return Err(ImageError::StagingInProgress { epoch: staging.epoch });
        }
        let (expected, last, area) = match &self.phase {
            Phase::Unusable(_) => {
                return Err(ImageError::WrongState {
                    action: "stage a checkpoint",
                    state: self.state(),
                });
            }
            Phase::Syncing(session) => (*session, None, Area::A),
            Phase::Committed(committed) => {
                let record = &committed.record;
                (record.session, Some(record.epoch), record.area.other())
            }
        };
        if session != expected {
            return Err(ImageError::SessionMismatch {
                expected,
                found: session,
            });
        }
        let last_or_none = last.unwrap_or(Epoch::NONE);
        if epoch <= last_or_none {
            return Err(ImageError::EpochReplayed {
                last: last_or_none,
                found: epoch,
            });
        }
        if let Some(last) = last
            && epoch != last.next()
        {
            return Err(ImageError::EpochSkipped { last, found: epoch });
        }
        let file = FileName::Staging(area);
        self.files
            .reuse(file, self.limits.staging_bytes_kept)
            .named("shorten", file)?;
        let buffer = std::mem::take(&mut self.write_buffer);
        self.staging = Some(Writer::new(area, session, epoch, self.limits, buffer));
        Ok(())
    }

    /// Stages a decoded page and returns its digest. Pages of a checkpoint may come in any order, each once.
    ///
    /// # Errors
    /// [`ImageError::NoStaging`], [`ImageError::PageOutOfRange`], [`ImageError::PageTwice`],
    /// [`ImageError::StagingFull`], [`ImageError::Io`]. The checkpoint cannot be completed then.
    pub fn stage_page(&mut self, index: PageIndex, page: &Page) -> Result<Digest, ImageError> {
        locate(&self.layout, index)?;
        let staging = self.staging.as_mut().ok_or(ImageError::NoStaging)?;
        staging.page(&mut self.files, index, page)
    }

    /// Stages the next bytes of the device state.
    ///
    /// # Errors
    /// [`ImageError::NoStaging`], [`ImageError::DeviceStateTooLarge`], [`ImageError::StagingFull`],
    /// [`ImageError::Io`]. The checkpoint cannot be completed then.
    pub fn stage_device_state(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let staging = self.staging.as_mut().ok_or(ImageError::NoStaging)?;
        staging.device_state(&mut self.files, bytes)
    }

    /// Forgets what is being staged, if anything.
    pub fn discard_staging(&mut self) {
        if let Some(staging) = self.staging.take() {
            self.write_buffer = staging.finish().1;
        }
    }

    /// Gives back what a checkpoint took that was discarded. Not needed before the next one.
    ///
    /// # Errors
    /// [`ImageError::StagingInProgress`]; [`ImageError::MustReopen`], as after a failed write either area may be what a slot
    /// commits; [`ImageError::Io`]: what was not given back is by the next checkpoint.
    pub fn release_staging(&mut self) -> Result<(), ImageError> {
        self.check_writable()?;
        if let Some(staging) = &self.staging {
            return Err(ImageError::StagingInProgress { epoch: staging.epoch });
        }
        let free = match &self.phase {
            Phase::Committed(committed) => vec![committed.record.area.other()],
            _ => vec![Area::A, Area::B],
        };
        for file in free.into_iter().map(FileName::Staging) {
            let kept = self.limits.staging_bytes_kept;
            self.files.reuse(file, kept).named("shorten", file)?;
        }
        Ok(())
    }

    /// The epoch that is being staged.
    pub fn staging_epoch(&self) -> Option<Epoch> {
        self.staging.as_ref().map(|staging| staging.epoch)
    }

    /// Bytes staged so far.
    pub fn staging_bytes(&self) -> u64 {
        self.staging
            .as_ref()
            .map_or(0, |staging| staging.contents.bytes())
    }

    /// Checks what is staged against what the primary says, and commits it: on `Ok` it survives a crash at
    /// any point, so it may be acknowledged. [`apply`](Self::apply) comes next.
    ///
    /// # Errors
    /// Each check has an error of its own; the staging is discarded then, and the last commit stands.
    /// [`ImageError::NoStaging`] and [`ImageError::PreviousNotApplied`] change nothing. [`ImageError::Io`] for
    /// the commit slot makes it necessary to open the image again: either commit may stand.
    pub fn verify_and_commit(&mut self, expected: &Expected) -> Result<(), ImageError> {
        self.check_writable()?;
        if self.staging.is_none() {
            return Err(ImageError::NoStaging);
        }
        self.check_applied()?;
        let record = match self.check_and_store(expected) {
            Ok(record) => record,
            Err(error) => {
                self.discard_staging();
                return Err(error);
            }
        };
        self.write_slot(Verdict::Committed {
            record,
            applied: false,
        })?;
        let staging = self.staging.take().expect("it was there above");
        let (contents, buffer) = staging.finish();
        self.write_buffer = buffer;
        for page in contents.pages() {
            self.table.set(page.index, page.digest);
        }
        assert_eq!(
            self.image_digest(),
            record.image_digest,
            "the digest was checked before the commit"
        );
        self.phase = Phase::Committed(Box::new(Committed {
            record,
            contents,
            pages_written: Some(0),
            blocks_touched: BTreeSet::new(),
        }));
        Ok(())
    }

    /// Everything before the slot is written.
    fn check_and_store(&mut self, expected: &Expected) -> Result<CommitRecord, ImageError> {
        let state = self.state();
        let staging = self.staging.as_mut().ok_or(ImageError::NoStaging)?;
        if expected.session != staging.session {
            return Err(ImageError::SessionMismatch {
                expected: staging.session,
                found: expected.session,
            });
        }
        if expected.epoch != staging.epoch {
            return Err(ImageError::EpochMismatch {
                staged: staging.epoch,
                found: expected.epoch,
            });
        }
        let first = matches!(self.phase, Phase::Syncing(_));
        if expected.first != first {
            return Err(ImageError::FirstMismatch {
                found: expected.first,
                state,
            });
        }
        check_sections(staging, expected)?;
        let mut digest = self.table.image();
        for page in staging.contents.pages() {
            digest.replace(self.table.page(page.index), page.digest);
        }
        let found = digest.digest();
        if found != expected.image_digest {
            return Err(ImageError::ImageDigest {
                expected: expected.image_digest,
                found,
            });
        }
        staging.flush(&mut self.files)?;
        let file = FileName::Staging(staging.area);
        self.files.sync(file).named("sync", file)?;
        let record = CommitRecord {
            session: expected.session,
            epoch: expected.epoch,
            term: expected.term,
            area: staging.area,
            staging_bytes: staging.contents.bytes(),
            page_count: expected.page_count,
            pages_digest: expected.pages_digest,
            device_state_bytes: expected.device_state_bytes,
            device_state_digest: expected.device_state_digest,
            records_digest: staging.contents.records_digest(),
            image_digest: expected.image_digest,
        };
        if first {
            // The copied pages become part of a commit now.
            self.sync_memory()?;
        }
        Ok(record)
    }

    /// Writes the committed pages to the memory files and marks the commit applied. Does nothing when that is
    /// done already.
    ///
    /// # Errors
    /// [`ImageError::Io`]: may be called again. [`ImageError::StagingDamaged`]: the commit is lost to bad
    /// memory; [`mark_unusable`](Self::mark_unusable) and copy again. [`ImageError::WrongState`] without a commit.
    pub fn apply(&mut self) -> Result<(), ImageError> {
        while !self.apply_some(usize::MAX)? {}
        Ok(())
    }

    /// Like [`apply`](Self::apply), but writes at most `pages_max` pages, so that a driver loop can do other things in
    /// between; `true` when the commit is applied.
    ///
    /// # Errors
    /// As for [`apply`](Self::apply).
    pub fn apply_some(&mut self, pages_max: usize) -> Result<bool, ImageError> {
        self.check_writable()?;
        let state = self.state();
        let Phase::Committed(committed) = &mut self.phase else {
            return Err(ImageError::WrongState {
                action: "apply a checkpoint",
                state,
            });
        };
        let Some(written) = committed.pages_written else {
            return Ok(true);
        };
        let pages = committed.contents.pages();
        let end = written.saturating_add(pages_max).min(pages.len());
        let record = committed.record;
        let file = FileName::Staging(record.area);
        let mut window =
            Window::with_buffer(file, record.staging_bytes, std::mem::take(&mut self.read_buffer));
        let touched = &mut committed.blocks_touched;
        let applied = apply_pages(
            &mut self.files,
            &self.layout,
            &pages[written..end],
            &mut window,
            file,
            touched,
        );
        self.read_buffer = window.into_buffer();
        applied?;
        committed.pages_written = Some(end);
        if end < committed.contents.pages().len() {
            return Ok(false);
        }
        sync_blocks(&mut self.files, committed.blocks_touched.iter().copied())?;
        self.write_slot(Verdict::Committed {
            record,
            applied: true,
        })?;
        let Phase::Committed(committed) = &mut self.phase else {
            unreachable!("matched above")
        };
        committed.pages_written = None;
        Ok(true)
    }
}

fn check_sections(staging: &Writer, expected: &Expected) -> Result<(), ImageError> {
    let contents = &staging.contents;
    let found = contents.pages().len() as u64;
    if found != expected.page_count {
        return Err(ImageError::PageCount {
            expected: expected.page_count,
            found,
        });
    }
    let found = contents.pages_digest();
    if found != expected.pages_digest {
        return Err(ImageError::PagesDigest {
            expected: expected.pages_digest,
            found,
        });
    }
    let found = contents.device_state_bytes();
    if found != expected.device_state_bytes {
        return Err(ImageError::DeviceStateBytes {
            expected: expected.device_state_bytes,
            found,
        });
    }
    let found = contents.device_state_digest();
    if found != expected.device_state_digest {
        return Err(ImageError::DeviceStateDigest {
            expected: expected.device_state_digest,
            found,
        });
    }
    Ok(())
}
