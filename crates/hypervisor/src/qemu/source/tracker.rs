//! Which pages were written, and copying them.
//!
//! ```text
//!   protect (slices, while stopped) ─► [ harvest (while stopped) ─► copy ─► forget | give back ]*
//! ```
//!
//! A harvest takes pages out of the kernel's record. They are in `runs` until the copy is known to be good; if it is not, they
//! are *pending* and part of the next harvest. When the kernel fails in the middle of a block, the whole block is pending.

use romulus_host_sys::{PageRegion, Pagemap, ProcessMemory, RemoteRange, SysError, UserFault};
use romulus_types::{PAGE_BYTES, PageIndex};

use super::error::{AttachError, CaptureError};
use super::placement::Placed;
use crate::source::Checkpoint;

const PAGE: u64 = PAGE_BYTES as u64;

/// Consecutive pages of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The block's position.
    block: usize,
    /// First page, in the guest's numbering.
    first: u64,
    /// How many.
    count: u64,
}

/// A block with its place in the guest's page numbering.
#[derive(Debug)]
struct Block {
    place: Placed,
    first_page: u64,
}

impl Block {
    fn pages(&self) -> u64 {
        self.place.bytes / PAGE
    }

    fn whole(&self, block: usize) -> Run {
        Run {
            block,
            first: self.first_page,
            count: self.pages(),
        }
    }
}

/// A range to protect.
pub(super) type Slice = (u64, u64);

/// Dirty tracking of all blocks of one QEMU.
#[derive(Debug)]
pub(super) struct Tracker {
    fault: UserFault,
    pagemap: Pagemap,
    memory: ProcessMemory,
    blocks: Vec<Block>,
    twins: Vec<(String, u64, u64)>,
    main: usize,
    /// KVM runs the guest.
    kvm: bool,
    runs: Vec<Run>,
    pending: Vec<Run>,
}

impl Tracker {
    /// Registers all blocks. Nothing is protected yet.
    pub(super) fn register(
        pid: u32,
        fault: UserFault,
        main: usize,
        kvm: bool,
        places: Vec<Placed>,
    ) -> Result<Self, AttachError> {
        let mut first_page = 0;
        let mut blocks: Vec<Block> = Vec::with_capacity(places.len());
        let mut twins: Vec<(String, u64, u64)> = Vec::new();
        for place in places {
            for (start, bytes) in &place.twins {
                if !twins.iter().any(|(_, known, _)| known == start) {
                    twins.push((place.name.clone(), *start, *bytes));
                }
            }
            let pages = place.bytes / PAGE;
            blocks.push(Block { place, first_page });
            first_page += pages;
        }
        let tracked = blocks
            .iter()
            .map(|b| (&b.place.name, b.place.start, b.place.mapping_bytes));
        let tracked = tracked.filter(|(_, start, _)| !twins.iter().any(|(_, twin, _)| twin == start));
        for (name, start, bytes) in
            tracked.chain(twins.iter().map(|(name, start, bytes)| (name, *start, *bytes)))
        {
            fault
                .register(start, bytes)
                .map_err(|error| match error.raw_os_error() {
                    Some(libc::EBUSY) => AttachError::TrackedByAnother { block: name.clone() },
                    _ => AttachError::System(error),
                })?;
        }
        let (pagemap, memory) = (Pagemap::open(pid)?, ProcessMemory::new(pid));
        Ok(Self {
            fault,
            pagemap,
            memory,
            blocks,
            twins,
            main,
            kvm,
            runs: Vec::with_capacity(1 << 14),
            pending: Vec::new(),
        })
    }

    /// Whether the main memory is copied from a shared mapping.
    pub(super) fn main_is_shared(&self) -> bool {
        self.blocks[self.main].place.view.is_some()
    }

