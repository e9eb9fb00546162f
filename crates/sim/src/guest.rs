//! The model guest: pages that change as it runs, and output that carries a counter derived from its memory.
//!
//! ```text
//!   page 0   | counter | ... | log: token of output c at slot c mod LOG_SLOTS |
//!   page 1.. | scribbled over, filled, zeroed
//! ```
//!
//! Each step of the guest makes one output `(counter, token)`. The token depends on chance (an interrupt's moment, a packet
//! from outside), so a guest that is set back makes *other* output from there on: whoever has seen `(c, token)` can
//! tell whether a guest's memory remembers having sent it.

use std::rc::Rc;

use romulus_page_codec::Page;
use romulus_types::{PAGE_BYTES, PageIndex};

use crate::random::Random;

/// Pages of the guest.
pub(crate) const PAGES: u64 = 40;
/// Outputs that the memory remembers.
pub(crate) const LOG_SLOTS: u64 = 300;
const LOG_AT: usize = 64;

/// One frame of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) counter: u64,
    pub(crate) token: u64,
}

/// A guest's whole memory. Copies share the pages that are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memory(Vec<Rc<Page>>);

impl Memory {
    pub(crate) fn new(random: &mut Random) -> Self {
        let mut pages = Vec::new();
        for _ in 0..PAGES {
            let mut page = [0; PAGE_BYTES];
            if random.chance(500) {
                fill(&mut page, random.next());
            }
            pages.push(Rc::new(page));
        }
        pages[0] = Rc::new([0; PAGE_BYTES]);
        Self(pages)
    }

    /// Memory as it stands in an image.
    pub(crate) fn of(pages: Vec<Page>) -> Self {
        Self(pages.into_iter().map(Rc::new).collect())
    }

    pub(crate) fn page(&self, index: PageIndex) -> &Rc<Page> {
        &self.0[usize::try_from(index.0).expect("a small number")]
    }

    /// The number of the newest output.
    pub(crate) fn counter(&self) -> u64 {
        word(&self.0[0], 0)
    }

    /// Whether this memory remembers having sent `output`.
    pub(crate) fn remembers(&self, output: Output) -> bool {
        let counter = self.counter();
        counter >= output.counter
            && (counter - output.counter >= LOG_SLOTS
                || word(&self.0[0], slot(output.counter)) == output.token)
    }

    /// Where two memories differ first.
    pub(crate) fn differs_from(&self, other: &Self) -> Option<PageIndex> {
        let position = self
            .0
            .iter()
            .zip(&other.0)
            .position(|(a, b)| !Rc::ptr_eq(a, b) && a != b)?;
        Some(PageIndex(position as u64))
    }

    /// The guest runs a little: writes, and sends one frame. `wrote` is told every page that was written.
    pub(crate) fn run(&mut self, random: &mut Random, mut wrote: impl FnMut(PageIndex)) -> Output {
        let output = Output {
            counter: self.counter() + 1,
            token: random.next(),
        };
        let page = Rc::make_mut(&mut self.0[0]);
        put_word(page, 0, output.counter);
        put_word(page, slot(output.counter), output.token);
        wrote(PageIndex(0));
        for _ in 0..random.within(0, 4) {
            let index = random.within(1, PAGES);
            let page = Rc::make_mut(&mut self.0[usize::try_from(index).expect("a small number")]);
            scribble(page, random);
            wrote(PageIndex(index));
        }
        output
    }
}

fn slot(counter: u64) -> usize {
    LOG_AT + usize::try_from(counter % LOG_SLOTS).expect("a small number") * 8
}

fn word(page: &Page, at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"))
}

fn put_word(page: &mut Page, at: usize, value: u64) {
    page[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn fill(page: &mut Page, seed: u64) {
    let mut random = Random::new(seed);
    for chunk in page.chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
}

/// A few words, all of it, or zeros: what the codec tells apart.
fn scribble(page: &mut Page, random: &mut Random) {
    match random.within(0, 20) {
        0 => fill(page, random.next()),
        1 => page.fill(0),
        2 => page.fill(7),
        _ => {
            for _ in 0..random.within(1, 6) {
                let at =
                    usize::try_from(random.within(0, PAGE_BYTES as u64 / 8)).expect("a small number") * 8;
                put_word(page, at, random.next());
            }
        }
    }
}
