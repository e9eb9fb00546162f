//! Traces of pages: what a guest wrote in consecutive epochs, in memory and as a file.
//!
//! ```text
//!   "ROMTRACE", u32 version (1), u32 epochs, u64 pages of the guest, u32 length of an epoch in ms,
//!   u32 length of the name, the name (what the guest did)
//!   before the first epoch, then for each epoch:   u32 pages, for each in ascending order: u64 index, 4096 bytes
//!   u32 CRC-32 of everything before
//! ```
//!
//! All numbers are little-endian. Before the first epoch stand all pages that are not zeros: what the first copy of a session sends.
//! Nothing of a file is believed: lengths have limits, indexes must ascend, and the checksum must be right.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use romulus_page_codec::Page;
use romulus_types::{PAGE_BYTES, PageIndex};

const MAGIC: &[u8; 8] = b"ROMTRACE";
const VERSION: u32 = 1;
/// Largest trace, in bytes of pages: it is held in memory.
pub(super) const TRACE_BYTES_MAX: u64 = 2 << 30;
const GUEST_PAGES_MAX: u64 = 1 << 24;
const EPOCHS_MAX: u32 = 100_000;
const NAME_BYTES_MAX: u32 = 200;

/// Pages of one epoch, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) places: Vec<PageIndex>,
    pub(super) pages: Vec<Page>,
}

/// What a guest wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) name: String,
    pub(super) guest_pages: u64,
    pub(super) epoch_ms: u32,
    pub(super) before: Written,
    pub(super) epochs: Vec<Written>,
}

/// Why a file is no trace.
#[derive(Debug, thiserror::Error)]
pub(super) enum TraceError {
    #[error("the trace cannot be read or written")]
    Io(#[from] io::Error),
    #[error("this is no trace: it does not begin with ROMTRACE")]
    NoTrace,
    #[error("the trace has version {0}, and {VERSION} is understood")]
    Version(u32),
    #[error("the trace's {what} is {value}, and at most {max} is allowed")]
    TooLarge {
        what: &'static str,
        value: u64,
        max: u64,
    },
    #[error("the trace has page {0} out of order, or the guest has no such page")]
    Page(u64),
    #[error("the trace is damaged: its checksum is wrong, or more follows")]
    Damaged,
}

impl Written {
    pub(super) fn of(pages: BTreeMap<u64, Page>) -> Self {
        let (places, pages) = pages
            .into_iter()
            .map(|(place, page)| (PageIndex(place), page))
            .unzip();
        Self { places, pages }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PageIndex, &Page)> {
        self.places.iter().copied().zip(&self.pages)
    }
}

impl Trace {
    /// Pages of all epochs; not those before.
    pub(super) fn page_count(&self) -> u64 {
        self.epochs.iter().map(|written| written.pages.len() as u64).sum()
    }

    pub(super) fn write(&self, into: impl Write) -> Result<(), TraceError> {
        let mut out = Summed::new(into);
        out.put(MAGIC)?;
        let epochs = limited("number of epochs", self.epochs.len() as u64, EPOCHS_MAX.into())?;
        let name = limited("name's length", self.name.len() as u64, NAME_BYTES_MAX.into())?;
        out.put(&VERSION.to_le_bytes())?;
        out.put(&epochs.to_le_bytes())?;
        out.put(&self.guest_pages.to_le_bytes())?;
        out.put(&self.epoch_ms.to_le_bytes())?;
        out.put(&name.to_le_bytes())?;
        out.put(self.name.as_bytes())?;
        for written in std::iter::once(&self.before).chain(&self.epochs) {
            let count = limited("number of pages", written.pages.len() as u64, u32::MAX.into())?;
            out.put(&count.to_le_bytes())?;
            for (place, page) in written.iter() {
                out.put(&place.0.to_le_bytes())?;
                out.put(page)?;
            }
        }
        let sum = out.sum.clone().finalize();
        out.other.write_all(&sum.to_le_bytes())?;
        Ok(out.other.flush()?)
    }

