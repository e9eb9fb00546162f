//! The pages of a checkpoint, some in each frame.
//!
//! ```text
//!   payload   epoch u64 | count u32 | reserved u32 | entry × count
//!   entry     gap varint | kind u8 | length varint | length bytes
//! ```
//!
//! `gap` is the page's index in the first entry of a frame, and afterwards how many pages were left out since the one before.
//! So indexes ascend within a frame by construction, and an unchanged neighbour costs three bytes.

use bytes::{BufMut, Bytes, BytesMut};
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, RAM_BYTES_MAX, Session};
use xxhash_rust::xxh3::xxh3_128;

use crate::commit::PagesSection;
use crate::error::WireError;
use crate::frame::{Frame, FrameType, HEADER_BYTES, PAYLOAD_BYTES_MAX, header};
use crate::message::expect_type;
use crate::varint::{self, VarintError};

/// The highest page index that is accepted: that of the last page of the largest guest.
pub const PAGE_INDEX_MAX: u64 = RAM_BYTES_MAX / PAGE_BYTES as u64 - 1;
/// Most bytes of an entry without its payload: index in 5, kind in 1, length in 2.
pub const ENTRY_HEAD_BYTES_MAX: usize = 8;

const WHAT: &str = "pages frame";
const HEAD_BYTES: usize = 16;
const COUNT_AT: usize = 8;
const ENTRY_BYTES_MIN: usize = 3;

fn section(pages: u64, payload: &[u8]) -> PagesSection {
    PagesSection {
        pages,
        digest: Digest(xxh3_128(payload)),
    }
}

/// Collects encoded pages until a frame is full.
#[derive(Debug)]
pub struct PagesWriter {
    session: Session,
    frame: BytesMut,
    limit_bytes: usize,
    count: u32,
    last: Option<PageIndex>,
}

/// A finished frame of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesFrame {
    /// The whole frame, ready to be sent.
    pub frame: Bytes,
    /// What it adds to the checkpoint's pages section.
    pub section: PagesSection,
}

impl PagesWriter {
    /// An empty frame for pages of `epoch`, of at most `limit_bytes` with its header. A limit under the room for
    /// one raw page or over [`FRAME_BYTES_MAX`](crate::FRAME_BYTES_MAX) is taken for the nearest of the two.
    pub fn new(session: Session, epoch: Epoch, limit_bytes: usize) -> Self {
        let one_page = HEADER_BYTES + HEAD_BYTES + ENTRY_HEAD_BYTES_MAX + PAGE_BYTES;
        let limit_bytes = limit_bytes.clamp(one_page, HEADER_BYTES + PAYLOAD_BYTES_MAX);
        let mut frame = BytesMut::with_capacity(limit_bytes);
        frame.put_bytes(0, HEADER_BYTES);
        frame.put_u64_le(epoch.0);
        frame.put_bytes(0, HEAD_BYTES - COUNT_AT);
        Self {
            session,
            frame,
            limit_bytes,
            count: 0,
            last: None,
        }
    }

    /// Adds a page. `false`, and nothing is added, when it does not fit any more; an empty frame takes any page.
    ///
    /// # Panics
    /// When the index is not above the one before or over [`PAGE_INDEX_MAX`], or the payload is longer than a page.
    #[must_use = "a page that did not fit goes into the next frame"]
    pub fn push(&mut self, page: PageIndex, kind: u8, payload: &[u8]) -> bool {
        assert!(page.0 <= PAGE_INDEX_MAX, "a guest has no page {}", page.0);
        assert!(
            payload.len() <= PAGE_BYTES,
            "an encoded page is never longer than a raw one"
        );
        let gap = match self.last {
            Some(last) => page
                .0
                .checked_sub(last.0 + 1)
                .expect("pages are written in ascending order"),
            None => page.0,
        };
        if self.frame.len() + ENTRY_HEAD_BYTES_MAX + payload.len() > self.limit_bytes {
            return false;
        }
        varint::put(gap, &mut self.frame);
        self.frame.put_u8(kind);
        varint::put(payload.len() as u64, &mut self.frame);
        self.frame.put_slice(payload);
        self.last = Some(page);
        self.count += 1;
        true
    }

    /// Pages in it so far.
    pub fn pages(&self) -> u32 {
        self.count
    }

    /// The frame, or `None` when no page was added.
    pub fn finish(mut self) -> Option<PagesFrame> {
        if self.count == 0 {
            return None;
        }
        let count_at = HEADER_BYTES + COUNT_AT;
        self.frame[count_at..count_at + 4].copy_from_slice(&self.count.to_le_bytes());
        let header = header(FrameType::Pages, self.session, &self.frame[HEADER_BYTES..]);
        self.frame[..HEADER_BYTES].copy_from_slice(&header);
        let section = section(u64::from(self.count), &self.frame[HEADER_BYTES..]);
        Some(PagesFrame {
            frame: self.frame.freeze(),
            section,
        })
    }
}

