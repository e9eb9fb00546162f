//! The previous versions of pages that the primary keeps for deltas, in bounded memory.
//!
//! ```text
//!   table  [ · | 2 | · | 0 | 1 | · … ]    page index → slot, open addressing, at most half full
//!   owners [ (page 7, used) | (page 3, ) | (page 9, used) ]
//!   pages  [ 4 KiB          | 4 KiB      | 4 KiB          ]  in chunks, allocated as they fill
//!                             ▲ clock hand: a used page loses its mark, an unmarked one its slot
//! ```
//!
//! A page gets its mark when it is found again, not when it comes in, so a first copy of all memory does not drive
//! out the pages that are written in every epoch.
//!
//! Invariants: the memory in use never exceeds the capacity, with the bookkeeping counted in; every occupied slot is in the
//! table exactly once.

use romulus_types::{PAGE_BYTES, PageIndex};

use crate::kind::Page;

/// Bookkeeping for one kept page, in bytes, at most: 16 for its owner, 8 to 16 for the table (2 to 4 buckets of
/// 4 bytes), 4 for the free list, and its share of the chunk list (16 bytes for 64 pages).
pub const SLOT_OVERHEAD_BYTES: usize = 48;

const CHUNK_PAGES: usize = 64;
const EMPTY: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Owner {
    page: PageIndex,
    used: bool,
    occupied: bool,
}

/// What has happened to a [`PreviousPages`] since it was made. Monotonic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PreviousPagesCounters {
    /// Lookups that found the page.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Pages that lost their slot to another page.
    pub evictions: u64,
}

/// A bounded store of previous versions: page index → copy of the page.
///
/// What is in it must be what the other side holds. So whoever aborts a capture or begins a session calls
/// [`clear`](Self::clear), or [`remove`](Self::remove) for the pages in doubt.
pub struct PreviousPages {
    slots_max: usize,
    table: Vec<u32>,
    owners: Vec<Owner>,
    free: Vec<u32>,
    chunks: Vec<Box<[Page]>>,
    hand: usize,
    counters: PreviousPagesCounters,
}

impl PreviousPages {
    /// An empty store that uses at most `capacity_bytes`, bookkeeping included. With 0 it keeps nothing.
    ///
    /// The bookkeeping, about 1 % of the capacity, is allocated here, the copies when they are needed.
    pub fn new(capacity_bytes: u64) -> Self {
        let slots = capacity_bytes / (PAGE_BYTES + SLOT_OVERHEAD_BYTES) as u64;
        let slots_max = usize::try_from(slots)
            .unwrap_or(usize::MAX)
            .min(EMPTY as usize - 1);
        let buckets = if slots_max == 0 {
            0
        } else {
            (slots_max * 2).next_power_of_two()
        };
        Self {
            slots_max,
            table: vec![EMPTY; buckets],
            owners: Vec::with_capacity(slots_max),
            free: Vec::with_capacity(slots_max),
            chunks: Vec::with_capacity(slots_max.div_ceil(CHUNK_PAGES)),
            hand: 0,
            counters: PreviousPagesCounters::default(),
        }
    }

    /// The kept version of the page, if there is one.
    pub fn get(&mut self, page: PageIndex) -> Option<&Page> {
        let Some(bucket) = self.bucket_of(page) else {
            self.counters.misses += 1;
            return None;
        };
        self.counters.hits += 1;
        let slot = self.table[bucket] as usize;
        self.owners[slot].used = true;
        Some(&self.chunks[slot / CHUNK_PAGES][slot % CHUNK_PAGES])
    }

    /// Keeps a copy of the page's content, in place of an earlier one; drops another page when the store is full.
    pub fn put(&mut self, page: PageIndex, content: &Page) {
        if self.slots_max == 0 {
            return;
        }
        let slot = match self.bucket_of(page) {
            Some(bucket) => self.table[bucket] as usize,
            None => self.occupy(page),
        };
        self.chunks[slot / CHUNK_PAGES][slot % CHUNK_PAGES] = *content;
    }

    /// Forgets one page. Its memory is used again, not given back.
    pub fn remove(&mut self, page: PageIndex) {
        if let Some(bucket) = self.bucket_of(page) {
            let slot = self.table[bucket];
            self.unlink(bucket);
            self.owners[slot as usize].occupied = false;
            self.free.push(slot);
        }
    }

