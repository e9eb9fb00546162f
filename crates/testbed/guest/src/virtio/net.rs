//! The network device: frames in, frames out. Nothing is offloaded; every frame fits one buffer.

use core::cell::RefCell;

use romulus_guest_core::abi::Device;
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use crate::memory::Memory;
use crate::virtio::mmio::{NoDevice, Registers};
use crate::virtio::queue::{Queue, WRITE};

/// Virtio's number for a network device.
pub const VIRTIO_ID: u32 = 1;
const MAC: u64 = 1 << 5;
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const BUFFERS: u16 = 128;
const BUFFER_BYTES: usize = 2048;
/// The header in front of each frame (`struct virtio_net_hdr_v1`): all zero, as nothing is offloaded.
const HEADER_BYTES: usize = 12;
/// Longest frame, without checksum.
const FRAME_BYTES_MAX: usize = 1514;

/// One direction: a queue, and a buffer for each of its descriptors.
struct Half {
    queue: Queue,
    buffers: &'static mut [u8],
    /// Descriptors that the device does not have (transmit only).
    free: [u16; BUFFERS as usize],
    free_count: usize,
}

impl Half {
    fn new(memory: &mut Memory) -> Self {
        let queue = Queue::new(memory, BUFFERS);
        let buffers = memory.take_bytes(usize::from(BUFFERS) * BUFFER_BYTES);
        Half {
            queue,
            buffers,
            free: core::array::from_fn(|n| n as u16),
            free_count: usize::from(BUFFERS),
        }
    }

    fn buffer(&mut self, index: u16) -> &mut [u8] {
        let start = usize::from(index) * BUFFER_BYTES;
        &mut self.buffers[start..start + BUFFER_BYTES]
    }

    fn offer(&mut self, index: u16, bytes: usize, flags: u16) {
        let address = self.buffer(index).as_ptr() as u64;
        self.queue.describe(index, address, bytes as u32, flags, None);
        self.queue.offer(index);
    }

    /// Takes back what was sent.
    fn reclaim(&mut self) {
        while let Some((index, _)) = self.queue.take() {
            assert!(
                self.free_count < self.free.len(),
                "the device gives back a buffer twice"
            );
            self.free[self.free_count] = index;
            self.free_count += 1;
        }
    }
}

/// The network device.
pub struct Nic {
    registers: Registers,
    receive: RefCell<Half>,
    transmit: RefCell<Half>,
    mac: [u8; 6],
}

impl Nic {
    /// Starts the device.
    ///
    /// # Errors
    /// [`NoDevice`] when it is no network device as the VMM should have.
    pub fn start(device: &Device, memory: &mut Memory) -> Result<Self, NoDevice> {
        let (registers, features) = Registers::negotiate(device, MAC)?;
        let mut mac = [0x52, 0x54, 0, 0x77, 0, 2];
        if features & MAC != 0 {
            mac = core::array::from_fn(|n| registers.config_u8(n as u64));
        }
        let (mut receive, mut transmit) = (Half::new(memory), Half::new(memory));
        registers.add_queue(RECEIVE, &receive.queue)?;
        registers.add_queue(TRANSMIT, &transmit.queue)?;
        transmit.queue.interrupts(false);
        registers.go();
        (0..BUFFERS).for_each(|index| receive.offer(index, BUFFER_BYTES, WRITE));
        let nic = Nic {
            registers,
            receive: RefCell::new(receive),
            transmit: RefCell::new(transmit),
            mac,
        };
        nic.kick();
        Ok(nic)
    }

    /// The device's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Rings the bells for what has been put into the queues.
    pub fn kick(&self) {
        for (number, half) in [(RECEIVE, &self.receive), (TRANSMIT, &self.transmit)] {
            if half.borrow_mut().queue.publish() {
                self.registers.notify(number);
            }
        }
    }

    /// Says whether the device may interrupt: for what it receives, and, when nothing more can be sent, for what it has
    /// sent. Says whether there is something to do already.
    pub fn interrupts(&self, on: bool) -> bool {
        let (mut receive, mut transmit) = (self.receive.borrow_mut(), self.transmit.borrow_mut());
        receive.queue.interrupts(on);
        let full = transmit.free_count == 0;
        transmit.queue.interrupts(on && full);
        receive.queue.has_used() || (full && transmit.queue.has_used())
    }
}

/// A frame that was received.
pub struct Received<'a> {
    half: &'a RefCell<Half>,
    index: u16,
    bytes: usize,
}

/// Leave to send a frame.
pub struct Sender<'a>(&'a RefCell<Half>);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, action: F) -> R {
        let mut half = self.half.borrow_mut();
        let end = self.bytes.clamp(HEADER_BYTES, BUFFER_BYTES);
        let result = action(&half.buffer(self.index)[HEADER_BYTES..end]);
        half.offer(self.index, BUFFER_BYTES, WRITE);
        result
    }
}

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, action: F) -> R {
        let mut half = self.0.borrow_mut();
        half.free_count -= 1;
        let index = half.free[half.free_count];
        let buffer = half.buffer(index);
        buffer[..HEADER_BYTES].fill(0);
        let result = action(&mut buffer[HEADER_BYTES..HEADER_BYTES + bytes]);
        half.offer(index, HEADER_BYTES + bytes, 0);
        result
    }
}

impl phy::Device for Nic {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Received<'_>, Sender<'_>)> {
        // A reply may be wanted: without room for it, nothing is received.
        self.transmit(now)?;
        let (index, bytes) = self.receive.borrow_mut().queue.take()?;
        Some((
            Received {
                half: &self.receive,
                index,
                bytes: bytes as usize,
            },
            Sender(&self.transmit),
        ))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sender<'_>> {
        let mut half = self.transmit.borrow_mut();
        half.reclaim();
        (half.free_count > 0).then_some(Sender(&self.transmit))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}
