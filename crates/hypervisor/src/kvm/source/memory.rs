//! The guest's memory as we share it with the VMM: mapped once, copied out of the mapping, dirty pages from the shared bitmap.
//!
//! ```text
//!   VMM:  writes of vCPUs (the kernel's log) ─ at Harvest and Pause ─┐
//!         writes of its devices ──────────────── at once ────────────┴─► bitmap (shared) ─ swap with 0 ─► taken (ours)
//!                                                                                                          │ copy
//!         memory of the regions (shared, read-only here) ──────────────────────────────────────────► checkpoint ─┘
//! ```
//!
//! A page that was taken out of the bitmap stays in `taken` until a checkpoint that has it counts: the VMM knows nothing of it
//! any more.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use romulus_host_sys::{SharedView, SharedWords, SysError};
use romulus_types::{PAGE_BYTES, PageIndex, RamLayout};
use rustix::fs::{SealFlags, SeekFrom, fcntl_get_seals, seek};
use rustix::io::{Errno, pread};

use crate::source::Checkpoint;

const PAGE: u64 = PAGE_BYTES as u64;
const WORD_PAGES: u64 = 64;

/// One region of memory.
struct Block {
    first_page: u64,
    pages: u64,
    /// A file that may become shorter is not mapped: touching a mapping past the end of its file would kill us.
    view: Option<SharedView>,
    file: OwnedFd,
    /// Where the region begins in the file.
    file_offset: u64,
}

impl Block {
    fn end(&self) -> u64 {
        self.first_page + self.pages
    }

    fn copy_to(&self, offset: u64, into: &mut [u8]) -> Result<(), SysError> {
        match &self.view {
            Some(view) => view.copy_to(offset, into),
            None => read_exact(&self.file, self.file_offset + offset, into),
        }
    }
}

/// All regions, the bitmap, and what was taken out of it.
pub(super) struct Memory {
    blocks: Vec<Block>,
    bitmap: SharedWords,
    page_count: u64,
    /// Pages that belong into the next checkpoint, one bit each.
    taken: Vec<u64>,
}

/// A region's file and where the region begins in it.
pub(super) struct RegionFile {
    pub(super) file: OwnedFd,
    pub(super) offset: u64,
}

