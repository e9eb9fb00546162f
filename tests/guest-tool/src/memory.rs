//! Writing guest memory on purpose: at a known rate, or so that a lost page is noticed.

use std::error::Error;
use std::hint::black_box;
use std::thread::sleep;
use std::time::{Duration, Instant};

const WORDS_A_PAGE: usize = 512;

/// Writes one word into each of `pages` pages in every period of `every`.
pub(crate) fn dirty(pages: usize, every: Duration) -> Result<(), Box<dyn Error>> {
    let mut memory = vec![1_u64; pages * WORDS_A_PAGE];
    let mut round = 0_u64;
    let mut next = Instant::now();
    loop {
        round += 1;
        for page in 0..pages {
            memory[page * WORDS_A_PAGE] = round;
        }
        black_box(&mut memory);
        next += every;
        match next.checked_duration_since(Instant::now()) {
            Some(wait) => sleep(wait),
            // Do not hurry after a stall: the rate is an upper bound.
            None => next = Instant::now(),
        }
    }
}

/// Fills `pages` pages with a pattern of page and round, verifies every word of the round before, and again.
///
/// A page that a checkpoint lost keeps an older round's pattern and is found in the next pass.
pub(crate) fn check(pages: usize) -> Result<(), Box<dyn Error>> {
    let mut memory = vec![0_u64; pages * WORDS_A_PAGE];
    let mut round = 0_u64;
    fill(&mut memory, round);
    loop {
        sleep(Duration::from_millis(20));
        if let Some(page) = first_bad_page(&memory, round) {
            crate::say(&format!("check BAD page {page} round {round}"))?;
        } else if round.is_multiple_of(10) {
            crate::say(&format!("check ok {round}"))?;
        }
        round += 1;
        fill(&mut memory, round);
        black_box(&mut memory);
    }
}

fn pattern(page: usize, word: usize, round: u64) -> u64 {
    let place = (page * WORDS_A_PAGE + word) as u64;
    (place ^ (round << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(memory: &mut [u64], round: u64) {
    for (page, words) in memory.chunks_mut(WORDS_A_PAGE).enumerate() {
        // A few words a page are enough to make it dirty, and cheap under emulation.
        for word in (0..WORDS_A_PAGE).step_by(128) {
            words[word] = pattern(page, word, round);
        }
    }
}

fn first_bad_page(memory: &[u64], round: u64) -> Option<usize> {
    memory.chunks(WORDS_A_PAGE).enumerate().find_map(|(page, words)| {
        let good = (0..WORDS_A_PAGE)
            .step_by(128)
            .all(|word| words[word] == pattern(page, word, round));
        (!good).then_some(page)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_an_older_round_is_found() {
        let mut memory = vec![0; 8 * WORDS_A_PAGE];
        fill(&mut memory, 1);
        let old = memory[3 * WORDS_A_PAGE..4 * WORDS_A_PAGE].to_vec();
        fill(&mut memory, 2);
        assert_eq!(first_bad_page(&memory, 2), None);
        memory[3 * WORDS_A_PAGE..4 * WORDS_A_PAGE].copy_from_slice(&old);
        assert_eq!(first_bad_page(&memory, 2), Some(3));
    }
}
