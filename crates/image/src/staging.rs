//! One checkpoint in a staging file: written as it comes in, read back by apply and by redo.
//!
//! ```text
//!   | header | page bytes | header | header | page bytes | header | device state …  |
//!     page 7   4096         page 9   page 4   4096         state, offset 0
//!                          (zero)
//!
//!   header, 16 bytes, little-endian:
//!   offset size
//!        0    4  kind: 1 page, 2 page of zeros, 3 piece of the device state
//!        4    4  bytes that follow: 4096; 0; 1 to 65536
//!        8    8  page index; for a piece of the device state its offset there
//! ```
//!
//! What is staged has three digests: the sum of the page digests (order does not matter), xxh3-128 of the
//! device state, and xxh3-128 of all headers. All three are in the commit slot, so every bit of the file
//! counts.

use std::collections::BTreeMap;

use romulus_page_codec::{ImageDigest, Page, page_digest};
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, Session};
use xxhash_rust::xxh3::Xxh3;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Named;
use crate::files::{Area, FileName, Files};
use crate::slot::CommitRecord;
use crate::window::Window;
use crate::{ImageError, Limits};

const KIND_PAGE: u32 = 1;
const KIND_ZERO_PAGE: u32 = 2;
const KIND_DEVICE_STATE: u32 = 3;
const HEADER_BYTES: usize = 16;
const PIECE_BYTES_MAX: usize = 64 << 10;
/// Bytes gathered before they are written: few system calls, and it stays in the second-level cache.
const FLUSH_BYTES: usize = 256 << 10;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: U32,
    length: U32,
    index: U64,
}

impl Header {
    fn page(index: PageIndex, digest: Digest) -> Self {
        let (kind, length) = if digest == Digest(0) {
            (KIND_ZERO_PAGE, 0)
        } else {
            (KIND_PAGE, 4096)
        };
        Self {
            kind: kind.into(),
            length: length.into(),
            index: index.0.into(),
        }
    }

    fn device_state(offset: u64, piece: &[u8]) -> Self {
        let length = u32::try_from(piece.len()).expect("a piece is at most PIECE_BYTES_MAX");
        Self {
            kind: KIND_DEVICE_STATE.into(),
            length: length.into(),
            index: offset.into(),
        }
    }
}

/// A staged page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StagedPage {
    pub(crate) index: PageIndex,
    /// `Digest(0)`: a page of zeros, without bytes in the file.
    pub(crate) digest: Digest,
    /// Where its bytes lie in the staging file.
    pub(crate) offset: u64,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    offset: u64,
    length: usize,
}

/// What a staging file holds: about 60 bytes of memory for each page.
#[derive(Default)]
pub(crate) struct Contents {
    pages: Vec<StagedPage>,
    positions: BTreeMap<PageIndex, usize>,
    pages_digest: ImageDigest,
    pieces: Vec<Piece>,
    device_state_bytes: u64,
    device_state_hash: Box<Xxh3>,
    records_hash: Box<Xxh3>,
    bytes: u64,
}

impl Contents {
    pub(crate) fn pages(&self) -> &[StagedPage] {
        &self.pages
    }

    pub(crate) fn page(&self, index: PageIndex) -> Option<StagedPage> {
        self.positions.get(&index).map(|position| self.pages[*position])
    }

    pub(crate) fn pages_digest(&self) -> Digest {
        self.pages_digest.digest()
    }

    pub(crate) fn device_state_bytes(&self) -> u64 {
        self.device_state_bytes
    }

    pub(crate) fn device_state_digest(&self) -> Digest {
        Digest(self.device_state_hash.digest128())
    }

    pub(crate) fn records_digest(&self) -> Digest {
        Digest(self.records_hash.digest128())
    }

    /// Length of all records together.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The header that comes before the page's bytes.
    fn add_page(&mut self, index: PageIndex, digest: Digest) -> Result<Header, ImageError> {
        let position = self.pages.len();
        if *self.positions.entry(index).or_insert(position) != position {
            return Err(ImageError::PageTwice { page: index });
        }
        let header = Header::page(index, digest);
        self.pages.push(StagedPage {
            index,
            digest,
            offset: self.bytes + HEADER_BYTES as u64,
        });
        self.pages_digest.replace(Digest(0), digest);
        self.add_header(header);
        Ok(header)
    }

    fn add_piece(&mut self, piece: &[u8]) -> Header {
        let header = Header::device_state(self.device_state_bytes, piece);
        self.pieces.push(Piece {
            offset: self.bytes + HEADER_BYTES as u64,
            length: piece.len(),
        });
        self.device_state_bytes += piece.len() as u64;
        self.device_state_hash.update(piece);
        self.add_header(header);
        header
    }

    fn add_header(&mut self, header: Header) {
        self.records_hash.update(header.as_bytes());
        self.bytes += HEADER_BYTES as u64 + u64::from(header.length.get());
    }

    /// Reads the device state back and checks it.
    pub(crate) fn device_state<F: Files>(&self, files: &F, area: Area) -> Result<Vec<u8>, ImageError> {
        let file = FileName::Staging(area);
        let mut state = Vec::new();
        for piece in &self.pieces {
            let start = state.len();
            state.resize(start + piece.length, 0);
            files
                .read_at(file, piece.offset, &mut state[start..])
                .named("read", file)?;
        }
        if crate::device_state_digest(&state) != self.device_state_digest() {
            return Err(ImageError::StagingDamaged { file, offset: 0 });
        }
        Ok(state)
    }
}