    /// Everything that is to be protected, cut so that each piece takes about the same time.
    pub(super) fn slices(&self, slice_bytes: u64) -> Vec<Slice> {
        let mut slices = Vec::new();
        let blocks = self.blocks.iter().filter(|b| b.place.twins.is_empty());
        let blocks = blocks.map(|b| (b.place.start, b.place.mapping_bytes));
        for (mut start, mut left) in blocks.chain(self.twins.iter().map(|(_, start, bytes)| (*start, *bytes)))
        {
            while left > 0 {
                let bytes = left.min(slice_bytes);
                slices.push((start, bytes));
                (start, left) = (start + bytes, left - bytes);
            }
        }
        slices
    }

    /// Protects one slice. The guest must be stopped and drained: what was pinned for DMA before is not seen.
    pub(super) fn protect(&self, slice: Slice) -> Result<(), SysError> {
        self.fault.write_protect(slice.0, slice.1)
    }

    /// Forgets what was pending: everything is going to be read again.
    pub(super) fn forget_pending(&mut self) {
        self.pending.clear();
    }

    /// Takes the written pages, ascending, together with the pending ones. Returns how many. The guest must be stopped.
    pub(super) fn harvest(&mut self) -> Result<u64, CaptureError> {
        self.runs.clear();
        for (name, start, bytes) in &self.twins {
            if self.pagemap.count_written(*start, start + bytes)? > 0 {
                return Err(CaptureError::TwinWritten { block: name.clone() });
            }
        }
        let mut failed = None;
        for (position, block) in self.blocks.iter().enumerate() {
            if !block.place.twins.is_empty() {
                continue;
            }
            let (start, end) = (block.place.start, block.place.start + block.place.bytes);
            let runs = &mut self.runs;
            let found = |region: &PageRegion| {
                let first = block.first_page + (region.start - start) / PAGE;
                runs.push(Run {
                    block: position,
                    first,
                    count: region.bytes() / PAGE,
                });
            };
            let harvested = if self.kvm {
                self.pagemap.harvest_written_apart(start, end, found)
            } else {
                self.pagemap.harvest_written(start, end, found)
            };
            if let Err(error) = harvested {
                self.runs.retain(|run| run.block != position);
                self.runs.push(block.whole(position));
                failed.get_or_insert(error);
            }
        }
        if !self.pending.is_empty() {
            self.runs = union(&self.runs, &self.pending);
            self.pending.clear();
        }
        if let Some(error) = failed {
            self.give_back();
            return Err(error.into());
        }
        Ok(self.runs.iter().map(|run| run.count).sum())
    }

    /// Keeps the first `pages_max` of the harvested pages; the others are in the next harvest again.
    pub(super) fn put_off_beyond(&mut self, pages_max: u64) {
        let mut room = pages_max;
        let mut later = Vec::new();
        self.runs.retain_mut(|run| {
            let now = run.count.min(room);
            room -= now;
            if now < run.count {
                later.push(Run {
                    first: run.first + now,
                    count: run.count - now,
                    ..*run
                });
            }
            run.count = now;
            now > 0
        });
        self.pending = union(&self.pending, &later);
    }

    /// The harvested pages did not become part of a checkpoint: they are in the next harvest again.
    pub(super) fn give_back(&mut self) {
        self.pending = union(&self.pending, &self.runs);
        self.runs.clear();
    }

    /// The harvested pages are in a checkpoint that counts.
    pub(super) fn settle(&mut self) {
        self.runs.clear();
    }

    /// Copies the harvested pages.
    pub(super) fn copy(&mut self, into: &mut Checkpoint) -> Result<(), SysError> {
        let count: u64 = self.runs.iter().map(|run| run.count).sum();
        let bytes = usize::try_from(count * PAGE).expect("a guest's memory fits in the address space");
        if into.data.len() < bytes {
            into.data.resize(bytes, 0);
        }
        into.pages.clear();
        let mut rest = &mut into.data[..bytes];
        for group in self.runs.chunk_by(|a, b| a.block == b.block) {
            let block = &self.blocks[group[0].block];
            let group_bytes = group.iter().map(run_bytes).sum();
            let (now, later) = rest.split_at_mut(group_bytes);
            copy_block(&mut self.memory, block, group, now)?;
            rest = later;
            for run in group {
                into.pages
                    .extend((run.first..run.first + run.count).map(PageIndex));
            }
        }
        Ok(())
    }

