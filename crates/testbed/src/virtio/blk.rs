//! virtio-blk on a file: reads, writes and flushes, each finished before the next begins.
//!
//! A request that a driver may make but that can't be carried out (beyond the end, a disk error) is answered with
//! `IOERR`; one that no driver may make (no header, no place for the status) is a fault.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use virtio_bindings::virtio_blk as blk;
use virtio_queue::Queue;
use vm_memory::GuestMemory;

use super::backend::{Backend, Served};
use super::chain::{self, Chain, QueueFault};

/// virtio's number of a block device.
pub const VIRTIO_ID: u32 = 2;
/// Unit of addresses and lengths, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Type, reserved word, first sector.
const HEADER_BYTES: usize = 16;
/// Bytes copied at a time.
const PIECE_BYTES: usize = 64 << 10;
/// Longest request, in bytes: what bounds how long a pause may have to wait for one.
const REQUEST_BYTES_MAX: u64 = 4 << 20;

/// A block device.
#[derive(Debug)]
pub struct Blk {
    file: File,
    sectors: u64,
    serial: [u8; blk::VIRTIO_BLK_ID_BYTES as usize],
    config: [u8; 8],
    chain: Chain,
    buffer: Vec<u8>,
}

/// A request's status, as the driver reads it.
type Status = u32;

impl Blk {
    /// A disk of `bytes` bytes (rounded down to sectors) on `file`, which calls itself `name` (20 bytes of it).
    #[must_use]
    pub fn new(file: File, bytes: u64, name: &str) -> Self {
        let mut serial = [0; blk::VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let sectors = bytes / SECTOR_BYTES;
        let config = sectors.to_le_bytes();
        Blk {
            file,
            sectors,
            serial,
            config,
            chain: Chain::default(),
            buffer: vec![0; PIECE_BYTES],
        }
    }

    /// Carries out the request in `self.chain`; returns its status and the bytes given to the driver besides it.
    fn carry_out<M: GuestMemory>(&mut self, memory: &M) -> Result<(Status, u64), QueueFault> {
        let mut header = [0; HEADER_BYTES];
        let readable = chain::total_bytes(&self.chain.readable);
        if chain::read_at(memory, &self.chain.readable, 0, &mut header)? < HEADER_BYTES {
            return Err(QueueFault::Length {
                device: "block",
                bytes: readable,
                wanted: "at least 16",
            });
        }
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four of sixteen bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight of sixteen bytes"));
        let from_driver = readable - HEADER_BYTES as u64;
        let to_driver = chain::total_bytes(&self.chain.writable) - 1;
        match kind {
            blk::VIRTIO_BLK_T_IN if self.within(sector, to_driver) => self.read(sector, to_driver, memory),
            blk::VIRTIO_BLK_T_OUT if self.within(sector, from_driver) => {
                self.write(sector, from_driver, memory)
            }
            blk::VIRTIO_BLK_T_IN | blk::VIRTIO_BLK_T_OUT => Ok((blk::VIRTIO_BLK_S_IOERR, 0)),
            blk::VIRTIO_BLK_T_FLUSH => Ok((self.flush(), 0)),
            blk::VIRTIO_BLK_T_GET_ID => self.identify(to_driver, memory),
            _ => Ok((blk::VIRTIO_BLK_S_UNSUPP, 0)),
        }
    }

    fn within(&self, sector: u64, bytes: u64) -> bool {
        let end = sector.checked_add(bytes / SECTOR_BYTES);
        bytes <= REQUEST_BYTES_MAX
            && bytes.is_multiple_of(SECTOR_BYTES)
            && end.is_some_and(|end| end <= self.sectors)
    }

    fn read<M: GuestMemory>(
        &mut self,
        sector: u64,
        bytes: u64,
        memory: &M,
    ) -> Result<(Status, u64), QueueFault> {
        let start = sector * SECTOR_BYTES;
        for (offset, piece) in pieces(bytes) {
            let buffer = &mut self.buffer[..piece];
            if let Err(error) = self.file.read_exact_at(buffer, start + offset) {
                tracing::warn!(%error, sector, bytes, "the disk's file can't be read");
                return Ok((blk::VIRTIO_BLK_S_IOERR, offset));
            }
            chain::write_at(memory, &self.chain.writable, offset, buffer)?;
        }
        Ok((blk::VIRTIO_BLK_S_OK, bytes))
    }

    fn write<M: GuestMemory>(
        &mut self,
        sector: u64,
        bytes: u64,
        memory: &M,
    ) -> Result<(Status, u64), QueueFault> {
        let start = sector * SECTOR_BYTES;
        for (offset, piece) in pieces(bytes) {
            let buffer = &mut self.buffer[..piece];
            chain::read_at(memory, &self.chain.readable, HEADER_BYTES as u64 + offset, buffer)?;
            if let Err(error) = self.file.write_all_at(buffer, start + offset) {
                tracing::warn!(%error, sector, bytes, "the disk's file can't be written");
                return Ok((blk::VIRTIO_BLK_S_IOERR, 0));
            }
        }
        Ok((blk::VIRTIO_BLK_S_OK, 0))
    }

    fn flush(&self) -> Status {
        match self.file.sync_data() {
            Ok(()) => blk::VIRTIO_BLK_S_OK,
            Err(error) => {
                tracing::warn!(%error, "the disk's file can't be flushed");
                blk::VIRTIO_BLK_S_IOERR
            }
        }
    }

    fn identify<M: GuestMemory>(&self, room: u64, memory: &M) -> Result<(Status, u64), QueueFault> {
        let length = self.serial.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        let written = chain::write_at(memory, &self.chain.writable, 0, &self.serial[..length])?;
        Ok((blk::VIRTIO_BLK_S_OK, written as u64))
    }
}

/// A request of `bytes` bytes in pieces: where each begins and how long it is.
fn pieces(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..bytes).step_by(PIECE_BYTES).map(move |offset| {
        let left = usize::try_from(bytes - offset).unwrap_or(usize::MAX);
        (offset, left.min(PIECE_BYTES))
    })
}

impl<M: GuestMemory> Backend<M> for Blk {
    fn virtio_id(&self) -> u32 {
        VIRTIO_ID
    }

    fn features(&self) -> u64 {
        1 << blk::VIRTIO_BLK_F_FLUSH
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn input(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn serve(&mut self, _index: usize, queue: &mut Queue, memory: &M) -> Result<Served, QueueFault> {
        if !self.chain.take_next(queue, memory)? {
            return Ok(Served::NoRequest);
        }
        let room = chain::total_bytes(&self.chain.writable);
        if room == 0 {
            return Err(QueueFault::Length {
                device: "block",
                bytes: 0,
                wanted: "a byte for the status",
            });
        }
        let (status, given) = self.carry_out(memory)?;
        let status = [status.to_le_bytes()[0]];
        chain::write_at(memory, &self.chain.writable, room - 1, &status)?;
        let written = u32::try_from(given + 1).unwrap_or(u32::MAX);
        chain::give_back(queue, memory, self.chain.head, written)?;
        Ok(Served::Answered)
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
