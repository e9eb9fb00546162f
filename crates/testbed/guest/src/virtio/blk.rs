//! The block device: whole records written and read, several at a time.
//!
//! Request *n* has descriptors 3*n* to 3*n*+2 (header, data, status) and a page of memory of its own for the data.

use romulus_guest_core::abi::Device;
use romulus_guest_core::block_log::RECORD_BYTES;

use crate::memory::{Memory, Page};
use crate::virtio::mmio::{NoDevice, Registers};
use crate::virtio::queue::{Queue, WRITE};

/// Virtio's number for a block device.
pub const VIRTIO_ID: u32 = 2;
/// Requests that may be under way at once.
pub const REQUESTS: usize = 8;
const FLUSH_FEATURE: u64 = 1 << 9;
const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: u32 = 16;
/// Where a request's header and status lie in its page of the control area.
const STATUS_AT: usize = 16;
const UNANSWERED: u8 = 0xff;

/// What is asked of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Read the record in a slot.
    Read(u64),
    /// Write the record in a slot.
    Write(u64),
    /// Make sure that what was written stays.
    Flush,
}

/// The block device.
pub struct Blk {
    registers: Registers,
    queue: Queue,
    control: &'static mut [u8],
    data: &'static mut [Page],
    slots: u64,
    can_flush: bool,
}

impl Blk {
    /// Starts the device.
    ///
    /// # Errors
    /// [`NoDevice`] when it is no block device as the VMM should have.
    pub fn start(device: &Device, memory: &mut Memory) -> Result<Self, NoDevice> {
        let (registers, features) = Registers::negotiate(device, FLUSH_FEATURE)?;
        let queue = Queue::new(memory, 32);
        registers.add_queue(0, &queue)?;
        registers.go();
        let sectors = u64::from(registers.config_u32(4)) << 32 | u64::from(registers.config_u32(0));
        Ok(Blk {
            registers,
            queue,
            control: memory.take_bytes(REQUESTS * 32),
            data: memory.take_pages(REQUESTS),
            slots: sectors / (RECORD_BYTES as u64 / SECTOR_BYTES),
            can_flush: features & FLUSH_FEATURE != 0,
        })
    }

    /// Records that the disk holds.
    pub fn slots(&self) -> u64 {
        self.slots
    }

    /// Whether [`Ask::Flush`] is understood.
    pub fn can_flush(&self) -> bool {
        self.can_flush
    }

    /// The record of a request that is not under way.
    pub fn record(&mut self, request: usize) -> &mut [u8; RECORD_BYTES] {
        let page = (&raw mut self.data[request]).cast::<[u8; RECORD_BYTES]>();
        // SAFETY: the page is borrowed with `self`, and any bytes are valid; the device has it only while the request is
        // under way, and writes nothing but bytes.
        unsafe { &mut *page }
    }

    /// Starts a request.
    pub fn ask(&mut self, request: usize, ask: Ask) {
        let (kind, slot) = match ask {
            Ask::Read(slot) => (0_u32, slot),
            Ask::Write(slot) => (1, slot),
            Ask::Flush => (4, 0),
        };
        let sector = slot * (RECORD_BYTES as u64 / SECTOR_BYTES);
        let control = &mut self.control[request * 32..(request + 1) * 32];
        control[..4].copy_from_slice(&kind.to_le_bytes());
        control[4..8].fill(0);
        control[8..16].copy_from_slice(&sector.to_le_bytes());
        control[STATUS_AT] = UNANSWERED;
        let address = control.as_ptr() as u64;
        let head = 3 * request as u16;
        let status = head + 2;
        let after_header = if ask == Ask::Flush { status } else { head + 1 };
        self.queue
            .describe(head, address, HEADER_BYTES, 0, Some(after_header));
        let flags = if matches!(ask, Ask::Read(_)) { WRITE } else { 0 };
        let data = (&raw const self.data[request]) as u64;
        self.queue
            .describe(head + 1, data, RECORD_BYTES as u32, flags, Some(status));
        self.queue
            .describe(status, address + STATUS_AT as u64, 1, WRITE, None);
        self.queue.offer(head);
    }

    /// Rings the bell for what was asked.
    pub fn kick(&mut self) {
        if self.queue.publish() {
            self.registers.notify(0);
        }
    }

    /// The next request that is done: its number and the device's status, 0 for success.
    ///
    /// # Panics
    /// When the device gives back what was not asked.
    pub fn done(&mut self) -> Option<(usize, u8)> {
        let (head, _) = self.queue.take()?;
        assert!(
            head % 3 == 0,
            "the device gives back descriptor {head}, which begins no request"
        );
        let request = usize::from(head / 3);
        let status = &raw const self.control[request * 32 + STATUS_AT];
        // SAFETY: the byte is ours; the device wrote it, so it is read volatile.
        Some((request, unsafe { status.read_volatile() }))
    }
}
