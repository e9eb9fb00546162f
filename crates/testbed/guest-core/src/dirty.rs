//! The dirtier: which pages it writes, how fast, with what, and how each of them is checked afterwards.
//!
//! ```text
//!   a page of the set, in 64-bit words:
//!   0 count of counter writes | 1 its seal | 2 count and kind of whole writes | 3 its seal | 4.. filling by the seal
//! ```
//! A seal follows from its count and the page's index, so a page is checked from its own contents; one that was never
//! written must be zero.

use core::fmt;

use crate::page::{self, Content, PAGE_WORDS, WrongByte};
use crate::random::{Random, mix};

/// Most pages that one period may dirty.
pub const PAGES_MAX: u32 = 1 << 20;
/// Longest period, in milliseconds.
pub const PERIOD_MS_MAX: u32 = 60_000;

/// In which order pages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Any page of the set.
    Random,
    /// One after the other, and again.
    Sequential,
    /// Nine writes of ten to the first tenth of the set.
    HotCold,
}

/// What the dirtier is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirtying {
    /// Order of the pages.
    pub pattern: Pattern,
    /// What they are written with.
    pub content: Content,
    /// Pages to write in each period.
    pub pages: u32,
    /// Length of a period, in milliseconds; 0: as fast as possible.
    pub period_ms: u32,
    /// Size of the set, in MiB; all that is free if not given.
    pub set_mib: Option<u32>,
}

impl Dirtying {
    /// Reads `PATTERN[/CONTENT]:PAGES:PERIOD_MS[:SET_MIB]`; `off` is `None`. The content is `counter` if not given.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Option<Self>, &'static str> {
        if text == "off" {
            return Ok(None);
        }
        let mut parts = text.split(':');
        let kind = parts.next().unwrap_or("");
        let (pattern, content) = kind.split_once('/').unwrap_or((kind, "counter"));
        let dirtying = Dirtying {
            pattern: match pattern {
                "random" => Pattern::Random,
                "sequential" => Pattern::Sequential,
                "hotcold" => Pattern::HotCold,
                _ => return Err("the pattern is one of random, sequential, hotcold"),
            },
            content: match content {
                "text" => Content::Text,
                "random" => Content::Random,
                "counter" => Content::Counter,
                _ => return Err("the content is one of text, random, counter"),
            },
            pages: number(parts.next(), 1, PAGES_MAX).ok_or("PAGES is a number from 1 to 1048576")?,
            period_ms: number(parts.next(), 0, PERIOD_MS_MAX)
                .ok_or("PERIOD_MS is a number from 0 to 60000")?,
            set_mib: match parts.next() {
                None => None,
                mib => Some(number(mib, 1, u32::MAX).ok_or("SET_MIB is a number from 1")?),
            },
        };
        match parts.next() {
            None => Ok(Some(dirtying)),
            Some(_) => Err("only PATTERN[/CONTENT]:PAGES:PERIOD_MS[:SET_MIB] is understood"),
        }
    }
}

fn number(text: Option<&str>, min: u32, max: u32) -> Option<u32> {
    text?.parse().ok().filter(|number| (min..=max).contains(number))
}

impl fmt::Display for Dirtying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pattern = match self.pattern {
            Pattern::Random => "random",
            Pattern::Sequential => "sequential",
            Pattern::HotCold => "hotcold",
        };
        let content = match self.content {
            Content::Text => "text",
            Content::Random => "random",
            Content::Counter => "counter",
        };
        write!(f, "{pattern}/{content}:{}:{}", self.pages, self.period_ms)?;
        self.set_mib.map_or(Ok(()), |mib| write!(f, ":{mib}"))
    }
}

/// Which page comes next.
#[derive(Debug, Clone)]
pub struct Walk {
    random: Random,
    next: u64,
}

impl Walk {
    /// A walk whose random choices depend on `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Walk {
            random: Random::new(seed),
            next: 0,
        }
    }

    /// Index of the next page in a set of `pages`; 0 when the set is empty.
    pub fn next(&mut self, pattern: Pattern, pages: u64) -> u64 {
        match pattern {
            Pattern::Random => self.random.below(pages),
            Pattern::Sequential => {
                self.next = if self.next + 1 < pages { self.next + 1 } else { 0 };
                self.next
            }
            Pattern::HotCold => {
                let hot = (pages / 10).max(1).min(pages);
                let set = if self.random.below(10) < 9 { hot } else { pages };
                self.random.below(set)
            }
        }
    }
}

/// Spreads a period's pages over the period.
#[derive(Debug, Clone)]
pub struct Pacer {
    start_ns: u64,
    done: u64,
    pages: u64,
    period_ns: u64,
    /// Pages that were not written, because more than a whole period was missed.
    pub skipped: u64,
}

impl Pacer {
    /// Starts at `now_ns`.
    #[must_use]
    pub fn new(dirtying: &Dirtying, now_ns: u64) -> Self {
        Pacer {
            start_ns: now_ns,
            done: 0,
            pages: u64::from(dirtying.pages).max(1),
            period_ns: u64::from(dirtying.period_ms) * 1_000_000,
            skipped: 0,
        }
    }

    /// How many pages are due at `now_ns`: at most a period's, what is beyond is skipped (after a jump of the clock, or
    /// when the guest is too slow).
    pub fn due(&mut self, now_ns: u64) -> u64 {
        if self.period_ns == 0 {
            return self.pages;
        }
        let elapsed = u128::from(now_ns.saturating_sub(self.start_ns));
        let want =
            u64::try_from(elapsed * u128::from(self.pages) / u128::from(self.period_ns)).unwrap_or(u64::MAX);
        let due = want.saturating_sub(self.done);
        let skip = due.saturating_sub(self.pages);
        self.skipped += skip;
        self.done += skip;
        due - skip
    }

