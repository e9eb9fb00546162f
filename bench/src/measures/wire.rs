//! `wire.frames`: encoded pages into frames, and out of the frames again, against copying the same bytes.

use std::hint::black_box;

use romulus_page_codec::Kind;
use romulus_types::{Epoch, PAGE_BYTES, PageIndex, Session};
use romulus_wire::{FrameDecoder, Pages, PagesFrame, PagesWriter, WireError};
use serde::Deserialize;

use super::{Measure, outside};
use crate::contents::noise;
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::Unit;

/// As the replicator makes them.
const FRAME_BYTES: usize = 128 << 10;
/// As much as comes from a stream at once.
const CHUNK_BYTES: usize = 64 << 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Frames {
    /// Pages in a checkpoint.
    #[serde(default = "pages")]
    pages: u32,
    /// Bytes of each encoded page; each a row.
    #[serde(default = "payload_bytes")]
    payload_bytes: Vec<u32>,
    #[serde(default = "rounds")]
    rounds: u32,
}

const fn pages() -> u32 {
    4096
}

fn payload_bytes() -> Vec<u32> {
    vec![64, 512, 4096]
}

const fn rounds() -> u32 {
    20
}

impl Measure for Frames {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let mut random = run.random();
        let count = self.pages as usize;
        for bytes in &self.payload_bytes {
            let bytes = *bytes as usize;
            let payloads: Vec<Vec<u8>> = (0..count).map(|_| noise(&mut random)[..bytes].to_vec()).collect();
            let mut into = vec![0; count * bytes];
            let mut frames = Vec::new();
            let mut taken = Ok(());
            let [copy, put, take] = run.in_turn(&format!("{bytes} bytes"), self.rounds, |one| {
                Ok(match one {
                    0 => timed(|| {
                        let pieces = into.chunks_mut(bytes).zip(&payloads);
                        pieces.for_each(|(into, from)| into.copy_from_slice(from));
                        black_box(&mut into);
                    }),
                    1 => timed(|| frames = put_all(&payloads)),
                    _ => timed(|| taken = take_all(&frames, bytes, &mut into)),
                })
            })?;
            taken.map_err(Unable::failed("taking pages out of frames"))?;
            if into != payloads.concat() {
                return Err(Unable::Wrong(
                    "what came out of the frames is not what went in".to_owned(),
                ));
            }
            let unit = Unit::ns_a_page(count);
            for (what, timings) in [("put", &put), ("take", &take)] {
                let Some((value, reference)) = timings.figure(unit).zip(copy.figure(unit)) else {
                    continue;
                };
                let at = [
                    ("what", what.into()),
                    ("payload_bytes", bytes.into()),
                    ("pages", self.pages.into()),
                ];
                let finding = Finding {
                    case: format!("{what}/{bytes}"),
                    unit: unit.name,
                    value,
                    reference: Some(("memcpy of the payloads".to_owned(), reference)),
                    note: Some(format!("{} frames", frames.len())),
                };
                run.found_at(at, finding);
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let mut bytes = self.payload_bytes.iter();
        outside("pages", self.pages.into(), 1, 1 << 16)
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
            .or_else(|| {
                bytes.find_map(|bytes| outside("payload_bytes", (*bytes).into(), 1, PAGE_BYTES as u64))
            })
    }
}

fn writer() -> PagesWriter {
    PagesWriter::new(Session(1), Epoch(1), FRAME_BYTES)
}

fn put_all(payloads: &[Vec<u8>]) -> Vec<PagesFrame> {
    let (mut frames, mut writing) = (Vec::new(), writer());
    for (index, payload) in payloads.iter().enumerate() {
        // Every third page: indexes that are not neighbours.
        let page = PageIndex(index as u64 * 3);
        while !writing.push(page, Kind::Raw.number(), payload) {
            frames.extend(std::mem::replace(&mut writing, writer()).finish());
        }
    }
    frames.extend(writing.finish());
    frames
}

fn take_all(frames: &[PagesFrame], payload_bytes: usize, into: &mut [u8]) -> Result<(), WireError> {
    let mut decoder = FrameDecoder::for_session(Session(1));
    let mut rooms = into.chunks_mut(payload_bytes);
    for frame in frames {
        for chunk in frame.frame.chunks(CHUNK_BYTES) {
            let mut rest = chunk;
            while !rest.is_empty() {
                rest = &rest[decoder.push(rest)..];
                while let Some(frame) = decoder.next_frame()? {
                    for (entry, room) in Pages::parse(&frame)?.entries().zip(&mut rooms) {
                        room.copy_from_slice(entry.payload);
                    }
                }
            }
        }
    }
    decoder.finish()
}
