//! What a backup's image holds from an earlier session, told to the primary before the first copy: a keyed hash for each
//! page that is not all zeros. Pages that have the same hash on the primary need not be sent.
//!
//! ```text
//!   payload   count u32 | reserved u32 | entry × count
//!   entry     gap varint | hash u128
//! ```
//!
//! `gap` is as in a pages frame. A frame without entries is the end of the list; a backup with an empty image sends
//! nothing else. Frames come in ascending order of their pages.

use bytes::{BufMut, Bytes, BytesMut};
use romulus_types::{Digest, PageIndex, Session};

use crate::error::WireError;
use crate::frame::{Frame, FrameType, PAYLOAD_BYTES_MAX, encode_frame};
use crate::message::expect_type;
use crate::pages::{PAGE_INDEX_MAX, take_index};
use crate::varint::{self, VARINT_BYTES_MAX};

const WHAT: &str = "held pages frame";
const HEAD_BYTES: usize = 8;
const HASH_BYTES: usize = 16;
const ENTRY_BYTES_MIN: usize = 1 + HASH_BYTES;
/// Small enough that the list is on its way while the rest is still being read.
const PAYLOAD_BYTES: usize = PAYLOAD_BYTES_MAX / 8;

/// Collects hashes until a frame is full.
#[derive(Debug)]
pub struct HeldPagesWriter {
    session: Session,
    payload: BytesMut,
    count: u32,
    next: u64,
}

impl HeldPagesWriter {
    /// No hashes yet.
    pub fn new(session: Session) -> Self {
        Self {
            session,
            payload: BytesMut::from(&[0; HEAD_BYTES][..]),
            count: 0,
            next: 0,
        }
    }

    /// Adds a page. A frame that is full is returned, ready to be sent.
    ///
    /// # Panics
    /// When the index is not above the one before or over [`PAGE_INDEX_MAX`].
    #[must_use = "a full frame has to be sent"]
    pub fn push(&mut self, page: PageIndex, hash: Digest) -> Option<Bytes> {
        assert!(page.0 <= PAGE_INDEX_MAX, "a guest has no page {}", page.0);
        let first = if self.count == 0 { 0 } else { self.next };
        assert!(page.0 >= self.next, "pages are written in ascending order");
        varint::put(page.0 - first, &mut self.payload);
        self.payload.put_u128_le(hash.0);
        self.count += 1;
        self.next = page.0 + 1;
        let full = self.payload.len() + VARINT_BYTES_MAX + HASH_BYTES > PAYLOAD_BYTES;
        full.then(|| self.frame())
    }

    fn frame(&mut self) -> Bytes {
        self.payload[..4].copy_from_slice(&self.count.to_le_bytes());
        let frame = encode_frame(FrameType::HeldPages, self.session, &self.payload);
        self.payload.truncate(HEAD_BYTES);
        self.count = 0;
        frame
    }

    /// What is left, and the end of the list.
    pub fn finish(mut self) -> impl Iterator<Item = Bytes> {
        let rest = (self.count > 0).then(|| self.frame());
        let end = encode_frame(FrameType::HeldPages, self.session, &[0; HEAD_BYTES]);
        rest.into_iter().chain([end])
    }
}

/// The entries of one frame. It was checked to its last byte before there is one of these.
#[derive(Clone, Copy, Debug)]
pub struct HeldPagesFrame<'a> {
    count: u32,
    entries: &'a [u8],
}