    pub(super) fn read(from: impl Read) -> Result<Self, TraceError> {
        let mut from = Summed::new(from);
        if from.array()? != *MAGIC {
            return Err(TraceError::NoTrace);
        }
        match from.u32()? {
            VERSION => {}
            other => return Err(TraceError::Version(other)),
        }
        let epochs = limited("number of epochs", from.u32()?.into(), EPOCHS_MAX.into())?;
        let guest_pages = u64::from_le_bytes(from.array()?);
        limited("number of the guest's pages", guest_pages, GUEST_PAGES_MAX)?;
        let epoch_ms = from.u32()?;
        let name = limited("name's length", from.u32()?.into(), NAME_BYTES_MAX.into())?;
        let mut bytes = vec![0; name as usize];
        from.take(&mut bytes)?;
        let mut room = TRACE_BYTES_MAX / PAGE_BYTES as u64;
        let before = from.written(guest_pages, &mut room)?;
        let epochs = (0..epochs).map(|_| from.written(guest_pages, &mut room));
        let epochs = epochs.collect::<Result<_, _>>()?;
        let sum = from.sum.clone().finalize();
        let mut rest = Vec::new();
        from.other.take(5).read_to_end(&mut rest)?;
        if rest != sum.to_le_bytes() {
            return Err(TraceError::Damaged);
        }
        Ok(Self {
            name: String::from_utf8_lossy(&bytes).into_owned(),
            guest_pages,
            epoch_ms,
            before,
            epochs,
        })
    }
}

fn limited(what: &'static str, value: u64, max: u64) -> Result<u32, TraceError> {
    u32::try_from(value)
        .ok()
        .filter(|_| value <= max)
        .ok_or(TraceError::TooLarge { what, value, max })
}

/// A stream whose checksum is kept.
struct Summed<T> {
    other: T,
    sum: crc32fast::Hasher,
}

impl<T> Summed<T> {
    fn new(other: T) -> Self {
        Self {
            other,
            sum: crc32fast::Hasher::new(),
        }
    }
}

impl<T: Write> Summed<T> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.other.write_all(bytes)
    }
}

impl<T: Read> Summed<T> {
    fn take(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.other.read_exact(bytes)?;
        self.sum.update(bytes);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.take(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// `room`: pages that may still come.
    fn written(&mut self, guest_pages: u64, room: &mut u64) -> Result<Written, TraceError> {
        let count = u64::from(self.u32()?);
        limited("number of pages", count, guest_pages.min(*room))?;
        *room -= count;
        let mut written = Written::default();
        let mut least = 0;
        for _ in 0..count {
            let place = u64::from_le_bytes(self.array()?);
            if place < least || place >= guest_pages {
                return Err(TraceError::Page(place));
            }
            least = place + 1;
            written.places.push(PageIndex(place));
            written.pages.push(self.array()?);
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> Trace {
        let written = |pages: &[(u64, u8)]| {
            Written::of(
                pages
                    .iter()
                    .map(|(place, byte)| (*place, [*byte; PAGE_BYTES]))
                    .collect(),
            )
        };
        Trace {
            name: "redis".to_owned(),
            guest_pages: 16,
            epoch_ms: 25,
            before: written(&[(1, 1), (15, 2)]),
            epochs: vec![written(&[(1, 3)]), written(&[]), written(&[(0, 4), (15, 5)])],
        }
    }

    fn bytes() -> Vec<u8> {
        let mut bytes = Vec::new();
        trace().write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_trace_comes_back_from_its_file_as_it_was() {
        let back = Trace::read(&bytes()[..]).unwrap();
        assert_eq!((back.page_count(), &back), (3, &trace()));
    }

    #[test]
    fn a_file_that_was_cut_lengthened_or_changed_anywhere_is_refused() {
        let whole = bytes();
        for length in (0..whole.len()).step_by(101).chain([whole.len() - 1]) {
            assert!(Trace::read(&whole[..length]).is_err(), "cut to {length}");
        }
        assert!(Trace::read(&[&whole[..], b"x"].concat()[..]).is_err());
        for at in (0..whole.len()).step_by(53).chain([0, 8, 12, 16, 24, 28, 37]) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x80;
            assert!(Trace::read(&damaged[..]).is_err(), "byte {at}");
        }
    }

    #[test]
    fn lengths_in_a_file_are_not_believed() {
        let mut huge = bytes();
        huge[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Trace::read(&huge[..]), Err(TraceError::TooLarge { .. })));
        let mut huge = bytes();
        huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(Trace::read(&huge[..]), Err(TraceError::TooLarge { .. })));
    }
}
