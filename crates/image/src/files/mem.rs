//! Files in memory: the simulator's disk.
//!
//! Handles are clones that share one store, so the store outlives an image that crashes. With
//! [`MemFiles::with_power_loss`] the store also remembers what was synced, and
//! [`MemFiles::lose_power`] keeps an arbitrary part of the rest.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use romulus_types::PAGE_BYTES;

use super::{FileName, Files, not_open};

const PAGE: u64 = PAGE_BYTES as u64;

/// Pages that were never written are not there and read as zeros.
#[derive(Clone, Debug, Default)]
struct MemFile {
    bytes: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    Punch(Range<u64>),
    Cut(u64),
}

#[derive(Clone, Debug, Default)]
struct Store {
    files: BTreeMap<FileName, MemFile>,
    /// What a loss of power leaves for certain; only kept when changes are tracked.
    durable: BTreeMap<FileName, MemFile>,
    unsynced: Vec<(FileName, Change)>,
    tracks_power: bool,
}

/// Files in memory. Clones are handles on the same files.
#[derive(Clone, Debug, Default)]
pub struct MemFiles(Arc<Mutex<Store>>);

impl MemFiles {
    /// No files yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No files yet; remembers what was synced, so that [`lose_power`](Self::lose_power) can be used. Every
    /// unsynced write is held twice.
    pub fn with_power_loss() -> Self {
        let files = Self::default();
        files.store().tracks_power = true;
        files
    }

    /// An independent copy of the files as they are now.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.store().clone())))
    }

    /// Loses power: of the changes that were not synced, in their order, those survive for which `keep`
    /// says so. Creating and removing files is taken as synced.
    ///
    /// # Panics
    /// When the files were not made by [`with_power_loss`](Self::with_power_loss).
    pub fn lose_power(&self, mut keep: impl FnMut() -> bool) {
        let mut store = self.store();
        assert!(store.tracks_power, "these files do not know what was synced");
        for (name, change) in std::mem::take(&mut store.unsynced) {
            if keep()
                && let Some(file) = store.durable.get_mut(&name)
            {
                file.apply(&change);
            }
        }
        store.files = store.durable.clone();
    }

    /// Flips one bit of a file, as bad memory would. Does nothing past the end of the file.
    pub fn flip_bit(&self, name: FileName, offset: u64, bit: u8) {
        let mut store = self.store();
        if let Some(file) = store.files.get_mut(&name)
            && offset < file.bytes
        {
            let mut byte = [0];
            file.read(offset, &mut byte);
            file.write(offset, &[byte[0] ^ (1 << (bit % 8))]);
        }
    }

    /// The bytes of a file, or `None` when it does not exist.
    ///
    /// # Panics
    /// When the file is larger than this machine's address space.
    pub fn contents(&self, name: FileName) -> Option<Vec<u8>> {
        let store = self.store();
        let file = store.files.get(&name)?;
        let mut bytes = vec![0; usize::try_from(file.bytes).expect("a file that fits in memory")];
        file.read(0, &mut bytes);
        Some(bytes)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, name: FileName, change: Change) -> io::Result<()> {
        let mut store = self.store();
        store
            .files
            .get_mut(&name)
            .ok_or_else(|| not_open(name))?
            .apply(&change);
        if store.tracks_power {
            store.unsynced.push((name, change));
        }
        Ok(())
    }
}

