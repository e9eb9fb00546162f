//! A vCPU's dirty ring: the kernel writes the pages that the vCPU dirtied, user space takes them out and hands
//! them back (`Documentation/virt/kvm/api.rst`, section 8.29).
//!
//! ```text
//!   flags of an entry:   0 empty ──kernel──► 1 dirty ──we──► 2 harvested ──KVM_RESET_DIRTY_RINGS──► 0
//! ```

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::SysError;

const PAGE_BYTES: u64 = 4096;
const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

/// An entry, `struct kvm_dirty_gfn`. Atomic, as the kernel writes it while we read.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    page: AtomicU64,
}

/// The mapped dirty ring of one vCPU.
#[derive(Debug)]
pub struct DirtyRing {
    base: NonNull<Entry>,
    entries: usize,
    next: usize,
}

// SAFETY: the ring owns its mapping and reaches it through atomics only.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Maps a vCPU's ring. `entries` is the size that was given to `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`, in entries.
    ///
    /// # Errors
    /// The kernel's: EINVAL when the VM has no rings or smaller ones.
    pub fn map(vcpu: &VcpuFd, entries: usize) -> Result<Self, SysError> {
        let bytes = entries * size_of::<Entry>();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_BYTES;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the fd belongs to `vcpu`, which is borrowed for the call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced; it checks that the ring has
        // this length; the pointer is only used by this type, within it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                fd,
                offset,
            )
        }
        .map_err(|errno| SysError::call("mmap of a dirty ring", errno))?;
        let base = NonNull::new(base.cast()).expect("mmap never returns null without MAP_FIXED");
        Ok(Self {
            base,
            entries,
            next: 0,
        })
    }

    /// Takes out what is in the ring, at most one round of it: calls `each` with slot and page within the slot.
    /// The pages are not protected again before [`super::KvmSlots::reset_dirty_rings`].
    pub fn harvest(&mut self, mut each: impl FnMut(u32, u64)) -> usize {
        for taken in 0..self.entries {
            let entry = self.entry(self.next);
            if entry.flags.load(Ordering::Acquire) & DIRTY == 0 {
                return taken;
            }
            each(
                entry.slot.load(Ordering::Relaxed),
                entry.page.load(Ordering::Relaxed),
            );
            entry.flags.store(HARVESTED, Ordering::Release);
            self.next = (self.next + 1) % self.entries;
        }
        self.entries
    }

    fn entry(&self, index: usize) -> &Entry {
        assert!(index < self.entries);
        // SAFETY: the index is inside the mapping, which is page-aligned and lives as long as `self`; all fields
        // are atomics, for which every bit pattern is valid.
        unsafe { self.base.add(index).as_ref() }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping that `map` made, and nobody uses it after this.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.entries * size_of::<Entry>()) };
        debug_assert!(unmapped.is_ok());
    }
}
