//! Huge pages under the data of a file in memory (on a tmpfs, or a memory fd), where that takes no more memory than before.
//!
//! Only ranges of the size of a huge page that have no hole are moved onto one (`MADV_COLLAPSE`, Linux 6.1), so that what reads as
//! zeros goes on costing nothing. Contents stay as they are, whoever writes meanwhile, and so do others' mappings.

use std::fs::File;
use std::ptr::NonNull;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::SysError;

/// A huge page of x86-64, in bytes.
const HUGE_BYTES: u64 = 2 << 20;
const HUGE_BYTES_USIZE: usize = 2 << 20;

/// What became of a file's ranges of the size of a huge page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// Ranges that are on a huge page now.
    pub huge: u64,
    /// Ranges with data that the kernel left as they were: no huge page was free, or others used them.
    pub left: u64,
}

/// Puts the data of a file onto huge pages. Takes about half a millisecond for each.
///
/// # Errors
/// The kernel's; from `MADV_COLLAPSE` when it has no huge pages for files in memory, or is older than Linux 6.1.
pub fn use_huge_pages(file: &File) -> Result<HugePages, SysError> {
    let window = Window::reserve()?;
    let mut found = HugePages::default();
    let mut from = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(found),
            Err(errno) => return Err(SysError::call("lseek(SEEK_DATA)", errno)),
        };
        let hole =
            seek(file, SeekFrom::Hole(start)).map_err(|errno| SysError::call("lseek(SEEK_HOLE)", errno))?;
        let mut offset = start.next_multiple_of(HUGE_BYTES);
        while offset + HUGE_BYTES <= hole {
            match window.collapse(file, offset) {
                Ok(()) => found.huge += 1,
                Err(Errno::AGAIN | Errno::NOMEM | Errno::BUSY) => found.left += 1,
                Err(errno) => return Err(SysError::call("madvise(MADV_COLLAPSE)", errno)),
            }
            offset += HUGE_BYTES;
        }
        from = hole;
    }
}

/// Addresses of our own for one huge page.
struct Window {
    base: NonNull<libc::c_void>,
}

impl Window {
    const BYTES: usize = 2 * HUGE_BYTES_USIZE;

    fn reserve() -> Result<Self, SysError> {
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced, and nobody can read or write it.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                Self::BYTES,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )
        }
        .map_err(|errno| SysError::call("mmap", errno))?;
        Ok(Self {
            base: NonNull::new(base).expect("mmap never returns null without MAP_FIXED"),
        })
    }

    /// Maps this range of the file and asks for it to be on a huge page.
    fn collapse(&self, file: &File, offset: u64) -> Result<(), Errno> {
        let start = self.base.as_ptr().cast::<u8>();
        let skipped = start.align_offset(HUGE_BYTES_USIZE);
        let place = start.wrapping_add(skipped).cast();
        // SAFETY: the range lies within the addresses that `reserve` got, whose mapping is replaced; it is only given to the
        // kernel and never read or written here, so that a file that shrinks does no harm. Collapsing changes no content.
        unsafe {
            mmap(
                place,
                HUGE_BYTES_USIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                file,
                offset,
            )?;
            if libc::madvise(place, HUGE_BYTES_USIZE, libc::MADV_COLLAPSE) != 0 {
                return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL));
            }
        }
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: base and length are those of `reserve`; what was mapped in between lies within them.
        let unmapped = unsafe { munmap(self.base.as_ptr(), Self::BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use rustix::fs::{MemfdFlags, memfd_create};

    #[test]
    fn full_ranges_go_onto_huge_pages_and_holes_stay_holes() {
        let file = File::from(memfd_create("romulus-huge", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(8 * HUGE_BYTES).unwrap();
        let data: Vec<u8> = (0..HUGE_BYTES_USIZE)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        // Two full ranges, one with a hole of a page in its middle, an empty one, one that begins too late.
        for offset in [0, 1, 2] {
            file.write_all_at(&data, offset * HUGE_BYTES).unwrap();
        }
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, 2 * HUGE_BYTES + 40 * 4096, 4096).unwrap();
        file.write_all_at(&data[4096..], 4 * HUGE_BYTES + 4096).unwrap();
        let blocks = file.metadata().unwrap().blocks();
        let found = use_huge_pages(&file).unwrap();
        assert_eq!(found.huge + found.left, 2);
        assert_eq!(
            file.metadata().unwrap().blocks(),
            blocks,
            "no more memory than before"
        );
        let mut read = vec![0; HUGE_BYTES_USIZE];
        for offset in [0, 1] {
            file.read_exact_at(&mut read, offset * HUGE_BYTES).unwrap();
            assert!(read == data);
        }
        // A page that becomes zeros is a hole again.
        rustix::fs::fallocate(&file, flags, 40 * 4096, 4096).unwrap();
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read[40 * 4096..41 * 4096].iter().all(|byte| *byte == 0));
        assert!(read[..40 * 4096] == data[..40 * 4096] && read[41 * 4096..] == data[41 * 4096..]);
    }
}