    /// Periods whose pages were all written.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        (self.done - self.skipped) / self.pages
    }

    /// Notes that `pages` were written.
    pub fn done(&mut self, pages: u64) {
        self.done += pages;
    }

    /// When `pages` more will be due, in nanoseconds.
    #[must_use]
    pub fn when(&self, pages: u64) -> u64 {
        let elapsed = u128::from(self.done + pages) * u128::from(self.period_ns);
        let elapsed = elapsed.div_ceil(u128::from(self.pages));
        self.start_ns
            .saturating_add(u64::try_from(elapsed).unwrap_or(u64::MAX))
    }
}

/// Writes page `index` of the set once more.
pub fn write_page(words: &mut [u64; PAGE_WORDS], index: u64, content: Content) {
    if content == Content::Counter {
        words[0] = words[0].wrapping_add(1).max(1);
        words[1] = seal(words[0], index);
        return;
    }
    let count = (words[2] >> 1).wrapping_add(1).max(1);
    words[2] = count << 1 | u64::from(content == Content::Text);
    words[3] = seal(words[2], index);
    let seed = words[3];
    page::fill(&mut words[4..], content, seed);
}

/// Looks whether page `index` of the set is as [`write_page`] left it.
///
/// # Errors
/// The first wrong byte.
pub fn check_page(words: &[u64; PAGE_WORDS], index: u64) -> Result<(), WrongByte> {
    page::compare(1, seal(words[0], index), words[1])?;
    page::compare(3, seal(words[2], index), words[3])?;
    let filled = match words[2] {
        0 => page::check_zero(&words[4..]),
        kind if kind & 1 == 1 => page::check(&words[4..], Content::Text, words[3]),
        _ => page::check(&words[4..], Content::Random, words[3]),
    };
    filled.map_err(|wrong| WrongByte {
        offset: wrong.offset + 32,
        ..wrong
    })
}

fn seal(count: u64, index: u64) -> u64 {
    if count == 0 { 0 } else { mix(count ^ mix(index)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn contents() -> impl Strategy<Value = Content> {
        prop_oneof![Just(Content::Text), Just(Content::Random), Just(Content::Counter)]
    }

    proptest! {
        #[test]
        fn every_history_of_a_page_checks_and_any_flipped_bit_is_found(
            writes in proptest::collection::vec(contents(), 0..5), index: u64,
            at in 0..PAGE_WORDS, bit in 0..64_u32,
        ) {
            let mut words = [0; PAGE_WORDS];
            for content in writes {
                write_page(&mut words, index, content);
                prop_assert_eq!(check_page(&words, index), Ok(()));
            }
            words[at] ^= 1 << bit;
            prop_assert!(check_page(&words, index).is_err());
        }

        #[test]
        fn settings_survive_their_text(
            content in contents(), pages in 1..=PAGES_MAX, period_ms in 0..=PERIOD_MS_MAX,
            set_mib in proptest::option::of(1_u32..), pattern in 0..3_usize,
        ) {
            let pattern = [Pattern::Random, Pattern::Sequential, Pattern::HotCold][pattern];
            let dirtying = Dirtying { pattern, content, pages, period_ms, set_mib };
            prop_assert_eq!(Dirtying::parse(&dirtying.to_string()), Ok(Some(dirtying)));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            let _ = Dirtying::parse(&text);
        }

        #[test]
        fn a_walk_stays_in_its_set(pages in 1..5_000_u64, seed: u64) {
            let mut walk = Walk::new(seed);
            for pattern in [Pattern::Random, Pattern::Sequential, Pattern::HotCold] {
                prop_assert!((0..100).all(|_| walk.next(pattern, pages) < pages));
            }
        }

        #[test]
        fn the_pace_is_kept_over_any_steps(steps in proptest::collection::vec(0..9_000_000_u64, 1..200)) {
            let dirtying = Dirtying::parse("random:100:10").unwrap().unwrap();
            let mut pacer = Pacer::new(&dirtying, 5);
            let (mut now, mut written) = (5, 0);
            for step in steps {
                now += step;
                let due = pacer.due(now);
                pacer.done(due);
                written += due;
                prop_assert!(pacer.when(1) > now);
            }
            prop_assert_eq!(written, (now - 5) * 100 / 10_000_000);
            prop_assert_eq!(pacer.skipped, 0);
        }
    }

    #[test]
    fn a_page_in_another_ones_place_is_found() {
        let mut words = [0; PAGE_WORDS];
        write_page(&mut words, 1, Content::Counter);
        assert!(check_page(&words, 2).is_err());
    }

    #[test]
    fn a_jump_of_the_clock_makes_no_burst() {
        let dirtying = Dirtying::parse("random:100:10").unwrap().unwrap();
        let mut pacer = Pacer::new(&dirtying, 0);
        assert_eq!(pacer.due(1_000_000_000), 100);
        assert_eq!(pacer.skipped, 9_900);
    }

    #[test]
    fn nine_of_ten_writes_are_hot() {
        let mut walk = Walk::new(1);
        let hot = (0..10_000)
            .filter(|_| walk.next(Pattern::HotCold, 1_000) < 100)
            .count();
        assert!((8_900..9_300).contains(&hot), "{hot}");
    }
}
