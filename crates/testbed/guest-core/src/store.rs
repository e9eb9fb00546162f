//! Keys and values in one piece of memory of fixed size.
//!
//! ```text
//!   arena: buckets (u32 each) | blocks of 32 << class bytes, one an entry
//!   block: next u32 | class u32 | key bytes u32 | value bytes u32 | key | value
//! ```
//! `next` and buckets hold the number of a block's first 32-byte unit, or `NONE`. A freed block goes to its class's
//! list and may be split for smaller ones; it grows together again only when everything is removed. So a store whose
//! values change size wildly may be full while it holds half of what it could: it then says so.

use core::fmt;

const UNIT_BYTES: usize = 32;
const HEAD_BYTES: usize = 16;
const NONE: u32 = u32::MAX;
/// Block sizes from 32 bytes to 128 KiB.
const CLASSES: usize = 13;
/// Memory for which one bucket is made, in bytes.
const BYTES_A_BUCKET: usize = 256;
/// Least arena, in bytes.
pub const ARENA_BYTES_MIN: usize = 4096;
/// Longest key and value together, in bytes.
pub const ENTRY_BYTES_MAX: usize = (UNIT_BYTES << (CLASSES - 1)) - HEAD_BYTES;

/// There is no memory for the entry; what was there before is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no memory is left for keys")
    }
}

/// The key-value store.
#[derive(Debug)]
pub struct Store<'a> {
    arena: &'a mut [u8],
    buckets: usize,
    /// First unit that no block has ever had.
    fresh: u32,
    end: u32,
    free: [u32; CLASSES],
    entries: usize,
}

impl<'a> Store<'a> {
    /// An empty store in `arena`, of which only what is needed is written.
    ///
    /// # Panics
    /// When the arena is smaller than [`ARENA_BYTES_MIN`].
    pub fn new(arena: &'a mut [u8]) -> Self {
        assert!(arena.len() >= ARENA_BYTES_MIN, "the arena holds no entry");
        let buckets = (arena.len() / BYTES_A_BUCKET).next_power_of_two() / 2;
        let end = u32::try_from(arena.len() / UNIT_BYTES).unwrap_or(NONE - 1);
        let mut store = Store {
            arena,
            buckets,
            fresh: 0,
            end,
            free: [NONE; CLASSES],
            entries: 0,
        };
        store.clear();
        store
    }

