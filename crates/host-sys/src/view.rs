//! A read-only view of a file that somebody else writes at the same time: a guest's shared memory.
//!
//! Rust has no references into memory that changes under it, so none is ever made: the mapping stays a raw
//! pointer and the bytes are copied out of it.

use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::SysError;

/// A shared, read-only mapping of a range of a file or memory fd.
#[derive(Debug)]
pub struct SharedView {
    base: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: the view owns its mapping, and copying out of it from any thread is as (un)synchronised as from one.
unsafe impl Send for SharedView {}

impl SharedView {
    /// Maps `bytes` of `file` from `offset` (a multiple of the page size).
    ///
    /// # Errors
    /// The kernel's, from mmap(2); [`SysError::OutOfBounds`] when the file is shorter, since touching such a
    /// mapping past the file's end would raise SIGBUS.
    pub fn map(file: impl AsFd, offset: u64, bytes: u64) -> Result<Self, SysError> {
        let stat = rustix::fs::fstat(&file).map_err(|errno| SysError::call("fstat", errno))?;
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let outside = SysError::OutOfBounds {
            what: "a mapping",
            offset,
            bytes,
            limit: file_bytes,
        };
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= file_bytes);
        let Some(length) = usize::try_from(bytes).ok().filter(|length| inside && *length > 0) else {
            return Err(outside);
        };
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced, and the pointer is only
        // used by this type, within `length`.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                offset,
            )
        }
        .map_err(|errno| SysError::call("mmap", errno))?;
        let base = NonNull::new(base).expect("mmap never returns null without MAP_FIXED");
        Ok(Self { base, bytes: length })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Copies `into.len()` bytes from `offset`. While the writer runs, the copy may mix old and new bytes.
    ///
    /// # Errors
    /// [`SysError::OutOfBounds`] when the range is not inside.
    pub fn copy_to(&self, offset: u64, into: &mut [u8]) -> Result<(), SysError> {
        let inside = usize::try_from(offset)
            .ok()
            .filter(|start| start.checked_add(into.len()).is_some_and(|end| end <= self.bytes));
        let Some(start) = inside else {
            return Err(SysError::OutOfBounds {
                what: "a copy",
                offset,
                bytes: into.len() as u64,
                limit: self.bytes as u64,
            });
        };
        // SAFETY: the source range is inside the mapping, which lives as long as `self`; the destination is
        // a live exclusive slice, so the two cannot overlap. The writer is another process (a guest), so no
        // Rust reference to the source exists anywhere, and plain bytes have no invalid values: a race yields
        // a mixture, never undefined values. The caller stops the guest or copies the page again.
        unsafe {
            let from = self.base.as_ptr().cast::<u8>().add(start);
            std::ptr::copy_nonoverlapping(from.cast_const(), into.as_mut_ptr(), into.len());
        }
        Ok(())
    }

    /// Brings a range of the mapping (whole pages) into our page tables now, so that no later copy takes a fault for it. A hole
    /// of the file is filled by that. What is outside of the mapping is left out. Best effort: on kernels without it the
    /// copies fault one by one.
    pub fn populate(&self, offset: u64, bytes: u64) {
        let within = |value: u64| usize::try_from(value).map_or(self.bytes, |value| value.min(self.bytes));
        let (start, end) = (within(offset), within(offset.saturating_add(bytes)));
        // SAFETY: the range is inside of our mapping, and populating it for reading changes no content.
        let _ = unsafe {
            let from = self.base.as_ptr().cast::<u8>().add(start);
            libc::madvise(from.cast(), end - start, libc::MADV_POPULATE_READ)
        };
    }
}

impl Drop for SharedView {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping that `map` made, and nobody uses it after this.
        let unmapped = unsafe { munmap(self.base.as_ptr(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[test]
    fn later_writes_by_others_are_seen_and_bounds_hold() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        let view = SharedView::map(&file, 4096, 4096).unwrap();
        view.populate(0, view.bytes());
        view.populate(4000, u64::MAX);
        file.write_all_at(&[9; 10], 4100).unwrap();
        let mut into = [0; 10];
        view.copy_to(4, &mut into).unwrap();
        assert_eq!(into, [9; 10]);
        assert!(view.copy_to(4087, &mut into).is_err());
        assert!(view.copy_to(u64::MAX, &mut into).is_err());
        assert!(
            SharedView::map(&file, 4096, 8192).is_err(),
            "past the end of the file"
        );
    }
}