    /// Reads whole pages from `first` on, across blocks.
    pub(super) fn read(&mut self, first: PageIndex, into: &mut [u8]) -> Result<(), SysError> {
        let mut page = first.0;
        let mut rest = into;
        while !rest.is_empty() {
            let position = self
                .blocks
                .partition_point(|b| b.first_page <= page)
                .saturating_sub(1);
            let block = &self.blocks[position];
            let left = (block.first_page + block.pages()).saturating_sub(page);
            if left == 0 {
                let limit = block.first_page + block.pages();
                return Err(SysError::OutOfBounds {
                    what: "a page",
                    offset: page,
                    bytes: 1,
                    limit,
                });
            }
            let count = left.min(rest.len() as u64 / PAGE);
            let run = Run {
                block: position,
                first: page,
                count,
            };
            let (now, later) = rest.split_at_mut(run_bytes(&run));
            copy_block(&mut self.memory, block, &[run], now)?;
            (page, rest) = (page + count, later);
        }
        Ok(())
    }

    /// Gives all ranges back.
    pub(super) fn unregister(self) -> Result<(), SysError> {
        let twins = self.twins.iter().map(|(_, start, bytes)| (*start, *bytes));
        let blocks = self.blocks.iter().filter(|b| b.place.twins.is_empty());
        for (start, bytes) in blocks
            .map(|b| (b.place.start, b.place.mapping_bytes))
            .chain(twins)
        {
            self.fault.unregister(start, bytes)?;
        }
        Ok(())
    }
}

fn run_bytes(run: &Run) -> usize {
    usize::try_from(run.count * PAGE).expect("a guest's memory fits in the address space")
}

fn copy_block(
    memory: &mut ProcessMemory,
    block: &Block,
    runs: &[Run],
    into: &mut [u8],
) -> Result<(), SysError> {
    let offset = |run: &Run| (run.first - block.first_page) * PAGE;
    let Some(view) = &block.place.view else {
        let ranges = runs.iter().map(|run| RemoteRange {
            address: block.place.start + offset(run),
            bytes: run_bytes(run),
        });
        return memory.read_ranges(ranges, into);
    };
    let mut rest = into;
    for run in runs {
        let (now, later) = rest.split_at_mut(run_bytes(run));
        view.copy_to(offset(run), now)?;
        rest = later;
    }
    Ok(())
}

/// The pages of both, ascending and each once.
fn union(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = a.iter().chain(b).copied().collect();
    all.sort_unstable_by_key(|run| run.first);
    let mut merged: Vec<Run> = Vec::with_capacity(all.len());
    for run in all {
        match merged.last_mut() {
            Some(last) if last.block == run.block && run.first <= last.first + last.count => {
                last.count = last.count.max(run.first + run.count - last.first);
            }
            _ => merged.push(run),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(block: usize, first: u64, count: u64) -> Run {
        Run { block, first, count }
    }

    #[test]
    fn a_union_has_every_page_once_and_in_order() {
        let a = [run(0, 5, 2), run(0, 20, 1), run(1, 100, 50)];
        let b = [run(0, 6, 10), run(0, 21, 1), run(1, 120, 5), run(2, 150, 1)];
        let expected = [run(0, 5, 11), run(0, 20, 2), run(1, 100, 50), run(2, 150, 1)];
        assert_eq!(union(&a, &b), expected);
        assert_eq!(union(&[], &b), b);
    }
}

#[cfg(test)]
#[path = "tracker_tests.rs"]
mod memory_tests;