/// One encoded page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry<'a> {
    /// Which page.
    pub page: PageIndex,
    /// How it is encoded: a number of the page codec, not checked here.
    pub kind: u8,
    /// The encoded page, at most [`PAGE_BYTES`] bytes.
    pub payload: &'a [u8],
}

/// The pages in a frame. It was checked to its last byte before there is one of these.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    epoch: Epoch,
    count: u32,
    entries: &'a [u8],
    section: PagesSection,
}

impl<'a> Pages<'a> {
    /// Checks a frame.
    ///
    /// # Errors
    /// [`WireError`] when it holds something else, an entry is cut off or malformed, an index is too high or there are
    /// bytes after the last entry.
    pub fn parse(frame: &'a Frame) -> Result<Self, WireError> {
        expect_type(FrameType::Pages, frame)?;
        let payload = &frame.payload[..];
        let (head, entries) = payload
            .split_first_chunk::<HEAD_BYTES>()
            .ok_or(WireError::Truncated(WHAT))?;
        let [epoch, rest] = [&head[..COUNT_AT], &head[COUNT_AT..]];
        let epoch = Epoch(u64::from_le_bytes(epoch.try_into().expect("8 of 16 bytes")));
        let [count, reserved] =
            [&rest[..4], &rest[4..]].map(|word| u32::from_le_bytes(word.try_into().expect("4 of 8 bytes")));
        if reserved != 0 {
            return Err(WireError::Reserved(WHAT));
        }
        if count == 0 {
            return Err(WireError::Malformed {
                what: WHAT,
                problem: "it has no page",
            });
        }
        let fit = (entries.len() / ENTRY_BYTES_MIN) as u64;
        if u64::from(count) > fit {
            return Err(WireError::TooLarge {
                what: "the number of pages in a frame of its length",
                value: u64::from(count),
                limit: fit,
            });
        }
        let mut reader = Reader {
            rest: entries,
            next: 0,
        };
        for _ in 0..count {
            reader.entry()?;
        }
        if !reader.rest.is_empty() {
            return Err(WireError::Trailing {
                what: WHAT,
                bytes: reader.rest.len(),
            });
        }
        Ok(Self {
            epoch,
            count,
            entries,
            section: section(u64::from(count), payload),
        })
    }

    /// The epoch whose checkpoint the pages belong to.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How many pages there are, at least one.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// What the frame adds to the checkpoint's pages section.
    pub fn section(&self) -> PagesSection {
        self.section
    }

    /// The pages, in ascending order.
    pub fn entries(&self) -> impl Iterator<Item = PageEntry<'a>> + use<'a> {
        let mut reader = Reader {
            rest: self.entries,
            next: 0,
        };
        (0..self.count).map(move |_| reader.entry().expect("the frame was checked when it was parsed"))
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    next: u64,
}

impl<'a> Reader<'a> {
    fn entry(&mut self) -> Result<PageEntry<'a>, WireError> {
        let page = take_index(&mut self.rest, self.next, WHAT)?;
        let (kind, rest) = self.rest.split_first().ok_or(WireError::Truncated(WHAT))?;
        self.rest = rest;
        let value = take_number(&mut self.rest, WHAT)?;
        let length = usize::try_from(value).ok().filter(|length| *length <= PAGE_BYTES);
        let length = length.ok_or(WireError::TooLarge {
            what: "the length of an encoded page",
            value,
            limit: PAGE_BYTES as u64,
        })?;
        let (payload, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(WireError::Truncated(WHAT))?;
        self.rest = rest;
        self.next = page + 1;
        Ok(PageEntry {
            page: PageIndex(page),
            kind: *kind,
            payload,
        })
    }
}

/// Takes a number off the front of an entry.
fn take_number(rest: &mut &[u8], what: &'static str) -> Result<u64, WireError> {
    varint::take(rest).map_err(|error| match error {
        VarintError::Truncated => WireError::Truncated(what),
        VarintError::Malformed => WireError::Malformed {
            what,
            problem: "a number is not in its shortest form",
        },
    })
}

/// Takes a gap off the front of an entry: the index of its page, where `next` is the lowest that it can have.
pub(crate) fn take_index(rest: &mut &[u8], next: u64, what: &'static str) -> Result<u64, WireError> {
    let page = next.saturating_add(take_number(rest, what)?);
    if page > PAGE_INDEX_MAX {
        return Err(WireError::TooLarge {
            what: "a page index",
            value: page,
            limit: PAGE_INDEX_MAX,
        });
    }
    Ok(page)
}
