//! `digest`: what finds a fault costs. Every page of a checkpoint is digested, every frame has its CRC, and a session begins
//! with keyed hashes of what the backup holds.

use std::hint::black_box;

use romulus_page_codec::{PageHasher, page_digest};
use romulus_types::{PageIndex, Session};
use serde::Deserialize;

use super::codec::{against_copy, copy};
use super::{Measure, outside};
use crate::contents::Content;
use crate::run::{Run, Unable, timed};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Digests {
    /// Pages in a batch.
    #[serde(default = "pages")]
    pages: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

const fn pages() -> u32 {
    4096
}

const fn rounds() -> u32 {
    20
}

impl Measure for Digests {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (mut into, pages) = Content::Noise.pages(self.pages as usize, &mut run.random());
        let hasher = PageHasher::new(Session(1));
        let [copy, page, crc, held] = run.in_turn("pages", self.rounds, |one| {
            Ok(match one {
                0 => copy(&pages, &mut into),
                1 => timed(|| {
                    for (index, page) in (0..).map(PageIndex).zip(&pages) {
                        black_box(page_digest(index, page));
                    }
                }),
                2 => timed(|| {
                    black_box(crc32fast::hash(pages.as_flattened()));
                }),
                _ => timed(|| {
                    for page in &pages {
                        black_box(hasher.hash(page));
                    }
                }),
            })
        })?;
        for (case, timings) in [("page", &page), ("crc32", &crc), ("held", &held)] {
            let at = [("what", case.into()), ("pages", pages.len().into())];
            against_copy(
                run,
                (case.to_owned(), at.into()),
                pages.len(),
                timings,
                &copy,
                None,
            );
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        outside("pages", self.pages.into(), 1, 1 << 16)
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
    }
}
