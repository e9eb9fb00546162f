//! A split queue: the driver's half.
//!
//! ```text
//!   page: descriptors, 16 bytes each (128 at most) | available ring | page: used ring
//! ```
//! Buffers of drivers stay where they are: descriptor *n* always describes the same piece of memory.

use core::sync::atomic::{Ordering, fence};

use crate::memory::Memory;

/// Longest queue: its descriptors fill half a page.
pub const SIZE_MAX: u16 = 128;
const AVAILABLE_AT: u64 = 2048;
const USED_AT: u64 = 4096;
const QUEUE_BYTES: usize = 8192;

/// The device writes into this buffer.
pub const WRITE: u16 = 2;
const NEXT: u16 = 1;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A queue in memory that the device shares.
pub struct Queue {
    base: u64,
    size: u16,
    offered: u16,
    published: u16,
    taken: u16,
}

impl Queue {
    /// An empty queue.
    ///
    /// # Panics
    /// When the size is no power of two up to [`SIZE_MAX`].
    pub fn new(memory: &mut Memory, size: u16) -> Self {
        assert!(size.is_power_of_two() && size <= SIZE_MAX, "a queue of {size}");
        let bytes = memory.take_bytes(QUEUE_BYTES);
        bytes.fill(0);
        Queue {
            base: bytes.as_ptr() as u64,
            size,
            offered: 0,
            published: 0,
            taken: 0,
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where descriptors, available ring and used ring lie.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + AVAILABLE_AT, self.base + USED_AT]
    }

    /// Sets descriptor `index`; the chain goes on at `next`.
    pub fn describe(&mut self, index: u16, address: u64, bytes: u32, flags: u16, next: Option<u16>) {
        assert!(index < self.size, "descriptor {index}");
        let at = self.base + 16 * u64::from(index);
        let flags = if next.is_some() { flags | NEXT } else { flags };
        self.put(at, address);
        self.put(at + 8, bytes);
        self.put(at + 12, flags);
        self.put(at + 14, next.unwrap_or(0));
    }

    /// Puts the chain that begins at descriptor `head` into the available ring, for [`Queue::publish`].
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        self.put(self.base + AVAILABLE_AT + 4 + 2 * slot, head);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Lets the device see what was offered. Says whether it wants to be told.
    pub fn publish(&mut self) -> bool {
        if self.published == self.offered {
            return false;
        }
        self.published = self.offered;
        fence(Ordering::Release);
        self.put(self.base + AVAILABLE_AT + 2, self.offered);
        fence(Ordering::SeqCst);
        let flags: u16 = self.get(self.base + USED_AT);
        flags & NO_NOTIFY == 0
    }

    /// Whether [`Queue::take`] would give something.
    pub fn has_used(&self) -> bool {
        let used: u16 = self.get(self.base + USED_AT + 2);
        used != self.taken
    }

    /// The next chain that the device is done with: its head, and the bytes that were written into it.
    ///
    /// # Panics
    /// When the device names a descriptor that there is none of.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let at = self.base + USED_AT + 4 + 8 * u64::from(self.taken % self.size);
        let (head, bytes): (u32, u32) = (self.get(at), self.get(at + 4));
        self.taken = self.taken.wrapping_add(1);
        let head = u16::try_from(head).ok().filter(|&head| head < self.size);
        Some((
            head.expect("the device gives back a descriptor of the queue"),
            bytes,
        ))
    }

    /// Says whether the device may interrupt when it is done with something.
    pub fn interrupts(&mut self, on: bool) {
        self.put(self.base + AVAILABLE_AT, if on { 0 } else { NO_INTERRUPT });
        fence(Ordering::SeqCst);
    }

    fn put<T>(&self, address: u64, value: T) {
        // SAFETY: the address lies in the queue's own two pages, aligned as the specification lays the fields out.
        unsafe { (address as *mut T).write_volatile(value) }
    }

    fn get<T: Copy>(&self, address: u64) -> T {
        // SAFETY: as above; the fields are integers, so whatever the device wrote is a value.
        unsafe { (address as *const T).read_volatile() }
    }
}
