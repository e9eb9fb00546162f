//! A VM's memory slots, one for each region of guest memory.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{ioctl, request};
use crate::SysError;

const PAGE_BYTES: u64 = 4096;
/// `struct kvm_dirty_log` and `struct kvm_clear_dirty_log`, as the kernel has them.
#[repr(C)]
struct GetDirtyLog {
    slot: u32,
    padding: u32,
    bitmap: u64,
}

#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    page_count: u32,
    first_page: u64,
    bitmap: u64,
}

const KVM_GET_DIRTY_LOG: u64 = request(1, 0x42, size_of::<GetDirtyLog>());
const KVM_CLEAR_DIRTY_LOG: u64 = request(3, 0xc0, size_of::<ClearDirtyLog>());
const KVM_RESET_DIRTY_RINGS: u64 = request(0, 0xc7, 0);

/// The memory slots of a VM: slot n is region n. Owns what the kernel was told the addresses of: it keeps the
/// mappings, and takes the slots away before it lets go of them.
pub struct KvmSlots {
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
}

struct Slot {
    region: kvm_userspace_memory_region,
    _mapping: Arc<dyn Any + Send + Sync>,
}

impl KvmSlots {
    /// Gives the VM all regions of `memory`, without dirty logging.
    ///
    /// # Errors
    /// The kernel's, from `KVM_SET_USER_MEMORY_REGION`: EEXIST when the VM has memory there already, EINVAL when
    /// a region's address or length is not a multiple of the page size.
    pub fn map<B>(vm: Arc<VmFd>, memory: &GuestMemoryMmap<B>) -> Result<Self, SysError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mut slots = Self {
            vm,
            slots: Vec::new(),
        };
        for (number, region) in (0u32..).zip(memory.iter()) {
            let mapping = region.get_mmap();
            let description = kvm_userspace_memory_region {
                slot: number,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: mapping.as_ptr() as u64,
            };
            slots.set(description)?;
            slots.slots.push(Slot {
                region: description,
                _mapping: mapping,
            });
        }
        Ok(slots)
    }

    /// Pages of each region, in order.
    pub fn region_pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.slots.iter().map(|slot| slot.region.memory_size / PAGE_BYTES)
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Switches the kernel's dirty logging of all slots. The guest may run meanwhile.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_logging(&self, on: bool) -> Result<(), SysError> {
        for slot in &self.slots {
            let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            self.set(kvm_userspace_memory_region { flags, ..slot.region })?;
        }
        Ok(())
    }

    /// Reads a slot's dirty log into `into`, one bit a page from the lowest bit of the first word.
    ///
    /// # Errors
    /// ENOENT when the slot is not logged, ENXIO when the VM has dirty rings;
    /// [`SysError::OutOfBounds`] when `into` is too short or there is no such slot.
    pub fn dirty_log(&self, slot: usize, into: &mut [u64]) -> Result<(), SysError> {
        let pages = self.check(slot, 0, into.len() as u64 * 64)?;
        assert!(pages <= into.len() as u64 * 64);
        let argument = GetDirtyLog {
            slot: self.slots[slot].region.slot,
            padding: 0,
            bitmap: into.as_mut_ptr() as u64,
        };
        // SAFETY: the argument lives through the call, and the kernel writes one bit a page of the slot, rounded
        // up to a word, to `into`, which `check` found to be long enough.
        let result = unsafe {
            ioctl(
                "KVM_GET_DIRTY_LOG",
                &*self.vm,
                KVM_GET_DIRTY_LOG,
                &raw const argument as u64,
            )
        };
        result.map(drop)
    }

    /// Forgets, and write-protects again, the pages of a slot whose bits are set in `bitmap`; bit 0 is
    /// `first_page`, which is a multiple of 64. For VMs with manual protection
    /// (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    ///
    /// # Errors
    /// The kernel's; [`SysError::OutOfBounds`] when the slot ends before the last word begins.
    pub fn clear_dirty_log(&self, slot: usize, first_page: u64, bitmap: &[u64]) -> Result<(), SysError> {
        let wanted = bitmap.len() as u64 * 64;
        let slot_pages = self.check(slot, first_page, 0)?;
        let pages = slot_pages.saturating_sub(first_page).min(wanted);
        if !first_page.is_multiple_of(64) || pages.div_ceil(64) != bitmap.len() as u64 {
            return Err(self.outside(slot, first_page, wanted));
        }
        let argument = ClearDirtyLog {
            slot: self.slots[slot].region.slot,
            page_count: u32::try_from(pages).map_err(|_| self.outside(slot, first_page, wanted))?,
            first_page,
            bitmap: bitmap.as_ptr() as u64,
        };
        // SAFETY: the argument lives through the call; the kernel reads `pages` bits, rounded up to a word, from
        // `bitmap`, which has just as many words.
        let result = unsafe {
            ioctl(
                "KVM_CLEAR_DIRTY_LOG",
                &*self.vm,
                KVM_CLEAR_DIRTY_LOG,
                &raw const argument as u64,
            )
        };
        result.map(drop)
    }

    /// Hands the harvested entries of all vCPUs' rings back and write-protects their pages again; returns how
    /// many. The caller's signals wait meanwhile: when one is pending, kernels from 6.16 on return early, and the pages of
    /// the entries at which they stopped are never protected again (seen on 6.18). SIGSTOP cannot be made to wait.
    ///
    /// # Errors
    /// The kernel's: EINVAL when the VM has no rings.
    pub fn reset_dirty_rings(&self) -> Result<u32, SysError> {
        let _waiting = super::signals::SignalsWait::new()?;
        // SAFETY: this ioctl has no argument.
        unsafe { ioctl("KVM_RESET_DIRTY_RINGS", &*self.vm, KVM_RESET_DIRTY_RINGS, 0) }
    }

    fn set(&self, region: kvm_userspace_memory_region) -> Result<(), SysError> {
        // SAFETY: the range is that of a mapping that `self` keeps for as long as the slot exists (on the way
        // in: that the caller pushes next), and that nothing of ours has Rust references into.
        let result = unsafe { self.vm.set_user_memory_region(region) };
        result.map_err(|errno| SysError::call("KVM_SET_USER_MEMORY_REGION", errno))
    }

    /// The slot's pages, if it exists and `[first_page, first_page + room)` either covers it or is empty within.
    fn check(&self, slot: usize, first_page: u64, room: u64) -> Result<u64, SysError> {
        let pages = self.slots.get(slot).map(|s| s.region.memory_size / PAGE_BYTES);
        match pages {
            Some(pages) if first_page < pages && (room == 0 || room >= pages) => Ok(pages),
            _ => Err(self.outside(slot, first_page, room)),
        }
    }

    fn outside(&self, slot: usize, first_page: u64, pages: u64) -> SysError {
        SysError::OutOfBounds {
            what: "a dirty bitmap",
            offset: first_page,
            bytes: pages / 8,
            limit: self
                .slots
                .get(slot)
                .map_or(0, |s| s.region.memory_size / PAGE_BYTES / 8),
        }
    }
}

impl Drop for KvmSlots {
    fn drop(&mut self) {
        for slot in &self.slots {
            let gone = kvm_userspace_memory_region {
                memory_size: 0,
                flags: 0,
                ..slot.region
            };
            // A slot that stayed would let the guest write to whatever is mapped there next.
            self.set(gone)
                .expect("the kernel takes back a slot that it has given");
        }
    }
}

impl fmt::Debug for KvmSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.slots.iter().map(|slot| &slot.region))
            .finish()
    }
}
