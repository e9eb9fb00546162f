//! The word-mask delta: which 8-byte words of a page changed, and their new values.
//!
//! ```text
//!   u64 lines          bit i: line i (64 bytes, 8 words) has a changed word; never 0
//!   u8  words  × L     for each set bit of `lines`: bit j: word j of that line changed; never 0
//!   u64 word   × W     for each set bit of the masks: the new word
//! ```
//!
//! All little-endian, lowest bit first. Two levels cost 9 bytes for one changed word, where a flat mask costs 64.

use romulus_types::PAGE_BYTES;

use crate::kind::Page;

const WORD_BYTES: usize = 8;
const LINE_BYTES: usize = 64;
const LINES: usize = PAGE_BYTES / LINE_BYTES;
const LINES_MASK_BYTES: usize = 8;

/// Which words of a page differ from those of its previous version.
pub(crate) struct Changes {
    lines: u64,
    words: [u8; LINES],
    payload_bytes: usize,
}

/// Why a delta payload was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// The mask of lines, or the mask of one line, is cut off or has no bit set.
    #[error("its mask is cut off or has an empty part")]
    Mask,
    /// The mask calls for another number of bytes than there are.
    #[error("its mask calls for {expected} bytes, but there are {actual}")]
    Length {
        /// Bytes that the mask calls for.
        expected: usize,
        /// Bytes of the payload.
        actual: usize,
    },
}

fn words(line: &[u8; LINE_BYTES]) -> [u64; LINE_BYTES / WORD_BYTES] {
    let (words, _) = line.as_chunks::<WORD_BYTES>();
    std::array::from_fn(|word| u64::from_le_bytes(words[word]))
}

fn line_mask(line: &[u8; LINE_BYTES], previous: &[u8; LINE_BYTES]) -> u8 {
    let (line, previous) = (words(line), words(previous));
    (0..line.len()).fold(0, |mask, word| {
        mask | (u8::from(line[word] != previous[word]) << word)
    })
}

fn lines_differ(line: &[u8; LINE_BYTES], previous: &[u8; LINE_BYTES]) -> bool {
    let (line, previous) = (words(line), words(previous));
    (0..line.len()).fold(0, |changed, word| changed | (line[word] ^ previous[word])) != 0
}

impl Changes {
    /// Compares the two pages.
    pub(crate) fn between(page: &Page, previous: &Page) -> Self {
        let (page_lines, _) = page.as_chunks::<LINE_BYTES>();
        let (previous_lines, _) = previous.as_chunks::<LINE_BYTES>();
        let mut lines = 0u64;
        for line in 0..LINES {
            lines |= u64::from(lines_differ(&page_lines[line], &previous_lines[line])) << line;
        }
        let mut changes = Self {
            lines,
            words: [0; LINES],
            payload_bytes: LINES_MASK_BYTES,
        };
        for line in bits(lines) {
            let mask = line_mask(&page_lines[line], &previous_lines[line]);
            changes.words[line] = mask;
            changes.payload_bytes += 1 + WORD_BYTES * mask.count_ones() as usize;
        }
        changes
    }

    /// Whether the pages are equal.
    pub(crate) fn is_empty(&self) -> bool {
        self.lines == 0
    }

    /// Bytes that [`Changes::write`] appends.
    pub(crate) fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Appends the delta that turns the previous version into `page`.
    pub(crate) fn write(&self, page: &Page, out: &mut Vec<u8>) {
        let start = out.len();
        out.reserve(self.payload_bytes);
        out.extend_from_slice(&self.lines.to_le_bytes());
        out.extend(bits(self.lines).map(|line| self.words[line]));
        let (lines, _) = page.as_chunks::<LINE_BYTES>();
        for line in bits(self.lines) {
            let (words, _) = lines[line].as_chunks::<WORD_BYTES>();
            for word in bits(u64::from(self.words[line])) {
                out.extend_from_slice(&words[word]);
            }
        }
        assert_eq!(
            out.len() - start,
            self.payload_bytes,
            "a delta has the length that was planned"
        );
    }
}

/// Replaces the words of `page`, which holds the previous version. Checks everything before it changes anything.
pub(crate) fn apply(payload: &[u8], page: &mut Page) -> Result<(), DeltaError> {
    let (lines, rest) = payload
        .split_first_chunk::<LINES_MASK_BYTES>()
        .ok_or(DeltaError::Mask)?;
    let lines = u64::from_le_bytes(*lines);
    let (masks, new_words) = rest
        .split_at_checked(lines.count_ones() as usize)
        .ok_or(DeltaError::Mask)?;
    if lines == 0 || masks.contains(&0) {
        return Err(DeltaError::Mask);
    }
    let word_count: usize = masks.iter().map(|mask| mask.count_ones() as usize).sum();
    let expected = LINES_MASK_BYTES + masks.len() + word_count * WORD_BYTES;
    if payload.len() != expected {
        return Err(DeltaError::Length {
            expected,
            actual: payload.len(),
        });
    }
    let (new_words, _) = new_words.as_chunks::<WORD_BYTES>();
    let mut new_words = new_words.iter();
    let (page_lines, _) = page.as_chunks_mut::<LINE_BYTES>();
    for (line, mask) in bits(lines).zip(masks) {
        let (page_words, _) = page_lines[line].as_chunks_mut::<WORD_BYTES>();
        for word in bits(u64::from(*mask)) {
            page_words[word] = *new_words.next().expect("the length was checked against the mask");
        }
    }
    Ok(())
}

/// The positions of the set bits, lowest first.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = mask.trailing_zeros() as usize;
        mask &= mask.wrapping_sub(1);
        (lowest < 64).then_some(lowest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(page: &Page, previous: &Page) -> Vec<u8> {
        let mut out = Vec::new();
        Changes::between(page, previous).write(page, &mut out);
        out
    }

    #[test]
    fn one_changed_word_costs_seventeen_bytes() {
        let previous = [7; PAGE_BYTES];
        let mut page = previous;
        page[4095] = 8;
        let payload = delta(&page, &previous);
        assert_eq!(payload.len(), 17);
        assert_eq!(payload[..8], (1u64 << 63).to_le_bytes());
        assert_eq!(payload[8], 0x80);
        assert_eq!(payload[9..], [7, 7, 7, 7, 7, 7, 7, 8]);
    }

    #[test]
    fn applying_a_delta_twice_changes_nothing_more() {
        let previous = [1; PAGE_BYTES];
        let page: Page = std::array::from_fn(|i| if i % 100 == 0 { 9 } else { 1 });
        let payload = delta(&page, &previous);
        let mut applied = previous;
        apply(&payload, &mut applied).unwrap();
        assert_eq!(applied, page);
        apply(&payload, &mut applied).unwrap();
        assert_eq!(applied, page);
    }

    #[test]
    fn empty_masks_and_wrong_lengths_are_refused_before_the_page_changes() {
        let previous = [1; PAGE_BYTES];
        let page: Page = std::array::from_fn(|i| u8::from(i >= 512));
        let good = delta(&page, &previous);
        let mut no_line = good.clone();
        no_line[..8].fill(0);
        let mut empty_line = good.clone();
        empty_line[8] = 0;
        empty_line.truncate(good.len() - LINE_BYTES);
        let mut longer = good.clone();
        longer.push(0);
        let cut = (0..good.len()).map(|end| good[..end].to_vec());
        for bad in cut.chain([no_line, empty_line, longer]) {
            let mut target = previous;
            assert!(apply(&bad, &mut target).is_err());
            assert_eq!(target, previous);
        }
    }
}
