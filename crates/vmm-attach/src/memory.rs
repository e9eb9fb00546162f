//! Guest memory on files that another process can map, and the dirty bitmap that it shares.
//!
//! ```text
//!   page of guest memory   0 1 2 ...              one numbering over all regions, in their order
//!   bitmap, 64-bit words   | bit 0 = lowest page | ...
//!   set by                 the VMM's own writes (SharedBitmap, through vm-memory), the kernel's log (DirtyTracker)
//!   taken by               the sidecar: a word at a time, by an atomic exchange with 0
//! ```
//!
//! Invariant: a bit is set *after* the write that it tells of, by a locked instruction, and whoever takes it
//! copies the page after that. So a write is either in the copy or its bit is still to be taken.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use romulus_host_sys::{SharedWords, SysError};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::memfd;
use crate::proto::{MEMORY_BYTES_MAX, PAGE_BYTES, REGIONS_MAX, Region};

/// Why guest memory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The list of regions is not usable.
    #[error(
        "a machine has 1 to {REGIONS_MAX} regions of memory with {MEMORY_BYTES_MAX} bytes at most, not {regions} with {bytes}"
    )]
    Count {
        /// How many there are.
        regions: usize,
        /// Their bytes together.
        bytes: u64,
    },
    /// A region is not made of pages.
    #[error(
        "region {name:?}: its {bytes} bytes at {gpa:#x}, file offset {fd_offset}, are not whole pages of {PAGE_BYTES} bytes"
    )]
    Alignment {
        /// The region.
        name: String,
        /// Where it begins in the guest.
        gpa: u64,
        /// Its length.
        bytes: u64,
        /// Where it begins in its file.
        fd_offset: u64,
    },
    /// The regions overlap or are not in order.
    #[error("the regions of guest memory overlap or are not ordered by their addresses")]
    Overlap,
    /// The number of files is not that of the regions.
    #[error("{regions} regions came with {files} files")]
    Files {
        /// Regions.
        regions: usize,
        /// Files.
        files: usize,
    },
    /// A file is shorter than its region.
    #[error("region {name:?} ends at {end} of its file, which has {file_bytes} bytes")]
    FileTooShort {
        /// The region.
        name: String,
        /// Where it ends in the file.
        end: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// The kernel refused memory.
    #[error("guest memory cannot be had: {0}")]
    Kernel(#[from] std::io::Error),
    /// The kernel refused a mapping.
    #[error("region {name:?} cannot be mapped: {source}")]
    Map {
        /// The region.
        name: String,
        /// What the kernel said.
        source: MmapRegionError,
    },
    /// The bitmap cannot be shared.
    #[error("the dirty bitmap: {0}")]
    Bitmap(#[from] SysError),
}

/// The memory of a guest, and the bitmap of the pages that were written.
#[derive(Clone, Debug)]
pub struct GuestRam {
    specs: Vec<Region>,
    files: Vec<Arc<File>>,
    memory: GuestMemoryMmap<SharedBitmap>,
    bitmap: DirtyBitmap,
}

impl GuestRam {
    /// Makes new memory, all zeros, on a sealed memory fd for each region. `fd_offset` has to be 0.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn create(specs: &[Region]) -> Result<Self, MemoryError> {
        check(specs)?;
        let mut files = Vec::with_capacity(specs.len());
        for spec in specs {
            files.push(sealed_memory(&spec.name, spec.bytes)?);
        }
        Self::map(specs, files, false)
    }

    /// Maps memory that lies in files already. `private`: what the guest writes stays ours, the files keep what
    /// they have.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn map(specs: &[Region], files: Vec<OwnedFd>, private: bool) -> Result<Self, MemoryError> {
        let pages = check(specs)?;
        if files.len() != specs.len() {
            return Err(MemoryError::Files {
                regions: specs.len(),
                files: files.len(),
            });
        }
        let bitmap = DirtyBitmap::new(pages)?;
        let files: Vec<Arc<File>> = files.into_iter().map(|fd| Arc::new(File::from(fd))).collect();
        let mut regions = Vec::with_capacity(specs.len());
        let mut first_page = 0;
        for (spec, file) in specs.iter().zip(&files) {
            let part = bitmap.part(first_page, spec.bytes / PAGE_BYTES);
            regions.push(map_region(spec, file, part, private)?);
            first_page += spec.bytes / PAGE_BYTES;
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|_| MemoryError::Overlap)?;
        Ok(Self {
            specs: specs.to_vec(),
            files,
            memory,
            bitmap,
        })
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.specs
    }

    /// The files of the regions, in order.
    pub fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.files.iter().map(|file| file.as_fd())
    }

    /// The memory, for the VMM's devices. What they write through it is in the bitmap.
    pub fn memory(&self) -> &GuestMemoryMmap<SharedBitmap> {
        &self.memory
    }

    /// The bitmap.
    pub fn bitmap(&self) -> &DirtyBitmap {
        &self.bitmap
    }
}

