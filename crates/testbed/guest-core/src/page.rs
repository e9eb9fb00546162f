//! Pages whose contents follow from a seed, so that a single wrong byte is found and named.

use core::fmt;

use crate::random::Random;

/// Size of a page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// 64-bit words of a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// What a page is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Words of eight letters, as text would: compresses well.
    Text,
    /// Random bytes: does not compress.
    Random,
    /// A counter at the page's start; the rest of the page stays what it was.
    Counter,
}

/// A byte that is not what was written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongByte {
    /// Its offset in the page.
    pub offset: usize,
    /// What was written.
    pub want: u8,
    /// What is there.
    pub got: u8,
}

impl fmt::Display for WrongByte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "byte {:#x} is {:#04x}, {:#04x} was written",
            self.offset, self.got, self.want
        )
    }
}

/// Fills `words` with what `seed` says.
pub fn fill(words: &mut [u64], content: Content, seed: u64) {
    let mut random = Random::new(seed);
    for word in words {
        *word = next_word(&mut random, content);
    }
}

/// Looks whether `words` are still what [`fill`] wrote.
///
/// # Errors
/// The first byte that differs; its offset counts from the first word.
pub fn check(words: &[u64], content: Content, seed: u64) -> Result<(), WrongByte> {
    let mut random = Random::new(seed);
    for (index, &got) in words.iter().enumerate() {
        compare(index, next_word(&mut random, content), got)?;
    }
    Ok(())
}

/// Looks whether `words` are all zero.
///
/// # Errors
/// The first byte that is not.
pub fn check_zero(words: &[u64]) -> Result<(), WrongByte> {
    words
        .iter()
        .enumerate()
        .try_for_each(|(index, &got)| compare(index, 0, got))
}

/// Compares one word, and names the first byte that differs.
///
/// # Errors
/// That byte.
pub fn compare(index: usize, want: u64, got: u64) -> Result<(), WrongByte> {
    if want == got {
        return Ok(());
    }
    let byte = ((want ^ got).trailing_zeros() / 8) as usize;
    let (want, got) = (want.to_le_bytes()[byte], got.to_le_bytes()[byte]);
    Err(WrongByte {
        offset: index * 8 + byte,
        want,
        got,
    })
}

fn next_word(random: &mut Random, content: Content) -> u64 {
    match content {
        Content::Text => WORDS[(random.number() >> 60) as usize],
        Content::Random | Content::Counter => random.number(),
    }
}

const WORDS: [u64; 16] = {
    let text = b"the epoch of a  page is \nsent to its      backup, which    acknowledges it.the gate opens  ; packets leave.\n guest  writes      ";
    let mut words = [0; 16];
    let mut at = 0;
    while at < 128 {
        words[at / 8] |= (text[at] as u64) << (at % 8 * 8);
        at += 1;
    }
    words
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn contents() -> impl Strategy<Value = Content> {
        prop_oneof![Just(Content::Text), Just(Content::Random)]
    }

    proptest! {
        #[test]
        fn a_single_flipped_bit_is_found_where_it_is(
            content in contents(), seed: u64, offset in 0..PAGE_BYTES, bit in 0..8_u32,
        ) {
            let mut words = [0; PAGE_WORDS];
            fill(&mut words, content, seed);
            prop_assert_eq!(check(&words, content, seed), Ok(()));
            words[offset / 8] ^= 1 << (offset % 8 * 8 + bit as usize);
            let wrong = check(&words, content, seed).unwrap_err();
            prop_assert_eq!(wrong.offset, offset);
            prop_assert_eq!(wrong.want ^ wrong.got, 1 << bit);
        }
    }

    #[test]
    fn text_repeats_itself_and_random_bytes_do_not() {
        let distinct = |content| {
            let mut words = [0; PAGE_WORDS];
            fill(&mut words, content, 3);
            words.iter().collect::<std::collections::BTreeSet<_>>().len()
        };
        assert!(distinct(Content::Text) <= 16);
        assert!(distinct(Content::Random) > 500);
    }

    #[test]
    fn a_byte_in_a_page_of_zeros_is_found() {
        let mut words = [0; PAGE_WORDS];
        assert_eq!(check_zero(&words), Ok(()));
        words[2] = 0x0500;
        assert_eq!(
            check_zero(&words),
            Err(WrongByte {
                offset: 17,
                want: 0,
                got: 5
            })
        );
    }
}