impl<'a> HeldPagesFrame<'a> {
    /// Checks a frame.
    ///
    /// # Errors
    /// [`WireError`] when it holds something else, an entry is cut off or malformed, an index is too high or there are
    /// bytes after the last entry.
    pub fn parse(frame: &'a Frame) -> Result<Self, WireError> {
        expect_type(FrameType::HeldPages, frame)?;
        let (head, entries) = frame
            .payload
            .split_first_chunk::<HEAD_BYTES>()
            .ok_or(WireError::Truncated(WHAT))?;
        let [count, reserved] =
            [&head[..4], &head[4..]].map(|word| u32::from_le_bytes(word.try_into().expect("4 of 8 bytes")));
        if reserved != 0 {
            return Err(WireError::Reserved(WHAT));
        }
        let fit = (entries.len() / ENTRY_BYTES_MIN) as u64;
        if u64::from(count) > fit {
            return Err(WireError::TooLarge {
                what: "the number of hashes in a frame of its length",
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
        Ok(Self { count, entries })
    }

    /// Whether the list ends here.
    pub fn is_end(&self) -> bool {
        self.count == 0
    }

    /// Pages and their hashes, in ascending order.
    pub fn entries(&self) -> impl Iterator<Item = (PageIndex, Digest)> + use<'a> {
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

impl Reader<'_> {
    fn entry(&mut self) -> Result<(PageIndex, Digest), WireError> {
        let page = take_index(&mut self.rest, self.next, WHAT)?;
        let (hash, rest) = self
            .rest
            .split_first_chunk::<HASH_BYTES>()
            .ok_or(WireError::Truncated(WHAT))?;
        self.rest = rest;
        self.next = page + 1;
        Ok((PageIndex(page), Digest(u128::from_le_bytes(*hash))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrameDecoder;

    const SESSION: Session = Session(7);

    fn frames(pages: &[(u64, u128)]) -> Vec<Bytes> {
        let mut writer = HeldPagesWriter::new(SESSION);
        let mut frames = Vec::new();
        for (page, hash) in pages {
            frames.extend(writer.push(PageIndex(*page), Digest(*hash)));
        }
        frames.extend(writer.finish());
        frames
    }

    fn read(frames: &[Bytes]) -> Vec<(u64, u128)> {
        let mut decoder = FrameDecoder::for_session(SESSION);
        let mut pages = Vec::new();
        let mut ended = false;
        for bytes in frames {
            assert_eq!(decoder.push(bytes), bytes.len());
            let frame = decoder.next_frame().unwrap().unwrap();
            let held = HeldPagesFrame::parse(&frame).unwrap();
            assert!(!ended, "nothing comes after the end");
            ended = held.is_end();
            pages.extend(held.entries().map(|(page, hash)| (page.0, hash.0)));
        }
        assert!(ended, "the end is said");
        pages
    }

    fn parse(payload: &[u8]) -> Result<usize, WireError> {
        let frame = Frame {
            frame_type: FrameType::HeldPages,
            session: SESSION,
            payload: Bytes::copy_from_slice(payload),
        };
        HeldPagesFrame::parse(&frame).map(|held| held.entries().count())
    }

    #[test]
    fn a_list_of_any_length_is_read_as_it_was_written() {
        let many: Vec<_> = (0..20_000).map(|n| (n * n, u128::from(n) << 70)).collect();
        for pages in [&[][..], &[(0, 1)], &[(5, 1), (6, 2), (PAGE_INDEX_MAX, 3)], &many] {
            assert_eq!(read(&frames(pages)), pages);
        }
        assert!(frames(&many).len() > 2, "more than one frame was tried");
    }

    #[test]
    fn what_is_not_a_list_is_refused_by_name() {
        let entry = [&[3][..], &[9; 16]].concat();
        let whole = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &entry].concat();
        assert_eq!(parse(&whole), Ok(1));
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "{length} bytes of it");
        }
        assert!(matches!(
            parse(&[&whole[..], &[0]].concat()),
            Err(WireError::Trailing { bytes: 1, .. })
        ));
        let mut many = whole.clone();
        many[3] = 0xff;
        assert!(matches!(parse(&many), Err(WireError::TooLarge { .. })));
        let mut reserved = whole.clone();
        reserved[7] = 1;
        assert_eq!(parse(&reserved), Err(WireError::Reserved(WHAT)));
        let far = [
            &[1, 0, 0, 0, 0, 0, 0, 0][..],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
            &[9; 16],
        ]
        .concat();
        assert!(matches!(parse(&far), Err(WireError::TooLarge { .. })));
    }
}
