//! Requests that a driver put into a queue, read with suspicion.
//!
//! `virtio-queue` walks a chain and ends it silently where it is broken. Here a chain that does not end where its
//! driver says it ends, that is longer than its queue, or that mixes readable and writable parts is a [`QueueFault`],
//! so that the device can go to `NEEDS_RESET` instead of answering a request that nobody made. Whatever a guest
//! writes, walking a chain costs at most as many steps as its queue is long.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// What a guest did to a queue that no driver may do.
#[derive(Debug, thiserror::Error)]
pub enum QueueFault {
    /// Rings outside RAM, or more requests than the ring has room for.
    #[error("the queue's rings can't be used: {0}")]
    Ring(virtio_queue::Error),
    /// The rings lie outside RAM.
    #[error("the queue's rings do not lie in the guest's RAM")]
    RingAddress,
    /// A chain with no descriptor, one that leads out of its table, or a loop.
    #[error("a request's descriptors lead nowhere or in a circle")]
    BrokenChain,
    /// A part that the device may read behind one that it may write.
    #[error("a request has a readable part behind a writable one")]
    Order,
    /// A buffer outside RAM.
    #[error("a request's buffer at {address:#x} of {bytes} bytes is not in the guest's RAM")]
    Buffer {
        /// Its guest-physical address.
        address: u64,
        /// Its length.
        bytes: u32,
    },
    /// A request shorter or longer than its kind may be.
    #[error("a request for a {device} device has {bytes} bytes where {wanted} are wanted")]
    Length {
        /// What kind of device it was for.
        device: &'static str,
        /// Its length.
        bytes: u64,
        /// What it may be, in words.
        wanted: &'static str,
    },
}

/// One buffer of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes.
    pub bytes: u32,
}

/// One request: what the device may read, then what it may write. Reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    /// Number by which the request is given back.
    pub head: u16,
    /// What the driver tells the device.
    pub readable: Vec<Segment>,
    /// Room for the device's answer.
    pub writable: Vec<Segment>,
}

/// Bytes in `segments` together. A chain has at most 32,768 parts of less than 4 GiB each, so this can't overflow.
#[must_use]
pub fn total_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.bytes)).sum()
}

impl Chain {
    /// Takes the next request out of `queue` into this chain. False: there is none.
    ///
    /// # Errors
    /// [`QueueFault`] when the rings or the request are not what a driver may write.
    pub fn take_next<M: GuestMemory>(&mut self, queue: &mut Queue, memory: &M) -> Result<bool, QueueFault> {
        self.readable.clear();
        self.writable.clear();
        let length_max = usize::from(queue.size());
        let Some(descriptors) = queue.iter(memory).map_err(QueueFault::Ring)?.next() else {
            return Ok(false);
        };
        self.head = descriptors.head_index();
        let mut open_end = true;
        for descriptor in descriptors {
            open_end = descriptor.has_next();
            if self.readable.len() + self.writable.len() == length_max {
                return Err(QueueFault::BrokenChain);
            }
            let segment = Segment {
                address: descriptor.addr(),
                bytes: descriptor.len(),
            };
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.is_empty() {
                self.readable.push(segment);
            } else {
                return Err(QueueFault::Order);
            }
        }
        if open_end {
            Err(QueueFault::BrokenChain)
        } else {
            Ok(true)
        }
    }
}

/// Whether the driver has put a request into `queue` that the device has not taken.
///
/// # Errors
/// [`QueueFault::Ring`] when the ring's index says what can't be.
pub fn has_request<M: GuestMemory>(queue: &Queue, memory: &M) -> Result<bool, QueueFault> {
    let offered = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(QueueFault::Ring)?;
    Ok(offered.0 != queue.next_avail())
}

/// Whether the driver wants to be interrupted for what this queue has used. After [`give_back`], never before it.
///
/// # Errors
/// [`QueueFault::RingAddress`] when the ring is not in RAM any more.
pub fn wants_interrupt<M: GuestMemory>(queue: &Queue, memory: &M) -> Result<bool, QueueFault> {
    // The driver first allows interrupts and then looks at what was used; we do it the other way round.
    fence(Ordering::SeqCst);
    let flags = memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
    let flags = flags.map(u16::from_le).map_err(|_| QueueFault::RingAddress)?;
    Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// Gives a request back to the driver: `written` bytes of its writable part were filled.
///
/// # Errors
/// [`QueueFault::Ring`] when the request's number or the ring is not what it was.
pub fn give_back<M: GuestMemory>(
    queue: &mut Queue,
    memory: &M,
    head: u16,
    written: u32,
) -> Result<(), QueueFault> {
    queue.add_used(memory, head, written).map_err(QueueFault::Ring)
}

/// Copies the bytes of `segments` from `offset` on into `into`, as many as there are of both; returns their number.
///
/// # Errors
/// [`QueueFault::Buffer`] when a buffer is not in RAM.
pub fn read_at<M: GuestMemory>(
    memory: &M,
    segments: &[Segment],
    offset: u64,
    into: &mut [u8],
) -> Result<usize, QueueFault> {
    let mut done = 0;
    for (address, range) in pieces(segments, offset, into.len()) {
        let piece = &mut into[range.clone()];
        memory
            .read_slice(piece, address)
            .map_err(|_| outside(address, range.len()))?;
        done = range.end;
    }
    Ok(done)
}

/// Copies `from` into `segments` from `offset` on, as much as there is room for; returns the number of bytes. Marks
/// what it writes as dirty.
///
/// # Errors
/// [`QueueFault::Buffer`] when a buffer is not in RAM.
pub fn write_at<M: GuestMemory>(
    memory: &M,
    segments: &[Segment],
    offset: u64,
    from: &[u8],
) -> Result<usize, QueueFault> {
    let mut done = 0;
    for (address, range) in pieces(segments, offset, from.len()) {
        memory
            .write_slice(&from[range.clone()], address)
            .map_err(|_| outside(address, range.len()))?;
        done = range.end;
    }
    Ok(done)
}

/// The pieces of `segments` from `offset` on for at most `bytes` bytes: where each lies in the guest, and which part
/// of our buffer it belongs to. An address that wraps around becomes one that is in no RAM.
fn pieces(
    segments: &[Segment],
    offset: u64,
    bytes: usize,
) -> impl Iterator<Item = (GuestAddress, std::ops::Range<usize>)> + '_ {
    let mut skip = offset;
    let mut done = 0;
    segments.iter().filter_map(move |segment| {
        let length = u64::from(segment.bytes);
        let skipped = skip.min(length);
        skip -= skipped;
        let piece = usize::try_from(length - skipped).map_or(bytes - done, |piece| piece.min(bytes - done));
        if piece == 0 {
            return None;
        }
        let range = done..done + piece;
        done += piece;
        let address = segment.address.0.saturating_add(skipped);
        Some((GuestAddress(address), range))
    })
}

fn outside(address: GuestAddress, bytes: usize) -> QueueFault {
    QueueFault::Buffer {
        address: address.0,
        bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