impl Memory {
    /// Maps what the VMM handed over: memory fds that are sealed against shrinking. Others (the files of an image, after a
    /// takeover) are read, which takes about twice as long.
    ///
    /// # Errors
    /// A file that is too short, or a bitmap that could become so.
    pub(super) fn map(
        layout: &RamLayout,
        files: Vec<RegionFile>,
        bitmap: &OwnedFd,
    ) -> Result<Self, SysError> {
        let mut blocks = Vec::with_capacity(files.len());
        let mut first_page = 0;
        for (block, region) in layout.blocks().iter().zip(files) {
            let stays = fcntl_get_seals(&region.file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
            let view = SharedView::map(&region.file, region.offset, block.bytes)?;
            let pages = block.bytes / PAGE;
            blocks.push(Block {
                first_page,
                pages,
                view: stays.then_some(view),
                file: region.file,
                file_offset: region.offset,
            });
            first_page += pages;
        }
        let page_count = layout.page_count();
        let words =
            usize::try_from(page_count.div_ceil(WORD_PAGES)).expect("a layout has at most 2^32 pages");
        Ok(Self {
            blocks,
            bitmap: SharedWords::map(bitmap, words)?,
            page_count,
            taken: vec![0; words],
        })
    }

    /// Forgets what is dirty: all memory is copied after this.
    pub(super) fn forget(&mut self) {
        self.taken.fill(0);
        for word in self.bitmap.iter() {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Takes every bit out of the bitmap; how many pages are taken now, those of an earlier checkpoint that did not count
    /// among them.
    pub(super) fn harvest(&mut self) -> u64 {
        let mut pages = 0;
        for (word, taken) in self.bitmap.iter().zip(&mut self.taken) {
            // A bit that is set after the look stays for the next harvest.
            if word.load(Ordering::Relaxed) != 0 {
                // Whoever set a bit wrote the page before: what is copied after this is at least as new.
                *taken |= word.swap(0, Ordering::Acquire);
            }
            // Most words are empty.
            if *taken != 0 {
                pages += u64::from(taken.count_ones());
            }
        }
        // No page is behind the last one, whatever the VMM says.
        let beyond = self.page_count % WORD_PAGES;
        if let Some(last) = self.taken.last_mut().filter(|_| beyond != 0) {
            let inside = *last & ((1 << beyond) - 1);
            pages -= u64::from((*last ^ inside).count_ones());
            *last = inside;
        }
        pages
    }

    /// Copies the first `pages_max` of the taken pages.
    pub(super) fn copy(&self, pages_max: u64, into: &mut Checkpoint) -> Result<(), SysError> {
        into.pages.clear();
        let mut copied = 0;
        let mut blocks = self.blocks.iter();
        let mut block = blocks.next();
        for (first, count) in runs(&self.taken) {
            let count = count.min(pages_max - into.pages.len() as u64);
            let end = first + count;
            let bytes = bytes_of(into.pages.len() as u64 + count);
            if into.data.len() < bytes {
                into.data.resize(bytes, 0);
            }
            let mut page = first;
            // A run may go on in the next block.
            while page < end {
                while block.is_some_and(|block| block.end() <= page) {
                    block = blocks.next();
                }
                let block = block.expect("every page of the bitmap is in a block");
                let until = end.min(block.end());
                let length = bytes_of(until - page);
                let offset = (page - block.first_page) * PAGE;
                block.copy_to(offset, &mut into.data[copied..copied + length])?;
                copied += length;
                page = until;
            }
            into.pages.extend((first..end).map(PageIndex));
            if into.pages.len() as u64 == pages_max {
                break;
            }
        }
        Ok(())
    }

    /// The pages that were copied are in a checkpoint that counts. What `copy` left out stays taken.
    pub(super) fn settle(&mut self, copied: &[PageIndex]) {
        let Some(last) = copied.last() else { return };
        let whole = usize::try_from(last.0 / WORD_PAGES).expect("the page of a word");
        self.taken[..whole].fill(0);
        self.taken[whole] &= (!1u64) << (last.0 % WORD_PAGES);
    }

    /// Reads whole pages from `first` on, across blocks. Holes of the files are not filled by being read.
    ///
    /// # Errors
    /// Pages past the end, or a file that cannot be read.
    pub(super) fn read(&self, first: PageIndex, into: &mut [u8]) -> Result<(), SysError> {
        let end = first.0.checked_add(into.len() as u64 / PAGE);
        if end.is_none_or(|end| end > self.page_count) {
            return Err(SysError::OutOfBounds {
                what: "a read of pages",
                offset: first.0,
                bytes: into.len() as u64,
                limit: self.page_count,
            });
        }
        let mut page = first.0;
        let mut rest = into;
        for block in self.blocks.iter().filter(|block| block.end() > first.0) {
            let count = (block.end() - page).min(rest.len() as u64 / PAGE);
            let (now, later) = rest.split_at_mut(bytes_of(count));
            read_block(block, (page - block.first_page) * PAGE, now)?;
            (page, rest) = (page + count, later);
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// Reads a range of a block. What is no hole is brought into our page tables, so that no checkpoint has to.
fn read_block(block: &Block, offset: u64, into: &mut [u8]) -> Result<(), SysError> {
    let end = offset + into.len() as u64;
    let mut at = offset;
    while at < end {
        let from = match seek(&block.file, SeekFrom::Data(block.file_offset + at)) {
            Ok(from) => (from - block.file_offset).min(end) / PAGE * PAGE,
            Err(Errno::NXIO) => end,
            Err(errno) => return Err(SysError::call("lseek(SEEK_DATA)", errno)),
        };
        let from = from.max(at);
        slice(into, offset, at, from).fill(0);
        if from >= end {
            break;
        }
        let hole = seek(&block.file, SeekFrom::Hole(block.file_offset + from))
            .map_err(|errno| SysError::call("lseek(SEEK_HOLE)", errno))?;
        let to = (hole - block.file_offset).next_multiple_of(PAGE).min(end);
        if let Some(view) = &block.view {
            view.populate(from, to - from);
        }
        block.copy_to(from, slice(into, offset, from, to))?;
        at = to;
    }
    Ok(())
}

fn read_exact(file: &OwnedFd, mut offset: u64, into: &mut [u8]) -> Result<(), SysError> {
    let mut rest = into;
    while !rest.is_empty() {
        match pread(file, &mut *rest, offset) {
            Ok(0) => {
                return Err(SysError::OutOfBounds {
                    what: "a read of guest memory",
                    offset,
                    bytes: rest.len() as u64,
                    limit: offset,
                });
            }
            Ok(count) => {
                rest = &mut rest[count..];
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(SysError::call("pread", errno)),
        }
    }
    Ok(())
}

/// The part `from..to` of a buffer that begins at `start`.
fn slice(buffer: &mut [u8], start: u64, from: u64, to: u64) -> &mut [u8] {
    let position = |at: u64| usize::try_from(at - start).expect("inside of a buffer");
    &mut buffer[position(from)..position(to)]
}

fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages * PAGE).expect("a guest's memory fits in the address space")
}

/// The runs of set bits, as first page and count, ascending.
fn runs(words: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let mut position = 0usize;
    let mut word = words.first().copied().unwrap_or(0);
    std::iter::from_fn(move || {
        while word == 0 {
            position += 1;
            word = *words.get(position)?;
        }
        let start = word.trailing_zeros();
        let first = position as u64 * WORD_PAGES + u64::from(start);
        let mut count = u64::from((word >> start).trailing_ones());
        if u64::from(start) + count < WORD_PAGES {
            word &= !(((1u64 << count) - 1) << start);
            return Some((first, count));
        }
        // It reaches the word's end: it may go on in the next.
        loop {
            position += 1;
            word = words.get(position).copied().unwrap_or(0);
            let more = u64::from(word.trailing_ones());
            count += more;
            if more < WORD_PAGES {
                word &= u64::MAX
                    .checked_shl(u32::try_from(more).expect("at most 64"))
                    .unwrap_or(0);
                return Some((first, count));
            }
        }
    })
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
