//! A disk that can be full.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use romulus_image::{FileName, Files, MemFiles};

/// A disk for the files of several images. Clones are the same disk.
#[derive(Clone, Debug)]
pub(crate) struct SmallDisk {
    bytes_max: Arc<AtomicU64>,
    folders: Arc<Mutex<Vec<BTreeMap<FileName, u64>>>>,
}

impl SmallDisk {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max: Arc::new(bytes_max.into()),
            folders: Arc::default(),
        }
    }

    pub(crate) fn resize(&self, bytes_max: u64) {
        self.bytes_max.store(bytes_max, Ordering::SeqCst);
    }

    fn room_bytes(&self) -> u64 {
        self.bytes_max.load(Ordering::SeqCst) - self.used_bytes()
    }

    /// A place for one image.
    pub(crate) fn folder(&self) -> SmallFiles {
        let mut folders = self.folders.lock().unwrap();
        folders.push(BTreeMap::new());
        SmallFiles {
            disk: self.clone(),
            number: folders.len() - 1,
            files: MemFiles::new(),
        }
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.folders
            .lock()
            .unwrap()
            .iter()
            .flat_map(BTreeMap::values)
            .sum()
    }
}

/// The files of one image on it. Clones are the same files.
#[derive(Clone, Debug)]
pub(crate) struct SmallFiles {
    disk: SmallDisk,
    number: usize,
    files: MemFiles,
}

impl SmallFiles {
    /// Notes where a file's last byte lies; a hole before the first takes no room here either.
    fn note(&self, name: FileName, change: impl FnOnce(u64) -> u64) {
        let mut folders = self.disk.folders.lock().unwrap();
        let bytes = folders[self.number].entry(name).or_default();
        *bytes = change(*bytes);
    }
}

fn full() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "no room (a test)")
}

impl Files for SmallFiles {
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>> {
        self.files.open(name)
    }

    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.note(name, |_| 0);
        self.files.create(name, bytes)
    }

    fn read_at(&self, name: FileName, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.files.read_at(name, offset, into)
    }

    fn write_at(&mut self, name: FileName, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let room = usize::try_from(self.disk.room_bytes()).unwrap_or(usize::MAX);
        let fits = room.min(bytes.len());
        // As a real one: what fits is written.
        self.files.write_at(name, offset, &bytes[..fits])?;
        self.note(name, |used| used + fits as u64);
        if fits < bytes.len() { Err(full()) } else { Ok(()) }
    }

    fn punch(&mut self, name: FileName, range: Range<u64>) -> io::Result<()> {
        self.files.punch(name, range)
    }

    fn cut(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.note(name, |used| used.min(bytes));
        self.files.cut(name, bytes)
    }

    fn sync(&mut self, name: FileName) -> io::Result<()> {
        if self.disk.room_bytes() == 0 {
            return Err(full());
        }
        self.files.sync(name)
    }

    fn next_data(&self, name: FileName, from: u64) -> io::Result<Option<Range<u64>>> {
        self.files.next_data(name, from)
    }

    fn touched_bytes(&self, name: FileName) -> io::Result<u64> {
        self.files.touched_bytes(name)
    }

    fn remove_all(&mut self) -> io::Result<()> {
        self.disk.folders.lock().unwrap()[self.number].clear();
        self.files.remove_all()
    }
}
