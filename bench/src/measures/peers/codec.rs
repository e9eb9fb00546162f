//! `codec.peers`: our encoding of a page beside others of the same pages: LZ4 alone, zstd at its quickest, and runs in the manner of
//! XBZRLE. Time and bytes; each of them has to bring the page back.

use romulus_page_codec::{Page, Scratch, encode};
use romulus_types::PAGE_BYTES;
use serde::Deserialize;

use super::xbzrle;
use crate::contents::Content;
use crate::measures::Measure;
use crate::measures::codec::Batch as Settings;
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::{Figure, Unit, float};

/// zstd's own scale goes from 1 to 22; the lowest is for speed.
const ZSTD_LEVEL: i32 = 1;
const PEERS: [&str; 3] = ["lz4", "zstd-1", "xbzrle"];

/// Settings.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct CodecPeers(Settings);

/// What a peer makes of a batch.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Where each page's bytes end; a page that gets no shorter is kept as it is.
    ends: Vec<usize>,
}

impl Batch {
    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// The room for a page's bytes, of which `encode` takes some; as it is when it says `None` or takes as many as the page has.
    fn push(&mut self, page: &Page, room: usize, encode: impl FnOnce(&mut [u8]) -> Option<usize>) {
        let begin = self.bytes.len();
        self.bytes.resize(begin + room, 0);
        let taken = encode(&mut self.bytes[begin..]).filter(|taken| *taken < PAGE_BYTES);
        self.bytes.truncate(begin + taken.unwrap_or(0));
        if taken.is_none() {
            self.bytes.extend_from_slice(page);
        }
        self.ends.push(self.bytes.len());
    }

    fn pages(&self) -> impl Iterator<Item = &[u8]> {
        let begins = [0].into_iter().chain(self.ends.iter().copied());
        begins
            .zip(&self.ends)
            .map(|(begin, end)| &self.bytes[begin..*end])
    }
}

impl Measure for CodecPeers {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let mut random = run.random();
        let mut zstd = Zstd::new()?;
        for content in &self.0.contents {
            let (old, new) = content.pages(self.0.pages as usize, &mut random);
            let mut scratch = Scratch::new();
            let mut ours = Vec::new();
            let mut batches: [Batch; 3] = Default::default();
            let mut failed = None;
            let timings = run.in_turn::<4>(content.name(), self.0.rounds, |one| {
                Ok(match one {
                    0 => timed(|| {
                        ours.clear();
                        for (new, old) in new.iter().zip(&old) {
                            encode(new, Some(old), &mut scratch, &mut ours);
                        }
                    }),
                    1 => timed(|| lz4(&new, &mut batches[0])),
                    2 => timed(|| failed = failed.take().or(zstd.encode(&new, &mut batches[1]).err())),
                    _ => timed(|| runs(&old, &new, &mut batches[2])),
                })
            })?;
            if let Some(error) = failed {
                return Err(error);
            }
            check(&old, &new, &batches, &mut zstd)?;
            let sizes = batches.each_ref().map(|batch| batch.bytes.len());
            self.tell(run, *content, &timings, ours.len(), sizes)?;
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

impl CodecPeers {
    fn tell(
        &self,
        run: &mut Run,
        content: Content,
        timings: &[crate::stats::Timings; 4],
        ours: usize,
        sizes: [usize; 3],
    ) -> Result<(), Unable> {
        let pages = self.0.pages as usize;
        let unit = Unit::ns_a_page(pages);
        let nothing = || Unable::Wrong("nothing was measured".to_owned());
        let bytes = |all: usize| Figure::of(&[float(all as u64) / float(pages as u64)]).ok_or_else(nothing);
        for ((peer, timing), size) in PEERS.into_iter().zip(&timings[1..]).zip(sizes) {
            let time = timings[0]
                .figure(unit)
                .zip(timing.figure(unit))
                .ok_or_else(nothing)?;
            let size = (bytes(ours)?, bytes(size)?);
            for (what, unit, (value, reference)) in [("time", unit.name, time), ("bytes", "bytes/page", size)]
            {
                let at = [
                    ("what", what.into()),
                    ("peer", peer.into()),
                    ("content", content.name().into()),
                ];
                let finding = Finding {
                    case: format!("{what}/{peer}/{}", content.name()),
                    unit,
                    value,
                    reference: Some((peer.to_owned(), reference)),
                    note: None,
                };
                run.found_at(at, finding);
            }
        }
        Ok(())
    }
}

fn lz4(new: &[Page], into: &mut Batch) {
    into.clear();
    let room = lz4_flex::block::get_maximum_output_size(PAGE_BYTES);
    for page in new {
        into.push(page, room, |room| lz4_flex::block::compress_into(page, room).ok());
    }
}

fn runs(old: &[Page], new: &[Page], into: &mut Batch) {
    into.clear();
    for (old, new) in old.iter().zip(new) {
        if !xbzrle::encode(old, new, &mut into.bytes) {
            into.bytes.extend_from_slice(new);
        }
        into.ends.push(into.bytes.len());
    }
}

/// zstd with what it keeps from page to page: its memory, no contents.
struct Zstd {
    compress: zstd::bulk::Compressor<'static>,
    decompress: zstd::bulk::Decompressor<'static>,
}

impl Zstd {
    fn new() -> Result<Self, Unable> {
        Ok(Self {
            compress: zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(Unable::failed("starting zstd"))?,
            decompress: zstd::bulk::Decompressor::new().map_err(Unable::failed("starting zstd"))?,
        })
    }

    fn encode(&mut self, new: &[Page], into: &mut Batch) -> Result<(), Unable> {
        into.clear();
        let mut failed = None;
        for page in new {
            into.push(page, zstd::zstd_safe::compress_bound(PAGE_BYTES), |room| {
                let done = self.compress.compress_to_buffer(page, room);
                done.map_err(|error| failed = Some(error)).ok()
            });
        }
        failed.map_or(Ok(()), |error| {
            Err(Unable::failed("compressing with zstd")(error))
        })
    }
}

/// Whether every peer brings every page back.
fn check(old: &[Page], new: &[Page], batches: &[Batch; 3], zstd: &mut Zstd) -> Result<(), Unable> {
    for (peer, batch) in PEERS.into_iter().zip(batches) {
        for ((bytes, old), new) in batch.pages().zip(old).zip(new) {
            let mut page = *old;
            let done = match (bytes.len(), peer) {
                (PAGE_BYTES, _) => {
                    page.copy_from_slice(bytes);
                    true
                }
                (_, "lz4") => lz4_flex::block::decompress_into(bytes, &mut page).is_ok(),
                (_, "zstd-1") => zstd.decompress.decompress_to_buffer(bytes, &mut page[..]).is_ok(),
                _ => xbzrle::decode(bytes, &mut page).is_some(),
            };
            if !done || page != *new {
                return Err(Unable::Wrong(format!("{peer} does not bring a page back")));
            }
        }
    }
    Ok(())
}
