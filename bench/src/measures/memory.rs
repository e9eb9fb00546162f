//! `memory.copy`: the copy that a checkpoint makes while the guest stands still.
//!
//! A shared memory file as large as a guest, of which so many pages, all over it, have just been written; they are copied
//! one by one into a buffer that is in memory already. The reference is one copy of as many bytes in one piece.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;

use romulus_host_sys::{SharedView, resident_buffer};
use romulus_types::PAGE_BYTES;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Deserialize;

use super::{Measure, outside};
use crate::contents::distinct;
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::Unit;

const MEMORY_MIB_MAX: u64 = 1 << 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Copy {
    /// Dirty pages, each number a row.
    #[serde(default = "pages")]
    pages: Vec<u32>,
    /// The guest's memory.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

fn pages() -> Vec<u32> {
    vec![64, 1024, 4096, 16384]
}

const fn memory_mib() -> u32 {
    1024
}

const fn rounds() -> u32 {
    100
}

/// A file of shared memory, as a guest's is, all of it written once.
pub(crate) fn guest_memory(bytes: usize) -> Result<File, Unable> {
    let memory = memfd_create("romulus-bench", MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(Unable::failed("making a memory file"))?;
    let megabyte = vec![0x5a; 1 << 20];
    for offset in (0..bytes).step_by(megabyte.len()) {
        let piece = &megabyte[..megabyte.len().min(bytes - offset)];
        memory
            .write_all_at(piece, offset as u64)
            .map_err(Unable::failed("filling a memory file"))?;
    }
    Ok(memory)
}

impl Measure for Copy {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        run.say("filling the guest's memory");
        let bytes = (self.memory_mib as usize) << 20;
        let page_count = (bytes / PAGE_BYTES) as u64;
        let memory = guest_memory(bytes)?;
        let view =
            SharedView::map(&memory, 0, bytes as u64).map_err(Unable::failed("mapping a memory file"))?;
        view.populate(0, view.bytes());
        let mut random = run.random();
        for pages in &self.pages {
            let length = *pages as usize * PAGE_BYTES;
            let (mut into, mut whole) = (resident_buffer(length), resident_buffer(length));
            let mut counter = 0_u64;
            let [copy, scattered] = run.in_turn(&format!("{pages} pages"), self.rounds, |one| {
                let dirty = distinct(&mut random, (*pages).into(), page_count);
                for page in &dirty {
                    counter += 1;
                    memory
                        .write_all_at(&counter.to_le_bytes(), page * PAGE_BYTES as u64)
                        .map_err(Unable::failed("writing to a memory file"))?;
                }
                if one == 0 {
                    return Ok(timed(|| {
                        whole.copy_from_slice(&into);
                        black_box(&whole);
                    }));
                }
                let mut copied = Ok(());
                let time_ns = timed(|| {
                    for (page, into) in dirty.iter().zip(into.chunks_mut(PAGE_BYTES)) {
                        let done = view.copy_to(page * PAGE_BYTES as u64, into);
                        copied = std::mem::replace(&mut copied, Ok(())).and(done);
                    }
                });
                copied.map_err(Unable::failed("copying pages"))?;
                Ok(time_ns)
            })?;
            let unit = Unit::ns_a_page(*pages as usize);
            let Some((value, reference)) = scattered.figure(unit).zip(copy.figure(unit)) else {
                continue;
            };
            let at = [("pages", (*pages).into()), ("memory_mib", self.memory_mib.into())];
            let finding = Finding {
                case: pages.to_string(),
                unit: unit.name,
                value,
                reference: Some(("memcpy in one piece".to_owned(), reference)),
                note: Some(format!("scattered over {} MiB", self.memory_mib)),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let most = u64::from(self.memory_mib) * 256;
        outside("memory_mib", self.memory_mib.into(), 1, MEMORY_MIB_MAX)
            .or_else(|| {
                let mut pages = self.pages.iter();
                pages.find_map(|pages| outside("pages", (*pages).into(), 1, most))
            })
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
    }
}
