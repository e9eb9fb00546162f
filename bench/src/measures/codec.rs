//! `codec.page` and `codec.session`: what becomes of a copied page before it is sent, against copying it once more.

use std::hint::black_box;

use romulus_page_codec::{HeldPages, Page, Scratch, SessionEncoder, decode, encode};
use romulus_types::{PAGE_BYTES, PageIndex, Session as SessionNumber};
use serde::Deserialize;

use super::{Measure, outside};
use crate::contents::Content;
use crate::parameters::Parameters;
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::{Timings, Unit};

/// 256 MiB in each of a few buffers.
const PAGES_MAX: u64 = 1 << 16;

/// Settings of all measures of encodings.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Batch {
    /// Pages in a batch.
    #[serde(default = "pages")]
    pub(super) pages: u32,
    /// How they changed; each a row.
    #[serde(default = "contents")]
    pub(super) contents: Vec<Content>,
    #[serde(default = "rounds")]
    pub(super) rounds: u32,
}

const fn pages() -> u32 {
    4096
}

fn contents() -> Vec<Content> {
    Content::ALL.to_vec()
}

const fn rounds() -> u32 {
    10
}

impl Batch {
    pub(super) fn problem(&self) -> Option<String> {
        outside("pages", self.pages.into(), 1, PAGES_MAX)
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
    }
}

/// `encode` and `decode` of single pages.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct PageCodec(Batch);

/// The replicator's encoding step: digest, previous versions, encoding.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Session(Batch);

impl Measure for PageCodec {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let mut random = run.random();
        let (mut scratch, mut payloads, mut kinds) = (Scratch::new(), Vec::new(), Vec::new());
        for content in &self.0.contents {
            let (old, new) = content.pages(self.0.pages as usize, &mut random);
            let mut into = old.clone();
            let mut broken = None;
            let [copy, encoding, decoding] = run.in_turn(content.name(), self.0.rounds, |one| {
                Ok(match one {
                    0 => copy(&new, &mut into),
                    1 => timed(|| {
                        payloads.clear();
                        kinds.clear();
                        for (new, old) in new.iter().zip(&old) {
                            let start = payloads.len();
                            let kind = encode(new, Some(old), &mut scratch, &mut payloads);
                            kinds.push((kind.number(), start..payloads.len()));
                        }
                    }),
                    _ => timed(|| {
                        for (((kind, range), old), into) in kinds.iter().zip(&old).zip(&mut into) {
                            let done = decode(*kind, &payloads[range.clone()], Some(old), into);
                            broken = broken.take().or(done.err());
                        }
                    }),
                })
            })?;
            if let Some(error) = broken {
                return Err(Unable::failed("decoding what was encoded")(error));
            }
            if into != new {
                return Err(Unable::Wrong(
                    "a decoded page is not the one that was encoded".to_owned(),
                ));
            }
            let note = format!("{} bytes a page", payloads.len() / new.len());
            for (what, timings) in [("encode", &encoding), ("decode", &decoding)] {
                let case = format!("{what}/{}", content.name());
                let at = [
                    ("what", what.into()),
                    ("content", content.name().into()),
                    ("pages", new.len().into()),
                ];
                against_copy(
                    run,
                    (case, at.into()),
                    new.len(),
                    timings,
                    &copy,
                    Some(note.clone()),
                );
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

impl Measure for Session {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let mut random = run.random();
        let count = self.0.pages as usize;
        for content in &self.0.contents {
            let versions: [Vec<Page>; 2] = content.pages(count, &mut random).into();
            let mut into = versions[0].clone();
            let held = HeldPages::new(SessionNumber(1), count as u64);
            let mut encoder = SessionEncoder::new(held, (count * 2 * PAGE_BYTES) as u64);
            let (mut epoch, mut sent_bytes) = (0, 0);
            let [copy, encoding] = run.in_turn(content.name(), self.0.rounds, |one| {
                if one == 0 {
                    return Ok(copy(&versions[0], &mut into));
                }
                // From the first version to the second and back, as the encoder remembers what it sent.
                epoch += 1;
                let pages = &versions[epoch % 2];
                sent_bytes = 0;
                Ok(timed(|| {
                    for (index, page) in (0..).map(PageIndex).zip(pages) {
                        let sent = encoder.encode(index, page);
                        sent_bytes += sent.map_or(0, |(_, payload)| payload.len());
                    }
                }))
            })?;
            let note = Some(format!("{} bytes a page", sent_bytes / count));
            let at = [("content", content.name().into()), ("pages", count.into())];
            let case = (content.name().to_owned(), at.into());
            against_copy(run, case, count, &encoding, &copy, note);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// Copies all pages; the reference of everything that is done to pages one by one.
pub(super) fn copy(from: &[Page], into: &mut [Page]) -> u64 {
    timed(|| {
        into.iter_mut().zip(from).for_each(|(into, from)| *into = *from);
        black_box(into);
    })
}

/// A row of something that was done to `pages` pages in a batch.
pub(super) fn against_copy(
    run: &mut Run,
    (case, at): (String, Parameters),
    pages: usize,
    timings: &Timings,
    copy: &Timings,
    note: Option<String>,
) {
    let unit = Unit::ns_a_page(pages);
    if let Some((value, reference)) = timings.figure(unit).zip(copy.figure(unit)) {
        let finding = Finding {
            case,
            unit: unit.name,
            value,
            reference: Some(("memcpy of the pages".to_owned(), reference)),
            note,
        };
        run.found_at(at, finding);
    }
}