/// Checks the regions and counts their pages.
fn check(specs: &[Region]) -> Result<u64, MemoryError> {
    let bytes = specs
        .iter()
        .fold(0u64, |sum, spec| sum.saturating_add(spec.bytes));
    if specs.is_empty() || specs.len() > REGIONS_MAX || bytes > MEMORY_BYTES_MAX {
        return Err(MemoryError::Count {
            regions: specs.len(),
            bytes,
        });
    }
    let mut end = 0;
    for spec in specs {
        let whole = |number: u64| number.is_multiple_of(PAGE_BYTES);
        if spec.bytes == 0 || !(whole(spec.gpa) && whole(spec.bytes) && whole(spec.fd_offset)) {
            return Err(MemoryError::Alignment {
                name: spec.name.clone(),
                gpa: spec.gpa,
                bytes: spec.bytes,
                fd_offset: spec.fd_offset,
            });
        }
        let next = spec.gpa.checked_add(spec.bytes).ok_or(MemoryError::Overlap)?;
        if spec.gpa < end {
            return Err(MemoryError::Overlap);
        }
        end = next;
    }
    Ok(bytes / PAGE_BYTES)
}

fn sealed_memory(name: &str, bytes: u64) -> Result<OwnedFd, MemoryError> {
    let printable: String = name
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(32)
        .collect();
    Ok(memfd::sealed(&format!("romulus-{printable}"), bytes)?)
}

fn map_region(
    spec: &Region,
    file: &Arc<File>,
    bitmap: SharedBitmap,
    private: bool,
) -> Result<GuestRegionMmap<SharedBitmap>, MemoryError> {
    let file_bytes = file.metadata()?.len();
    let end = spec.fd_offset.saturating_add(spec.bytes);
    if end > file_bytes {
        return Err(MemoryError::FileTooShort {
            name: spec.name.clone(),
            end,
            file_bytes,
        });
    }
    let sharing = if private {
        libc::MAP_PRIVATE
    } else {
        libc::MAP_SHARED
    };
    let bytes = usize::try_from(spec.bytes).expect("64-bit hosts only");
    let mapping = MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), spec.fd_offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE | sharing)
        .build()
        .map_err(|source| MemoryError::Map {
            name: spec.name.clone(),
            source,
        })?;
    GuestRegionMmap::new(mapping, GuestAddress(spec.gpa)).ok_or(MemoryError::Overlap)
}

/// The dirty bitmap of all of guest memory.
#[derive(Clone, Debug)]
pub struct DirtyBitmap {
    words: Arc<SharedWords>,
    file: Arc<OwnedFd>,
    pages: u64,
}

impl DirtyBitmap {
    /// Makes a bitmap for `pages` pages, all clean.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(pages: u64) -> Result<Self, MemoryError> {
        let words = pages.div_ceil(64);
        let file = sealed_memory("dirty", words * 8)?;
        let words = SharedWords::map(&file, usize::try_from(words).expect("64-bit hosts only"))?;
        Ok(Self {
            words: Arc::new(words),
            file: Arc::new(file),
            pages,
        })
    }

    /// The file to give to the sidecar.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// Pages that it covers.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages whose bits are set.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            // Most are empty, and counting takes longer than looking.
            .filter(|word| *word != 0)
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Sets all bits to 0.
    pub fn clear(&self) {
        for word in self.words.iter() {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Takes word `index` as the sidecar does: returns it and leaves 0.
    ///
    /// # Panics
    /// When there is no such word.
    pub fn take(&self, index: usize) -> u64 {
        self.words[index].swap(0, Ordering::SeqCst)
    }

    /// Sets the bits that are set in `bits`, whose bit 0 is page `first_page`. Bits past the last page of the
    /// bitmap are left out.
    pub fn merge(&self, first_page: u64, bits: &[u64]) {
        let (word, shift) = (first_page / 64, first_page % 64);
        for (index, bits) in (word..).zip(bits.iter().copied()) {
            if bits == 0 {
                continue;
            }
            self.or(index, bits << shift);
            if shift != 0 {
                self.or(index + 1, bits >> (64 - shift));
            }
        }
    }

    /// The part of one region.
    fn part(&self, first_page: u64, pages: u64) -> SharedBitmap {
        SharedBitmap {
            bitmap: self.clone(),
            first_page,
            pages,
        }
    }

    fn or(&self, word: u64, bits: u64) {
        let inside = self.pages.saturating_sub(word * 64);
        let bits = if inside < 64 {
            bits & ((1 << inside) - 1)
        } else {
            bits
        };
        if bits != 0 {
            let word = usize::try_from(word).expect("64-bit hosts only");
            self.words[word].fetch_or(bits, Ordering::SeqCst);
        }
    }
}

/// One region's part of the dirty bitmap: what vm-memory tells of the VMM's own writes.
#[derive(Clone, Debug)]
pub struct SharedBitmap {
    bitmap: DirtyBitmap,
    first_page: u64,
    pages: u64,
}

impl<'a> WithBitmapSlice<'a> for SharedBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for SharedBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let offset = offset as u64;
        if len == 0 || offset >= self.pages * PAGE_BYTES {
            return;
        }
        let first = offset / PAGE_BYTES;
        let last = (offset.saturating_add(len as u64 - 1) / PAGE_BYTES).min(self.pages - 1);
        let (first, last) = (self.first_page + first, self.first_page + last);
        for word in first / 64..=last / 64 {
            let low = first.max(word * 64) % 64;
            let high = last.min(word * 64 + 63) % 64;
            // Never skipped because the bit seems to be set already: it may be taken at this very moment.
            self.bitmap
                .or(word, (u64::MAX << low) & (u64::MAX >> (63 - high)));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_BYTES;
        if page >= self.pages {
            return false;
        }
        let page = self.first_page + page;
        let word = usize::try_from(page / 64).expect("64-bit hosts only");
        self.bitmap.words[word].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