    /// Forgets all pages and gives the memory of the copies back. The counters stay.
    pub fn clear(&mut self) {
        self.table.fill(EMPTY);
        self.owners.clear();
        self.free.clear();
        self.chunks.clear();
        self.hand = 0;
    }

    /// Pages kept now.
    pub fn len(&self) -> usize {
        self.owners.len() - self.free.len()
    }

    /// Whether no page is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most pages that can be kept.
    pub fn capacity_pages(&self) -> usize {
        self.slots_max
    }

    /// Memory in use now, in bytes: the copies (also free ones that wait to be used again) and the bookkeeping.
    pub fn memory_bytes(&self) -> usize {
        let copies: usize = self.chunks.iter().map(|chunk| size_of_val(&chunk[..])).sum();
        copies
            + size_of_val(&self.table[..])
            + self.owners.capacity() * size_of::<Owner>()
            + self.free.capacity() * size_of::<u32>()
            + self.chunks.capacity() * size_of::<Box<[Page]>>()
    }

    /// What has happened so far.
    pub fn counters(&self) -> PreviousPagesCounters {
        self.counters
    }

    /// Finds a slot for a page that has none, and links it.
    fn occupy(&mut self, page: PageIndex) -> usize {
        let owner = Owner {
            page,
            used: false,
            occupied: true,
        };
        let slot = if let Some(slot) = self.free.pop() {
            slot as usize
        } else if self.owners.len() < self.slots_max {
            self.grow()
        } else {
            self.evict()
        };
        if slot == self.owners.len() {
            self.owners.push(owner);
        } else {
            self.owners[slot] = owner;
        }
        let mut bucket = self.home(page);
        while self.table[bucket] != EMPTY {
            bucket = self.after(bucket);
        }
        self.table[bucket] = u32::try_from(slot).expect("slots_max fits in 32 bits");
        slot
    }

    /// A slot that was never used; its chunk is allocated when it is the first of it.
    fn grow(&mut self) -> usize {
        let slot = self.owners.len();
        if slot.is_multiple_of(CHUNK_PAGES) {
            let pages = CHUNK_PAGES.min(self.slots_max - slot);
            self.chunks.push(vec![[0; PAGE_BYTES]; pages].into_boxed_slice());
        }
        slot
    }

    /// Takes the slot of a page that was not found since the hand passed it. Only called with no slot free.
    fn evict(&mut self) -> usize {
        loop {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.owners.len();
            let owner = &mut self.owners[slot];
            assert!(owner.occupied, "a full store has no free slot");
            if owner.used {
                owner.used = false;
                continue;
            }
            let bucket = self
                .bucket_of(self.owners[slot].page)
                .expect("an occupied slot is in the table");
            self.unlink(bucket);
            self.counters.evictions += 1;
            return slot;
        }
    }

    fn bucket_of(&self, page: PageIndex) -> Option<usize> {
        if self.table.is_empty() {
            return None;
        }
        let mut bucket = self.home(page);
        // The table is at most half full, so there is an end.
        while self.table[bucket] != EMPTY {
            if self.owners[self.table[bucket] as usize].page == page {
                return Some(bucket);
            }
            bucket = self.after(bucket);
        }
        None
    }

    /// Empties a bucket and moves back what probed past it, so that no gap hides an entry.
    fn unlink(&mut self, bucket: usize) {
        let mut hole = bucket;
        let mut probe = self.after(hole);
        while self.table[probe] != EMPTY {
            let home = self.home(self.owners[self.table[probe] as usize].page);
            let mask = self.table.len() - 1;
            let from_home = probe.wrapping_sub(home) & mask;
            let from_hole = probe.wrapping_sub(hole) & mask;
            if from_home >= from_hole {
                self.table[hole] = self.table[probe];
                hole = probe;
            }
            probe = self.after(probe);
        }
        self.table[hole] = EMPTY;
    }

    /// The bucket in which the search for a page begins. The finaliser of splitmix64 spreads neighbours and strides;
    /// a guest that picks its pages to collide is bounded by the number of pages that it has.
    fn home(&self, page: PageIndex) -> usize {
        let mut hash = page.0;
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^= hash >> 31;
        let mask = self.table.len() as u64 - 1;
        usize::try_from(hash & mask).expect("the mask is below the length of the table")
    }

    fn after(&self, bucket: usize) -> usize {
        (bucket + 1) & (self.table.len() - 1)
    }
}
