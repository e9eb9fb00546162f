//! virtio-net on a tap: queue 0 takes frames to the guest, queue 1 from it.
//!
//! No offload is offered, so every header is all zeros: 12 bytes towards the guest (virtio 1.2, 5.1.6), 10 towards the
//! tap. A frame is taken off the tap only when the guest has room for it; what the guest has no room for waits in the
//! tap's own queue, and so a checkpoint needs nothing of the host's side.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::GuestMemory;

use super::backend::{Backend, Served};
use super::chain::{self, Chain, QueueFault};
use crate::mac::Mac;

/// virtio's number of a network device.
pub const VIRTIO_ID: u32 = 1;
/// The queue that takes frames to the guest.
pub const RECEIVE: usize = 0;
/// The queue that takes frames from the guest.
pub const TRANSMIT: usize = 1;
/// Header of a frame in a queue, all zeros without offloads but for the number of buffers.
const GUEST_HEADER_BYTES: usize = 12;
/// Header of a frame at the tap.
const TAP_HEADER_BYTES: usize = romulus_host_sys::tap::VNET_HEADER_BYTES;
/// Longest Ethernet frame that a tap can carry: its largest MTU, header and one VLAN tag.
const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// Shortest thing that can be a frame: an Ethernet header.
const FRAME_BYTES_MIN: usize = 14;

/// A network device.
#[derive(Debug)]
pub struct Net {
    tap: OwnedFd,
    mac: Mac,
    chain: Chain,
    /// `[tap's header][frame]`
    buffer: Vec<u8>,
}

impl Net {
    /// A device of that address on `tap`, whose frames carry the 10-byte header and whose descriptor does not block.
    #[must_use]
    pub fn new(tap: OwnedFd, mac: Mac) -> Self {
        Net {
            tap,
            mac,
            chain: Chain::default(),
            buffer: vec![0; TAP_HEADER_BYTES + FRAME_BYTES_MAX],
        }
    }

    /// One frame from the tap to the guest.
    fn receive<M: GuestMemory>(&mut self, queue: &mut Queue, memory: &M) -> Result<Served, QueueFault> {
        if !chain::has_request(queue, memory)? {
            return Ok(Served::NoRequest);
        }
        let length = match rustix::io::read(&self.tap, &mut self.buffer[..]) {
            Ok(length) if length >= TAP_HEADER_BYTES + FRAME_BYTES_MIN => length,
            Ok(0) => return Ok(Served::NoInput),
            Ok(_) => return Ok(Served::Dropped),
            Err(error) => return Ok(unread(error)),
        };
        if !self.chain.take_next(queue, memory)? {
            return Ok(Served::NoRequest);
        }
        let frame = &self.buffer[TAP_HEADER_BYTES..length];
        let room = chain::total_bytes(&self.chain.writable);
        let wanted = GUEST_HEADER_BYTES + frame.len();
        if room < (GUEST_HEADER_BYTES + FRAME_BYTES_MIN) as u64 {
            return Err(QueueFault::Length {
                device: "network",
                bytes: room,
                wanted: "at least 26",
            });
        }
        if room < wanted as u64 {
            // Too long for this buffer, as after a change of the tap's MTU: the buffer stays for the next frame.
            queue.go_to_previous_position();
            tracing::debug!(
                bytes = frame.len(),
                room,
                "a frame is longer than the guest's buffer: dropped"
            );
            return Ok(Served::Dropped);
        }
        let mut header = [0; GUEST_HEADER_BYTES];
        header[10] = 1; // num_buffers
        chain::write_at(memory, &self.chain.writable, 0, &header)?;
        chain::write_at(memory, &self.chain.writable, GUEST_HEADER_BYTES as u64, frame)?;
        chain::give_back(
            queue,
            memory,
            self.chain.head,
            u32::try_from(wanted).unwrap_or(u32::MAX),
        )?;
        Ok(Served::Answered)
    }

    /// One frame from the guest to the tap.
    fn transmit<M: GuestMemory>(&mut self, queue: &mut Queue, memory: &M) -> Result<Served, QueueFault> {
        if !self.chain.take_next(queue, memory)? {
            return Ok(Served::NoRequest);
        }
        let bytes = chain::total_bytes(&self.chain.readable);
        let (min, max) = (
            GUEST_HEADER_BYTES + FRAME_BYTES_MIN,
            GUEST_HEADER_BYTES + FRAME_BYTES_MAX,
        );
        if bytes < min as u64 || bytes > max as u64 {
            return Err(QueueFault::Length {
                device: "network",
                bytes,
                wanted: "26 to 65565",
            });
        }
        self.buffer[..TAP_HEADER_BYTES].fill(0);
        let into = &mut self.buffer[TAP_HEADER_BYTES..];
        let length = chain::read_at(memory, &self.chain.readable, GUEST_HEADER_BYTES as u64, into)?;
        if let Err(error) = rustix::io::write(&self.tap, &self.buffer[..TAP_HEADER_BYTES + length]) {
            // The interface is down or full. A network may lose frames.
            tracing::debug!(%error, bytes = length, "the tap did not take a frame: dropped");
        }
        chain::give_back(queue, memory, self.chain.head, 0)?;
        Ok(Served::Answered)
    }
}

impl<M: GuestMemory> Backend<M> for Net {
    fn virtio_id(&self) -> u32 {
        VIRTIO_ID
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn queue_count(&self) -> usize {
        2
    }

    fn config(&self) -> &[u8] {
        self.mac.bytes()
    }

    fn input(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }

    fn serve(&mut self, index: usize, queue: &mut Queue, memory: &M) -> Result<Served, QueueFault> {
        if index == TRANSMIT {
            self.transmit(queue, memory)
        } else {
            self.receive(queue, memory)
        }
    }
}

/// What a tap that gave no frame means. One that is down (`EIO`) or gone (`EBADFD`) gives none, either.
fn unread(error: Errno) -> Served {
    if error != Errno::AGAIN && error != Errno::INTR {
        tracing::debug!(%error, "no frame can be read from the tap");
    }
    Served::NoInput
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