/// A checkpoint that is coming in.
pub(crate) struct Writer {
    pub(crate) area: Area,
    pub(crate) session: Session,
    pub(crate) epoch: Epoch,
    pub(crate) contents: Contents,
    limits: Limits,
    /// The end of the file's records that is not written yet.
    buffer: Vec<u8>,
}

impl Writer {
    /// `buffer` is an empty one to be used again.
    pub(crate) fn new(area: Area, session: Session, epoch: Epoch, limits: Limits, buffer: Vec<u8>) -> Self {
        assert!(
            buffer.is_empty(),
            "nothing of another checkpoint is left in the buffer"
        );
        Self {
            area,
            session,
            epoch,
            contents: Contents::default(),
            limits,
            buffer,
        }
    }

    /// Adds a page; the caller has checked that the guest has it. Returns its digest.
    pub(crate) fn page<F: Files>(
        &mut self,
        files: &mut F,
        index: PageIndex,
        page: &Page,
    ) -> Result<Digest, ImageError> {
        let digest = page_digest(index, page);
        let bytes: &[u8] = if digest == Digest(0) { &[] } else { page };
        self.make_room(files, bytes.len())?;
        let header = self.contents.add_page(index, digest)?;
        self.append(header, bytes);
        Ok(digest)
    }

    /// Adds the next bytes of the device state.
    pub(crate) fn device_state<F: Files>(&mut self, files: &mut F, bytes: &[u8]) -> Result<(), ImageError> {
        let limit_bytes = self.limits.device_state_bytes_max;
        if self
            .contents
            .device_state_bytes
            .saturating_add(bytes.len() as u64)
            > limit_bytes
        {
            return Err(ImageError::DeviceStateTooLarge { limit_bytes });
        }
        for piece in bytes.chunks(PIECE_BYTES_MAX) {
            self.make_room(files, piece.len())?;
            let header = self.contents.add_piece(piece);
            self.append(header, piece);
        }
        Ok(())
    }

    fn make_room<F: Files>(&mut self, files: &mut F, length: usize) -> Result<(), ImageError> {
        let record_bytes = HEADER_BYTES + length;
        let limit_bytes = self.limits.staging_bytes_max;
        if self.contents.bytes + record_bytes as u64 > limit_bytes {
            return Err(ImageError::StagingFull { limit_bytes });
        }
        if self.buffer.len() + record_bytes > FLUSH_BYTES {
            self.flush(files)?;
        }
        Ok(())
    }

    fn append(&mut self, header: Header, bytes: &[u8]) {
        self.buffer.extend_from_slice(header.as_bytes());
        self.buffer.extend_from_slice(bytes);
    }

    /// Writes what is gathered. May be called again after a failure.
    pub(crate) fn flush<F: Files>(&mut self, files: &mut F) -> Result<(), ImageError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let file = FileName::Staging(self.area);
        let offset = self.contents.bytes - self.buffer.len() as u64;
        files.write_at(file, offset, &self.buffer).named("write", file)?;
        self.buffer.clear();
        Ok(())
    }

    /// The contents, and the buffer for the next checkpoint.
    pub(crate) fn finish(mut self) -> (Contents, Vec<u8>) {
        self.buffer.clear();
        (self.contents, self.buffer)
    }
}

/// Reads a committed staging file after a crash and checks every bit of it against its commit record.
pub(crate) fn scan<F: Files>(
    files: &F,
    record: &CommitRecord,
    file_bytes: u64,
    page_count: u64,
) -> Result<Contents, ImageError> {
    let file = FileName::Staging(record.area);
    let damaged = |offset| ImageError::StagingDamaged { file, offset };
    if file_bytes < record.staging_bytes {
        return Err(damaged(file_bytes));
    }
    let mut window = Window::new(file, record.staging_bytes);
    let mut contents = Contents::default();
    while contents.bytes < record.staging_bytes {
        let at = contents.bytes;
        let header = window.read(files, at, HEADER_BYTES)?.ok_or(damaged(at))?;
        let header = Header::read_from_bytes(header).expect("the length of a header was read");
        let length = usize::try_from(header.length.get()).map_err(|_| damaged(at))?;
        if length > PIECE_BYTES_MAX {
            return Err(damaged(at));
        }
        let bytes = window
            .read(files, at + HEADER_BYTES as u64, length)?
            .ok_or(damaged(at))?;
        let index = PageIndex(header.index.get());
        let expected = match (header.kind.get(), length) {
            (KIND_PAGE, PAGE_BYTES) if index.0 < page_count => {
                let page: &Page = bytes.try_into().expect("the length of a page was matched");
                contents
                    .add_page(index, page_digest(index, page))
                    .map_err(|_| damaged(at))?
            }
            (KIND_ZERO_PAGE, 0) if index.0 < page_count => {
                contents.add_page(index, Digest(0)).map_err(|_| damaged(at))?
            }
            (KIND_DEVICE_STATE, 1..) => contents.add_piece(bytes),
            _ => return Err(damaged(at)),
        };
        if expected.as_bytes() != header.as_bytes() {
            return Err(damaged(at));
        }
    }
    let as_committed = contents.bytes == record.staging_bytes
        && contents.pages.len() as u64 == record.page_count
        && contents.pages_digest() == record.pages_digest
        && contents.device_state_bytes == record.device_state_bytes
        && contents.device_state_digest() == record.device_state_digest
        && contents.records_digest() == record.records_digest;
    if as_committed {
        Ok(contents)
    } else {
        Err(damaged(0))
    }
}
