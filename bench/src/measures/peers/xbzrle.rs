//! Encoding a page against its last version as runs, in the manner of XBZRLE: lengths of what is the same and of what differs
//! in turn, as LEB128, each second one followed by the bytes that differ (Svärd et al., "Evaluation of Delta Compression Techniques for
//! Efficient Live Migration of Large Virtual Machines", VEE 2011). Written for this comparison, to be as quick as it is simple.

use romulus_page_codec::Page;
use romulus_types::PAGE_BYTES;

const WORD: usize = size_of::<u64>();

/// Appends the runs, and says whether they are shorter than the page; otherwise nothing is appended.
pub(super) fn encode(old: &Page, new: &Page, into: &mut Vec<u8>) -> bool {
    let begun = into.len();
    let mut at = 0;
    loop {
        let same = run(old, new, at, true);
        let differs = at + same;
        if differs == PAGE_BYTES {
            return true;
        }
        let length = run(old, new, differs, false);
        if into.len() - begun + length + 4 > PAGE_BYTES {
            into.truncate(begun);
            return false;
        }
        leb128(same, into);
        leb128(length, into);
        into.extend_from_slice(&new[differs..differs + length]);
        at = differs + length;
    }
}

/// Takes the runs of a page apart; `None` when they are not those of a page.
pub(super) fn decode(mut runs: &[u8], page: &mut Page) -> Option<()> {
    let mut at = 0;
    while !runs.is_empty() {
        let same = take_leb128(&mut runs)?;
        let length = take_leb128(&mut runs)?;
        let (bytes, rest) = runs.split_at_checked(length)?;
        page.get_mut(at + same..at + same + length)?
            .copy_from_slice(bytes);
        at += same + length;
        runs = rest;
    }
    Some(())
}

fn word(page: &Page, at: usize) -> u64 {
    let bytes = page[at..at + WORD].try_into().expect("eight bytes");
    u64::from_ne_bytes(bytes)
}

/// How many bytes from `at` on are the same, or differ.
fn run(old: &Page, new: &Page, from: usize, same: bool) -> usize {
    let mut at = from;
    while at < PAGE_BYTES {
        // Whole words that are the same are passed over at once.
        if same && at.is_multiple_of(WORD) && word(old, at) == word(new, at) {
            at += WORD;
            continue;
        }
        if (old[at] == new[at]) != same {
            break;
        }
        at += 1;
    }
    at - from
}

fn leb128(mut number: usize, into: &mut Vec<u8>) {
    loop {
        let low = u8::try_from(number & 0x7f).expect("seven bits");
        number >>= 7;
        if number == 0 {
            into.push(low);
            return;
        }
        into.push(low | 0x80);
    }
}

fn take_leb128(from: &mut &[u8]) -> Option<usize> {
    let mut number = 0;
    // Three times seven bits are more than a page.
    for shift in [0, 7, 14] {
        let (first, rest) = from.split_first()?;
        *from = rest;
        number |= usize::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use romulus_guest_core::random::Random;

    use super::*;
    use crate::contents::Content;

    #[test]
    fn every_page_comes_back_or_is_said_not_to_fit() {
        let mut random = Random::new(1);
        for content in Content::ALL {
            for _ in 0..50 {
                let (old, new) = content.page(&mut random);
                let mut runs = vec![7];
                if encode(&old, &new, &mut runs) {
                    let mut page = old;
                    decode(&runs[1..], &mut page).unwrap();
                    assert!(page == new, "{}", content.name());
                    assert!(runs.len() <= PAGE_BYTES + 1);
                } else {
                    assert_eq!(runs, [7]);
                }
            }
        }
    }

    #[test]
    fn a_counter_is_a_few_bytes_and_noise_is_no_page_of_runs() {
        let mut random = Random::new(2);
        let mut runs = Vec::new();
        let (old, new) = Content::Counter.page(&mut random);
        assert!(encode(&old, &new, &mut runs) && runs.len() < 16);
        runs.clear();
        let (old, new) = Content::Noise.page(&mut random);
        assert!(!encode(&old, &new, &mut runs));
    }

    #[test]
    fn runs_of_nobody_are_refused_and_no_byte_outside_of_the_page_is_written() {
        let mut page = [0; PAGE_BYTES];
        for runs in [
            &[0x80][..],
            &[1],
            &[0, 9, 1],
            &[0xff, 0xff, 0xff, 0],
            &[0xff, 0x1f, 2, 1, 1],
        ] {
            assert_eq!(decode(runs, &mut page), None, "{runs:?}");
        }
    }
}
