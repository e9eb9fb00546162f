//! A file's memory as atomic 64-bit words: what two processes write at the same time, such as a dirty bitmap.

use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::SysError;

/// A shared, writable mapping of the start of a file, as words.
#[derive(Debug)]
pub struct SharedWords {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the type owns its mapping and hands out nothing but references to atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above; atomics may be used from several threads.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `words` words of `file`, a memory fd that is sealed against shrinking: touching a mapping
    /// past the end of its file would raise SIGBUS, and the file may come from somebody else.
    ///
    /// # Errors
    /// [`SysError::NotSealed`]; [`SysError::OutOfBounds`] when the file is shorter or `words` is zero; the
    /// kernel's, from mmap(2).
    pub fn map(file: impl AsFd, words: usize) -> Result<Self, SysError> {
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Err(SysError::NotSealed);
        }
        let stat = rustix::fs::fstat(&file).map_err(|errno| SysError::call("fstat", errno))?;
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let bytes = words
            .checked_mul(size_of::<u64>())
            .filter(|bytes| *bytes > 0 && *bytes as u64 <= file_bytes);
        let Some(bytes) = bytes else {
            return Err(SysError::OutOfBounds {
                what: "a mapping",
                offset: 0,
                bytes: (words as u64).saturating_mul(8),
                limit: file_bytes,
            });
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced, and the pointer is only
        // used by this type, within `bytes`.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, file, 0) }
            .map_err(|errno| SysError::call("mmap", errno))?;
        let base = NonNull::new(base.cast()).expect("mmap never returns null without MAP_FIXED");
        Ok(Self { base, words })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, holds `words` words and lives as long as `self`; every bit
        // pattern is a valid word, and others change them with atomic accesses only, as we do.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping that `map` made, and nobody uses it after this.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.words * size_of::<u64>()) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    fn memory() -> std::os::fd::OwnedFd {
        let file = memfd_create("words", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 4096).unwrap();
        file
    }

    #[test]
    fn two_mappings_of_one_file_see_each_others_bits_and_bounds_hold() {
        let file = memory();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let map = || SharedWords::map(&file, 512).unwrap();
        let (ours, theirs) = (map(), map());
        ours[511].fetch_or(5, Ordering::SeqCst);
        assert_eq!(theirs[511].swap(0, Ordering::SeqCst), 5);
        assert_eq!(ours[511].load(Ordering::SeqCst), 0);
        for words in [0, 513, usize::MAX] {
            let refused = SharedWords::map(&file, words);
            assert!(
                matches!(refused, Err(SysError::OutOfBounds { .. })),
                "{words} words"
            );
        }
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(4096).unwrap();
        assert!(matches!(SharedWords::map(&plain, 1), Err(SysError::NotSealed)));
        assert!(matches!(SharedWords::map(memory(), 1), Err(SysError::NotSealed)));
    }
}
