//! Staging that does not fit into a host's share of memory goes on in a file elsewhere.
//!
//! ```text
//!   a staging area     0                     split                length
//!   memory's file      |█████████████████████|
//!   the spill file     |      (a hole)       |░░░░░░░░░░░░░░░░░░░░|
//! ```
//!
//! The split is the length of memory's file: nothing else has to be remembered, so an area reads back after a crash as it was
//! written. It moves only while nothing is spilled. Everything but staging is left alone, and the commit does not know of it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Area, FileName, Files};

/// The memory that the staging of all images of a host may take. Clones are the same share.
#[derive(Clone, Debug)]
pub struct StagingShare(Arc<Share>);

#[derive(Debug)]
struct Share {
    bytes_max: u64,
    used_bytes: AtomicU64,
    spilled_bytes: AtomicU64,
    spilled_ever_bytes: AtomicU64,
}

/// Staging could not go on in a file.
#[derive(Debug, thiserror::Error)]
#[error(
    "its share of memory (staging_max) is taken, and the folder for what does not fit (spill_dir) can't be used"
)]
struct SpillFailed(#[source] io::Error);

fn spill_failed(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), SpillFailed(error))
}

impl StagingShare {
    /// At most so many bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self(Arc::new(Share {
            bytes_max,
            used_bytes: AtomicU64::new(0),
            spilled_bytes: AtomicU64::new(0),
            spilled_ever_bytes: AtomicU64::new(0),
        }))
    }

    /// Bytes of memory that are taken. What is found when images are opened counts, and may be more than the limit.
    pub fn used_bytes(&self) -> u64 {
        self.0.used_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that lie in spill files now.
    pub fn spilled_bytes(&self) -> u64 {
        self.0.spilled_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that were written to spill files since the share was made.
    pub fn spilled_ever_bytes(&self) -> u64 {
        self.0.spilled_ever_bytes.load(Ordering::Relaxed)
    }

    /// More than half of it is taken: what is kept for speed alone is better given back.
    fn is_scarce(&self) -> bool {
        self.used_bytes() > self.0.bytes_max / 2
    }

    /// The limit, in bytes.
    pub fn bytes_max(&self) -> u64 {
        self.0.bytes_max
    }

    fn take(&self, bytes: u64) -> bool {
        let taken = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.0.bytes_max);
        let order = Ordering::Relaxed;
        self.0.used_bytes.fetch_update(order, order, taken).is_ok()
    }

    fn found(&self, bytes: u64) {
        self.0.used_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: u64) {
        let before = self.0.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
        assert!(before >= bytes, "no more is given back than was taken");
    }

    fn spilled(&self, before: u64, after: u64) {
        self.0.spilled_bytes.fetch_add(after, Ordering::Relaxed);
        self.0.spilled_bytes.fetch_sub(before, Ordering::Relaxed);
    }
}

/// How a staging area is divided.
#[derive(Clone, Copy, Debug, Default)]
struct Division {
    /// Length of memory's file: where the spill file's part begins.
    memory_bytes: u64,
    /// Length of the whole while something is spilled, otherwise 0.
    spill_end: u64,
    /// There is a spill file.
    spill_made: bool,
}

impl Division {
    fn spilled_bytes(&self) -> u64 {
        self.spill_end.saturating_sub(self.memory_bytes)
    }
}

/// [`Files`] in `memory`, whose staging takes from a share and goes on in `spill` when there is nothing left of that.
#[derive(Debug)]
pub struct Spilling<M, S> {
    memory: M,
    spill: S,
    share: StagingShare,
    sync_spill: bool,
    areas: [Division; 2],
}

impl<M, S> Spilling<M, S> {
    /// Of `spill` only the staging areas are used. With `sync_spill` spill files are synced with the rest; without it they are as
    /// durable as memory is: they outlive the process and not the host.
    pub fn new(memory: M, spill: S, share: StagingShare, sync_spill: bool) -> Self {
        Self {
            memory,
            spill,
            share,
            sync_spill,
            areas: [Division::default(); 2],
        }
    }

    /// The files in memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Bytes of this image's staging that lie in spill files now.
    pub fn spilled_bytes(&self) -> u64 {
        self.areas.iter().map(Division::spilled_bytes).sum()
    }

    /// Whether a small checkpoint is staged without work that is large or waits for a disk: nothing is spilled or will be, and no area
    /// has more than `bytes_kept`, which is given back before the area is used again.
    pub fn is_ready(&self, bytes_kept: u64) -> bool {
        let is_ready = |area: &Division| area.spill_end == 0 && area.memory_bytes <= bytes_kept;
        !self.share.is_scarce() && self.areas.iter().all(is_ready)
    }

    fn area(&self, area: Area) -> &Division {
        &self.areas[usize::from(area == Area::B)]
    }

    /// Notes how an area is divided now, and gives back or counts what changed.
    fn divide(&mut self, area: Area, division: Division) {
        let now = &mut self.areas[usize::from(area == Area::B)];
        let before = std::mem::replace(now, division);
        self.share
            .spilled(before.spilled_bytes(), division.spilled_bytes());
        if division.memory_bytes < before.memory_bytes {
            self.share.give_back(before.memory_bytes - division.memory_bytes);
        }
    }
}

impl<M, S> Drop for Spilling<M, S> {
    fn drop(&mut self) {
        for area in [Area::A, Area::B] {
            self.divide(area, Division::default());
        }
    }
}