    /// Number of entries.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.arena[..self.buckets * 4].fill(0xff);
        let first = (self.buckets * 4).div_ceil(UNIT_BYTES);
        self.fresh = u32::try_from(first).unwrap_or(NONE - 1);
        self.free = [NONE; CLASSES];
        self.entries = 0;
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        let block = self.find(key)?.block;
        Some(&self.arena[self.value_range(block)])
    }

    /// Sets `key` to `value`.
    ///
    /// # Errors
    /// [`Full`] when there is no memory for it.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), Full> {
        self.set_parts(key, &[value])
    }

    /// Adds `tail` to the end of the value of `key`, and gives the value's new length in bytes.
    ///
    /// # Errors
    /// [`Full`] when there is no memory for it.
    pub fn append(&mut self, key: &[u8], tail: &[u8]) -> Result<usize, Full> {
        let Some(found) = self.find(key) else {
            self.set(key, tail)?;
            return Ok(tail.len());
        };
        let value = self.value_range(found.block);
        let length = value.len() + tail.len();
        if self.class(found.block) == class_for(key.len() + length).ok_or(Full)? {
            self.arena[value.end..value.end + tail.len()].copy_from_slice(tail);
            self.put(found.block, 3, length);
            return Ok(length);
        }
        let block = self.allocate(key.len() + length)?;
        self.write_entry(block, key, &[]);
        let to = self.value_range(block).start;
        self.arena.copy_within(value.clone(), to);
        self.arena[to + value.len()..to + length].copy_from_slice(tail);
        self.put(block, 3, length);
        self.unlink(&found);
        self.link(block, found.bucket);
        Ok(length)
    }

    /// Removes `key`; says whether it was there.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        let found = self.find(key);
        if let Some(found) = &found {
            self.unlink(found);
        }
        found.is_some()
    }

    fn set_parts(&mut self, key: &[u8], value: &[&[u8]]) -> Result<(), Full> {
        let length = key.len() + value.iter().map(|part| part.len()).sum::<usize>();
        let found = self.find(key);
        if let Some(found) = &found
            && Some(self.class(found.block)) == class_for(length)
        {
            self.write_entry(found.block, key, value);
            return Ok(());
        }
        let block = self.allocate(length)?;
        self.write_entry(block, key, value);
        if let Some(found) = &found {
            self.unlink(found);
        }
        self.link(block, self.bucket_of(key));
        Ok(())
    }

    fn find(&self, key: &[u8]) -> Option<Found> {
        let bucket = self.bucket_of(key);
        let (mut before, mut block) = (None, self.word(bucket * 4));
        while block != NONE {
            let start = offset(block) + HEAD_BYTES;
            let length = self.field(block, 2) as usize;
            if &self.arena[start..start + length] == key {
                return Some(Found {
                    bucket,
                    before,
                    block,
                });
            }
            before = Some(block);
            block = self.field(block, 0);
        }
        None
    }

    fn bucket_of(&self, key: &[u8]) -> usize {
        // FNV-1a, spread once more, as only its low bits are used.
        let hash = key.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let hash = usize::try_from(crate::random::mix(hash) >> 32).unwrap_or(0);
        hash & (self.buckets - 1)
    }

    fn write_entry(&mut self, block: u32, key: &[u8], value: &[&[u8]]) {
        let mut at = offset(block) + HEAD_BYTES;
        let start = at + key.len();
        for part in core::iter::once(&key).chain(value) {
            self.arena[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        self.put(block, 2, key.len());
        self.put(block, 3, at - start);
    }

    fn link(&mut self, block: u32, bucket: usize) {
        let next = self.word(bucket * 4);
        self.put_word(offset(block), next);
        self.put_word(bucket * 4, block);
        self.entries += 1;
    }

    fn unlink(&mut self, found: &Found) {
        // The list may have changed since the entry was found only by what was put before it: nothing is.
        let next = self.field(found.block, 0);
        match found.before {
            Some(before) => self.put_word(offset(before), next),
            None => self.put_word(found.bucket * 4, next),
        }
        self.release(found.block, self.class(found.block));
        self.entries -= 1;
    }

    fn release(&mut self, block: u32, class: usize) {
        self.put_word(offset(block), self.free[class]);
        self.put(block, 1, class);
        self.free[class] = block;
    }

    fn allocate(&mut self, entry_bytes: usize) -> Result<u32, Full> {
        let class = class_for(entry_bytes).ok_or(Full)?;
        let block = self
            .take_free(class)
            .or_else(|| self.take_fresh(class))
            .or_else(|| self.split(class));
        let block = block.ok_or(Full)?;
        self.put(block, 1, class);
        Ok(block)
    }

    fn take_fresh(&mut self, class: usize) -> Option<u32> {
        let end = self
            .fresh
            .checked_add(1 << class)
            .filter(|&end| end <= self.end)?;
        Some(core::mem::replace(&mut self.fresh, end))
    }

    fn take_free(&mut self, class: usize) -> Option<u32> {
        let block = self.free[class];
        if block == NONE {
            return None;
        }
        self.free[class] = self.field(block, 0);
        Some(block)
    }

    /// Takes a block of a larger class, and gives back what is too much of it.
    fn split(&mut self, class: usize) -> Option<u32> {
        let larger = (class + 1..CLASSES).find(|&larger| self.free[larger] != NONE)?;
        let block = self.take_free(larger)?;
        for half in class..larger {
            self.release(block + (1 << half), half);
        }
        Some(block)
    }

    fn class(&self, block: u32) -> usize {
        self.field(block, 1) as usize
    }

    fn value_range(&self, block: u32) -> core::ops::Range<usize> {
        let start = offset(block) + HEAD_BYTES + self.field(block, 2) as usize;
        start..start + self.field(block, 3) as usize
    }

    fn field(&self, block: u32, index: usize) -> u32 {
        self.word(offset(block) + index * 4)
    }

    fn put(&mut self, block: u32, index: usize, value: usize) {
        let value = u32::try_from(value).expect("a block is far smaller than 4 GiB");
        self.put_word(offset(block) + index * 4, value);
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.arena[at..]
            .first_chunk()
            .expect("a word lies inside the arena");
        u32::from_le_bytes(*bytes)
    }

    fn put_word(&mut self, at: usize, value: u32) {
        self.arena[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

struct Found {
    bucket: usize,
    before: Option<u32>,
    block: u32,
}

fn offset(block: u32) -> usize {
    block as usize * UNIT_BYTES
}

/// The class whose blocks hold an entry of so many bytes, if there is one.
fn class_for(entry_bytes: usize) -> Option<usize> {
    let units = (HEAD_BYTES + entry_bytes).div_ceil(UNIT_BYTES);
    let class = units.next_power_of_two().trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[derive(Debug, Clone)]
    enum Step {
        Set(u8, Vec<u8>),
        Append(u8, Vec<u8>),
        Remove(u8),
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let value = || proptest::collection::vec(any::<u8>(), 0..200);
        let key = || 0..24_u8;
        let step = prop_oneof![
            8 => (key(), value()).prop_map(|(key, value)| Step::Set(key, value)),
            4 => (key(), value()).prop_map(|(key, value)| Step::Append(key, value)),
            4 => key().prop_map(Step::Remove),
            1 => Just(Step::Clear),
        ];
        proptest::collection::vec(step, 0..300)
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_when_full_it_leaves_what_was_there(steps in steps(), kib in 4..16_usize) {
            let mut arena = vec![0xaa; kib << 10];
            let mut store = Store::new(&mut arena);
            let mut model: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
            for step in steps {
                match step {
                    Step::Set(key, value) => {
                        let key = vec![key; usize::from(key % 5)];
                        if store.set(&key, &value).is_ok() {
                            model.insert(key, value);
                        }
                    }
                    Step::Append(key, tail) => {
                        let key = vec![key; usize::from(key % 5)];
                        if let Ok(length) = store.append(&key, &tail) {
                            let value = model.entry(key).or_default();
                            value.extend(tail);
                            prop_assert_eq!(length, value.len());
                        }
                    }
                    Step::Remove(key) => {
                        let key = vec![key; usize::from(key % 5)];
                        prop_assert_eq!(store.remove(&key), model.remove(&key).is_some());
                    }
                    Step::Clear => {
                        store.clear();
                        model.clear();
                    }
                }
                prop_assert_eq!(store.entries(), model.len());
                for (key, value) in &model {
                    prop_assert_eq!(store.get(key), Some(value.as_slice()));
                }
            }
        }
    }

    #[test]
    fn it_fills_up_says_so_and_has_room_again_after_a_removal() {
        let mut arena = [0; ARENA_BYTES_MIN];
        let mut store = Store::new(&mut arena);
        let fitted = (0..1000_u32)
            .take_while(|key| store.set(&key.to_le_bytes(), &[7; 100]).is_ok())
            .count();
        assert!(fitted > 20, "{fitted}");
        assert_eq!(store.set(b"more", &[7; 100]), Err(Full));
        assert!(store.remove(&3_u32.to_le_bytes()));
        assert_eq!(store.set(b"more", &[7; 100]), Ok(()));
        assert_eq!(store.get(&4_u32.to_le_bytes()), Some([7; 100].as_slice()));
    }

    #[test]
    fn an_entry_beyond_the_largest_block_is_refused() {
        let mut arena = vec![0; 1 << 20];
        let mut store = Store::new(&mut arena);
        assert_eq!(store.set(b"", &vec![1; ENTRY_BYTES_MAX]), Ok(()));
        assert_eq!(store.set(b"", &vec![1; ENTRY_BYTES_MAX + 1]), Err(Full));
        assert_eq!(store.append(b"", b"x"), Err(Full));
    }
}