impl MemFile {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { offset, bytes } => self.write(*offset, bytes),
            Change::Punch(range) => self.punch(range),
            Change::Cut(bytes) => self.cut(*bytes),
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        for (page, at, part) in pieces(offset, into.len()) {
            match self.pages.get(&page) {
                Some(bytes) => into[part.clone()].copy_from_slice(&bytes[at..at + part.len()]),
                None => into[part].fill(0),
            }
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, at, part) in pieces(offset, bytes.len()) {
            let target = self
                .pages
                .entry(page)
                .or_insert_with(|| Box::new([0; PAGE_BYTES]));
            target[at..at + part.len()].copy_from_slice(&bytes[part]);
        }
        self.bytes = self.bytes.max(offset + bytes.len() as u64);
    }

    fn punch(&mut self, range: &Range<u64>) {
        let pages: Vec<u64> = self
            .pages
            .range(range.start / PAGE..range.end.div_ceil(PAGE))
            .map(|(page, _)| *page)
            .collect();
        for page in pages {
            self.pages.remove(&page);
        }
    }

    fn cut(&mut self, bytes: u64) {
        if bytes >= self.bytes {
            return;
        }
        self.pages.split_off(&bytes.div_ceil(PAGE));
        let rest = usize::try_from(bytes % PAGE).expect("less than a page");
        if rest > 0
            && let Some(page) = self.pages.get_mut(&(bytes / PAGE))
        {
            page[rest..].fill(0);
        }
        self.bytes = bytes;
    }
}

/// Cuts a range of a file into (page, offset in the page, range of the caller's bytes).
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let position = offset + done as u64;
        let at = usize::try_from(position % PAGE).expect("less than a page");
        let part = (PAGE_BYTES - at).min(length - done);
        let piece = (position / PAGE, at, done..done + part);
        done += part;
        Some(piece)
    })
}

impl Files for MemFiles {
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>> {
        Ok(self.store().files.get(&name).map(|file| file.bytes))
    }

    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        let file = MemFile {
            bytes,
            pages: BTreeMap::new(),
        };
        let mut store = self.store();
        if store.tracks_power {
            store.unsynced.retain(|(changed, _)| *changed != name);
            store.durable.insert(name, file.clone());
        }
        store.files.insert(name, file);
        Ok(())
    }

    fn read_at(&self, name: FileName, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let store = self.store();
        let file = store.files.get(&name).ok_or_else(|| not_open(name))?;
        if offset
            .checked_add(into.len() as u64)
            .is_none_or(|end| end > file.bytes)
        {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.read(offset, into);
        Ok(())
    }

    fn write_at(&mut self, name: FileName, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut store = self.store();
        if store.tracks_power {
            drop(store);
            return self.change(
                name,
                Change::Write {
                    offset,
                    bytes: bytes.to_vec(),
                },
            );
        }
        store
            .files
            .get_mut(&name)
            .ok_or_else(|| not_open(name))?
            .write(offset, bytes);
        Ok(())
    }

    fn punch(&mut self, name: FileName, range: Range<u64>) -> io::Result<()> {
        self.change(name, Change::Punch(range))
    }

    fn cut(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.change(name, Change::Cut(bytes))
    }

    fn sync(&mut self, name: FileName) -> io::Result<()> {
        let mut store = self.store();
        let store = &mut *store;
        if !store.files.contains_key(&name) {
            return Err(not_open(name));
        }
        if let Some(file) = store.durable.get_mut(&name) {
            store.unsynced.retain(|(changed, change)| {
                if *changed == name {
                    file.apply(change);
                }
                *changed != name
            });
        }
        Ok(())
    }

    fn next_data(&self, name: FileName, from: u64) -> io::Result<Option<Range<u64>>> {
        let store = self.store();
        let file = store.files.get(&name).ok_or_else(|| not_open(name))?;
        let Some((first, _)) = file.pages.range(from / PAGE..).next() else {
            return Ok(None);
        };
        let mut end = *first + 1;
        while file.pages.contains_key(&end) {
            end += 1;
        }
        let range = (first * PAGE).max(from)..(end * PAGE).min(file.bytes);
        Ok((!range.is_empty()).then_some(range))
    }

    fn touched_bytes(&self, name: FileName) -> io::Result<u64> {
        let store = self.store();
        let file = store.files.get(&name).ok_or_else(|| not_open(name))?;
        Ok(file.pages.len() as u64 * PAGE)
    }

    fn remove_all(&mut self) -> io::Result<()> {
        let mut store = self.store();
        store.files.clear();
        store.durable.clear();
        store.unsynced.clear();
        Ok(())
    }
}
