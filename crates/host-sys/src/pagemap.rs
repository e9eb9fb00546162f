//! Which pages were written: PAGEMAP_SCAN on `/proc/PID/pagemap`
//! (Documentation/admin-guide/mm/pagemap.rst, "Pagemap Scan IOCTL").
//!
//! A harvest reads and protects again in one step of the kernel, so that no write falls between the two.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::SysError;
use crate::spans::Spans;

/// `PAGEMAP_SCAN`: _IOWR('f', 16, 96 bytes).
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const SCAN_WP_MATCHING: u64 = 1 << 0;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Most regions taken from the kernel in one call.
const REGIONS_A_CALL: usize = 16_384;

/// A run of pages, by address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    pub(crate) categories: u64,
}

impl PageRegion {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

#[repr(C)]
#[derive(Default)]
struct ScanRequest {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The page tables of one process. Keeps its result vectors between calls.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    regions: Vec<PageRegion>,
    spans: Spans,
}

impl Pagemap {
    /// Opens the page map of process `pid`.
    ///
    /// # Errors
    /// EACCES or EPERM when we may not trace it.
    pub fn open(pid: u32) -> Result<Self, SysError> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|source| SysError::Proc { path, source })?;
        Ok(Self {
            file,
            regions: vec![PageRegion::default(); REGIONS_A_CALL],
            spans: Spans::default(),
        })
    }

    /// Takes at most so many regions from the kernel in one call, instead of the default.
    ///
    /// # Panics
    /// When it is zero.
    pub fn limit_regions_a_call(&mut self, regions_max: usize) {
        assert!(regions_max > 0, "a scan needs room for at least one region");
        self.regions.resize(regions_max, PageRegion::default());
    }

    /// Reports the written pages of `[start, end)` in ascending order and write-protects them again.
    ///
    /// # Errors
    /// EPERM when a part of the range is not registered for asynchronous write protection. After any error
    /// the whole range has to be taken as written: pages already protected again were perhaps not reported.
    pub fn harvest_written(
        &mut self,
        start: u64,
        end: u64,
        mut found: impl FnMut(&PageRegion),
    ) -> Result<(), SysError> {
        let mut position = start;
        while position < end {
            let (count, walk_end) = self.scan(position, end, SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC)?;
            self.regions[..count].iter().for_each(&mut found);
            position = walk_end;
        }
        Ok(())
    }

    /// The same for memory that KVM knows. What is written meanwhile may be reported now or by the next harvest.
    ///
    /// The kernel tells KVM of all of a range that it protects pages of, and KVM forgets how it finds that memory: the guest pays with a
    /// fault for each page of it that it touches next. So this looks first, and leaves out where nothing was written.
    ///
    /// # Errors
    /// As [`Pagemap::harvest_written`].
    pub fn harvest_written_apart(
        &mut self,
        start: u64,
        end: u64,
        mut found: impl FnMut(&PageRegion),
    ) -> Result<(), SysError> {
        let mut position = start;
        while position < end {
            let (count, walk_end) = self.scan(position, end, SCAN_CHECK_WPASYNC)?;
            position = walk_end;
            let mut spans = std::mem::take(&mut self.spans);
            let mut parts = spans.around(&self.regions[..count]).iter();
            let harvested = parts.try_for_each(|part| self.harvest_written(part.start, part.end, &mut found));
            self.spans = spans;
            harvested?;
        }
        Ok(())
    }

    /// Counts the pages of `[start, end)` that were written, and changes nothing.
    ///
    /// # Errors
    /// As [`Pagemap::harvest_written`].
    pub fn count_written(&mut self, start: u64, end: u64) -> Result<u64, SysError> {
        let mut position = start;
        let mut bytes = 0;
        while position < end {
            let (count, walk_end) = self.scan(position, end, SCAN_CHECK_WPASYNC)?;
            bytes += self.regions[..count].iter().map(PageRegion::bytes).sum::<u64>();
            position = walk_end;
        }
        Ok(bytes / 4096)
    }

    /// One call: how many regions it found, and how far it came.
    fn scan(&mut self, start: u64, end: u64, flags: u64) -> Result<(usize, u64), SysError> {
        let mut request = ScanRequest {
            size: size_of::<ScanRequest>() as u64,
            flags,
            start,
            end,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..ScanRequest::default()
        };
        // SAFETY: the request is the struct that this ioctl reads and writes; its vector is our own, of the
        // length given, and outlives the call. The kernel writes plain numbers into it.
        let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut request) };
        let count = usize::try_from(count).map_err(|_| SysError::last("ioctl(PAGEMAP_SCAN)"))?;
        let walk_end = request.walk_end;
        assert!(
            walk_end > start && walk_end <= end,
            "the kernel's scan moves forward"
        );
        Ok((count, walk_end))
    }
}
