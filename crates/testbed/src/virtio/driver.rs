//! A driver's side of a queue, honest or not, for tests.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub type Memory = GuestMemoryMmap<()>;

/// RAM of the tests, in bytes.
pub const RAM_BYTES: usize = 4 << 20;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap()
}

/// A queue at `base`: descriptors, available ring and used ring, one page each.
pub struct Driver {
    pub memory: Memory,
    pub base: u64,
    pub size: u16,
    next_descriptor: u16,
    offered: u16,
}

impl Driver {
    pub fn new(memory: &Memory, base: u64) -> Self {
        Driver {
            memory: memory.clone(),
            base,
            size: 64,
            next_descriptor: 0,
            offered: 0,
        }
    }

    /// The device's side of this queue.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(super::transport::QUEUE_SIZE_MAX).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(u32::try_from(self.base).unwrap()), None);
        queue.set_avail_ring_address(Some(u32::try_from(self.base).unwrap() + 0x1000), None);
        queue.set_used_ring_address(Some(u32::try_from(self.base).unwrap() + 0x2000), None);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    /// Offers a request of `(address, bytes, the device may write it)`; returns its head.
    pub fn offer(&mut self, parts: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (index, (address, bytes, writable)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            self.describe(at, *address, *bytes, flags, self.next_descriptor);
        }
        self.offer_head(head);
        head
    }

    pub fn describe(&self, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let at = self.base + u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(bytes, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        self.memory
            .write_obj(head, GuestAddress(self.base + 0x1004 + slot * 2))
            .unwrap();
        self.set_offered(self.offered.wrapping_add(1));
    }

    pub fn set_offered(&mut self, offered: u16) {
        self.offered = offered;
        self.memory
            .write_obj(offered, GuestAddress(self.base + 0x1002))
            .unwrap();
    }

    /// What the device has given back: `(head, bytes written)`.
    pub fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.memory.read_obj(GuestAddress(self.base + 0x2002)).unwrap();
        let entry = |index: u16| {
            let at = self.base + 0x2004 + u64::from(index % self.size) * 8;
            let word = |at| self.memory.read_obj(GuestAddress(at)).unwrap();
            (word(at), word(at + 4))
        };
        (0..count).map(entry).collect()
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut into = vec![0; bytes];
        self.memory.read_slice(&mut into, GuestAddress(address)).unwrap();
        into
    }
}
