//! The machine's memory, given out once at boot, from the end of the image to the end of the RAM.

use core::slice;

use romulus_guest_core::abi::{BootInfo, RAM_HIGH_START};
use romulus_guest_core::page::{PAGE_BYTES, PAGE_WORDS};

/// A page as words.
pub type Page = [u64; PAGE_WORDS];

unsafe extern "C" {
    static image_end: u8;
}

/// RAM that was not given out yet.
pub struct Memory {
    low: (u64, u64),
    high: (u64, u64),
}

impl Memory {
    /// All RAM behind the image.
    ///
    /// # Safety
    /// To be called once: the memory is given out as exclusive references.
    pub unsafe fn new(info: &BootInfo) -> Self {
        let start = (&raw const image_end) as u64;
        Memory {
            low: (start, info.ram_low_bytes),
            high: (RAM_HIGH_START, RAM_HIGH_START + info.ram_high_bytes),
        }
    }

    /// Pages that are left of low and of high memory.
    pub fn pages_left(&self) -> (usize, usize) {
        let pages = |(start, end): (u64, u64)| {
            usize::try_from(end.saturating_sub(start.next_multiple_of(PAGE_BYTES as u64))).unwrap_or(0)
                / PAGE_BYTES
        };
        (pages(self.low), pages(self.high))
    }

    /// Takes whole pages of memory under 4 GiB.
    ///
    /// # Panics
    /// When there are not so many: the VMM has given too little RAM for the command line.
    pub fn take_pages(&mut self, pages: usize) -> &'static mut [Page] {
        take_from(&mut self.low, pages)
    }

    /// Takes whole pages of memory over 4 GiB.
    ///
    /// # Panics
    /// As [`Memory::take_pages`].
    pub fn take_high_pages(&mut self, pages: usize) -> &'static mut [Page] {
        take_from(&mut self.high, pages)
    }

    /// Puts a value into memory of its own.
    ///
    /// # Panics
    /// As [`Memory::take_pages`].
    pub fn place<T>(&mut self, value: T) -> &'static mut T {
        const { assert!(align_of::<T>() <= PAGE_BYTES) };
        let place = self
            .take_pages(size_of::<T>().div_ceil(PAGE_BYTES))
            .as_mut_ptr()
            .cast::<T>();
        // SAFETY: the pages are ours alone, aligned, and large enough; the value is written before it is referred to.
        unsafe {
            place.write(value);
            &mut *place
        }
    }

    /// Takes bytes, beginning with a page. They are zero when the machine is fresh.
    ///
    /// # Panics
    /// As [`Memory::take_pages`].
    pub fn take_bytes(&mut self, bytes: usize) -> &'static mut [u8] {
        let pages = self.take_pages(bytes.div_ceil(PAGE_BYTES));
        let first = pages.as_mut_ptr().cast::<u8>();
        // SAFETY: the pages are ours alone, hold at least so many bytes, and any bytes are valid bytes.
        unsafe { slice::from_raw_parts_mut(first, bytes) }
    }
}

fn take_from(range: &mut (u64, u64), pages: usize) -> &'static mut [Page] {
    let start = range.0.next_multiple_of(PAGE_BYTES as u64);
    let end = start + (pages * PAGE_BYTES) as u64;
    assert!(end <= range.1, "too little RAM: {pages} more pages are wanted");
    range.0 = end;
    // SAFETY: the range is mapped RAM behind the image, aligned, and given out this once; any words are valid words.
    unsafe { slice::from_raw_parts_mut(start as *mut Page, pages) }
}

/// Pages of low and high memory that are used as one set, taking turns, so that a small set has some of both.
pub struct Pages {
    low: &'static mut [Page],
    high: &'static mut [Page],
}

impl Pages {
    /// One set of both.
    pub fn new(low: &'static mut [Page], high: &'static mut [Page]) -> Self {
        Pages { low, high }
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.low.len() + self.high.len()
    }

    /// A page of the set.
    pub fn page(&mut self, index: usize) -> &mut Page {
        let shorter = self.low.len().min(self.high.len());
        match index {
            index if index >= 2 * shorter && self.low.len() > shorter => &mut self.low[index - shorter],
            index if index >= 2 * shorter => &mut self.high[index - shorter],
            index if index % 2 == 0 => &mut self.low[index / 2],
            index => &mut self.high[index / 2],
        }
    }
}
