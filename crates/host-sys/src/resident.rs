//! Buffers whose memory is there before it is needed.

use rustix::mm::{Advice, madvise};

/// The smallest page; huge pages are made of whole ones of these.
const PAGE_BYTES: usize = 4096;

/// A buffer of `bytes` zeros, all of it in memory, on huge pages where the kernel has some: copying many small pieces into those
/// looks up far fewer translations.
pub fn resident_buffer(bytes: usize) -> Vec<u8> {
    let mut buffer = Vec::with_capacity(bytes);
    let spare = buffer.spare_capacity_mut();
    let skipped = spare.as_ptr().align_offset(PAGE_BYTES);
    let whole = spare.len().saturating_sub(skipped) / PAGE_BYTES * PAGE_BYTES;
    if whole > 0 {
        let start = spare.as_mut_ptr().wrapping_add(skipped).cast();
        // SAFETY: the range is inside of the vector's own memory, and this advice changes no content. It is only asked for: a
        // kernel without huge pages refuses, and nothing is lost.
        let _ = unsafe { madvise(start, whole, Advice::LinuxHugepage) };
    }
    // Writing brings the pages in, after the advice.
    buffer.resize(bytes, 0);
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_as_long_as_asked_for_and_all_zeros() {
        for bytes in [0, 1, 4095, 4096, 8193, 5 << 20] {
            let buffer = resident_buffer(bytes);
            assert_eq!(buffer.len(), bytes);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_large_buffer_needs_no_page_later() {
        let mut buffer = resident_buffer(16 << 20);
        let before = minor_faults();
        buffer.chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 1);
        assert!(minor_faults() - before < 64, "4096 pages were written");
    }

    /// Minor page faults of this thread.
    fn minor_faults() -> i64 {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the kernel fills the struct that the pointer is to.
        let usage = unsafe {
            assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()), 0);
            usage.assume_init()
        };
        usage.ru_minflt
    }
}
