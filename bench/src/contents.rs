//! Contents of pages as guests have them, and how they change from one checkpoint to the next.

use romulus_guest_core::random::Random;
use romulus_page_codec::Page;
use romulus_types::PAGE_BYTES;
use serde::Deserialize;

const WORDS: &str = "the of and to in is that it was for on are as with they at be this have from or one had by but not what \
    all were when we there can an your which their said if do will each about how up out them then she many some so these \
    would other into has more her two like him see time could no make than first been its who now people my made over did \
    down only way find use may water long little very after words called just where most know";

/// `count` different numbers below `limit`, ascending: the dirty pages of a guest. All of them if there are no more.
pub(crate) fn distinct(random: &mut Random, count: u64, limit: u64) -> Vec<u64> {
    let mut found = std::collections::BTreeSet::new();
    while (found.len() as u64) < count.min(limit) {
        found.insert(random.below(limit));
    }
    found.into_iter().collect()
}

/// How a page changed since the last checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Content {
    /// It was noise, and is all zeros now.
    Zeros,
    /// It was written, but with what it held before.
    Same,
    /// One 8-byte word of it: a counter.
    Counter,
    /// 64 single bytes, all over it.
    Scattered,
    /// It was a text, and is another one.
    Text,
    /// It was noise, and is other noise: encrypted or compressed data.
    Noise,
}

impl Content {
    pub(crate) const ALL: [Self; 6] = [
        Self::Zeros,
        Self::Same,
        Self::Counter,
        Self::Scattered,
        Self::Text,
        Self::Noise,
    ];

    /// As a plan and a report have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Zeros => "zeros",
            Self::Same => "same",
            Self::Counter => "counter",
            Self::Scattered => "scattered",
            Self::Text => "text",
            Self::Noise => "noise",
        }
    }

    /// A page as it was, and as it is.
    pub(crate) fn page(self, random: &mut Random) -> (Page, Page) {
        let old = match self {
            Self::Text => text(random),
            _ => noise(random),
        };
        let mut new = old;
        match self {
            Self::Zeros => new.fill(0),
            Self::Same => {}
            Self::Counter => new[128..136].copy_from_slice(&random.number().to_le_bytes()),
            Self::Scattered => (0..64).for_each(|_| new[place(random)] ^= 0x5a),
            Self::Text => new = text(random),
            Self::Noise => new = noise(random),
        }
        (old, new)
    }

    /// So many of them: as they were, and as they are.
    pub(crate) fn pages(self, count: usize, random: &mut Random) -> (Vec<Page>, Vec<Page>) {
        (0..count).map(|_| self.page(random)).unzip()
    }
}

fn place(random: &mut Random) -> usize {
    usize::try_from(random.below(PAGE_BYTES as u64)).expect("a page is small")
}

pub(crate) fn noise(random: &mut Random) -> Page {
    let mut page = [0; PAGE_BYTES];
    for word in page.as_chunks_mut::<8>().0 {
        *word = random.number().to_le_bytes();
    }
    page
}

fn text(random: &mut Random) -> Page {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut text = Vec::with_capacity(PAGE_BYTES + 16);
    while text.len() < PAGE_BYTES {
        let word = words[usize::try_from(random.below(words.len() as u64)).expect("a short list")];
        text.extend_from_slice(word.as_bytes());
        text.push(b' ');
    }
    text.truncate(PAGE_BYTES);
    text.try_into().expect("as long as a page")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_pages() {
        for content in Content::ALL {
            assert_eq!(
                content.page(&mut Random::new(7)),
                content.page(&mut Random::new(7))
            );
        }
        assert_ne!(
            Content::Noise.page(&mut Random::new(7)),
            Content::Noise.page(&mut Random::new(8))
        );
    }

    #[test]
    fn contents_change_as_they_say() {
        let random = &mut Random::new(1);
        let differ = |content: Content, random: &mut Random| {
            let (old, new) = content.page(random);
            old.iter().zip(&new).filter(|(old, new)| old != new).count()
        };
        assert_eq!(differ(Content::Same, random), 0);
        assert!((1..=8).contains(&differ(Content::Counter, random)));
        assert!((32..=64).contains(&differ(Content::Scattered, random)));
        assert!(differ(Content::Noise, random) > 4000);
        assert_eq!(Content::Zeros.page(random).1, [0; PAGE_BYTES]);
        assert!(Content::Text.page(random).1.is_ascii());
    }

    #[test]
    fn dirty_pages_are_distinct_ascending_and_inside() {
        let pages = distinct(&mut Random::new(3), 100, 1000);
        assert_eq!(pages.len(), 100);
        assert!(pages.windows(2).all(|pair| pair[0] < pair[1]) && pages[99] < 1000);
        assert_eq!(distinct(&mut Random::new(3), 10, 4), [0, 1, 2, 3]);
    }
}