impl<M: Files, S: Files> Spilling<M, S> {
    /// How much of `bytes` from `offset` on goes to memory; the rest is spilled.
    fn share_of_memory(&mut self, area: Area, offset: u64, bytes: u64) -> u64 {
        let division = *self.area(area);
        let end = offset.saturating_add(bytes);
        if end > division.memory_bytes
            && division.spill_end == 0
            && self.share.take(end - division.memory_bytes)
        {
            let memory_bytes = end;
            self.divide(
                area,
                Division {
                    memory_bytes,
                    ..division
                },
            );
            return bytes;
        }
        division.memory_bytes.saturating_sub(offset).min(bytes)
    }

    fn spill_at(&mut self, area: Area, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let name = FileName::Staging(area);
        let mut division = *self.area(area);
        if !division.spill_made {
            self.spill.create(name, 0).map_err(spill_failed)?;
            division.spill_made = true;
        }
        let length = bytes.len() as u64;
        division.spill_end = division.spill_end.max(offset + length);
        self.divide(area, division);
        let count = &self.share.0.spilled_ever_bytes;
        count.fetch_add(length, Ordering::Relaxed);
        self.spill.write_at(name, offset, bytes).map_err(spill_failed)
    }

    /// Drops what is spilled beyond `bytes`.
    fn cut_spill(&mut self, area: Area, bytes: u64) -> io::Result<()> {
        let mut division = *self.area(area);
        if division.spill_made && division.spill_end > bytes {
            let kept = if bytes > division.memory_bytes { bytes } else { 0 };
            self.spill.cut(FileName::Staging(area), kept)?;
            division.spill_end = kept;
            self.divide(area, division);
        }
        Ok(())
    }
}

impl<M: Files, S: Files> Files for Spilling<M, S> {
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>> {
        let found = self.memory.open(name)?;
        let (FileName::Staging(area), Some(memory_bytes)) = (name, found) else {
            return Ok(found);
        };
        let spill = self.spill.open(name)?;
        let spill_end = spill.unwrap_or(0);
        self.divide(area, Division::default());
        self.share.found(memory_bytes);
        let division = Division {
            memory_bytes,
            spill_end: if spill_end > memory_bytes { spill_end } else { 0 },
            spill_made: spill.is_some(),
        };
        self.divide(area, division);
        Ok(Some(memory_bytes.max(spill_end)))
    }

    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.memory.create(name, bytes)?;
        if let FileName::Staging(area) = name {
            // An earlier image's, which was not removed to its end.
            let spill_made = self.spill.open(name)?.is_some();
            if spill_made {
                self.spill.cut(name, 0)?;
            }
            self.divide(area, Division::default());
            self.share.found(bytes);
            let division = Division {
                memory_bytes: bytes,
                spill_end: 0,
                spill_made,
            };
            self.divide(area, division);
        }
        Ok(())
    }

    fn read_at(&self, name: FileName, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let FileName::Staging(area) = name else {
            return self.memory.read_at(name, offset, into);
        };
        let division = self.area(area);
        if division.spill_end == 0 {
            return self.memory.read_at(name, offset, into);
        }
        let here = division.memory_bytes.saturating_sub(offset);
        let here = usize::try_from(here).unwrap_or(usize::MAX).min(into.len());
        let (head, tail) = into.split_at_mut(here);
        if !head.is_empty() {
            self.memory.read_at(name, offset, head)?;
        }
        if !tail.is_empty() {
            self.spill.read_at(name, offset + here as u64, tail)?;
        }
        Ok(())
    }

    fn write_at(&mut self, name: FileName, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let FileName::Staging(area) = name else {
            return self.memory.write_at(name, offset, bytes);
        };
        let here = self.share_of_memory(area, offset, bytes.len() as u64);
        let here = usize::try_from(here).expect("a part of what is in memory");
        let (head, tail) = bytes.split_at(here);
        if !head.is_empty() {
            self.memory.write_at(name, offset, head)?;
        }
        if !tail.is_empty() {
            self.spill_at(area, offset + here as u64, tail)?;
        }
        Ok(())
    }

    fn punch(&mut self, name: FileName, range: Range<u64>) -> io::Result<()> {
        self.memory.punch(name, range)
    }

    fn cut(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        if let FileName::Staging(area) = name {
            self.cut_spill(area, bytes)?;
            self.memory.cut(name, bytes)?;
            let division = *self.area(area);
            let memory_bytes = division.memory_bytes.min(bytes);
            self.divide(
                area,
                Division {
                    memory_bytes,
                    ..division
                },
            );
            return Ok(());
        }
        self.memory.cut(name, bytes)
    }

    fn reuse(&mut self, name: FileName, bytes_kept: u64) -> io::Result<()> {
        if let FileName::Staging(area) = name {
            self.cut_spill(area, 0)?;
            if self.share.is_scarce() {
                return self.cut(name, 0);
            }
        }
        self.cut(name, bytes_kept)
    }

    fn sync(&mut self, name: FileName) -> io::Result<()> {
        if let FileName::Staging(area) = name
            && self.sync_spill
            && self.area(area).spill_end > 0
        {
            self.spill.sync(name)?;
        }
        self.memory.sync(name)
    }

    fn next_data(&self, name: FileName, from: u64) -> io::Result<Option<Range<u64>>> {
        self.memory.next_data(name, from)
    }

    fn touched_bytes(&self, name: FileName) -> io::Result<u64> {
        self.memory.touched_bytes(name)
    }

    fn remove_all(&mut self) -> io::Result<()> {
        for area in [Area::A, Area::B] {
            self.divide(area, Division::default());
        }
        self.memory.remove_all()?;
        self.spill.remove_all()
    }
}
