//! A small record that must survive, replaced with one write to the disk: a takeover waits for it.
//!
//! ```text
//!   0       {"sequence":6,"crc32":…,"record":"{…}"} and blanks
//!   4096    {"sequence":7,"crc32":…,"record":"{…}"} and blanks    written in turn; the newer whole one holds
//! ```
//!
//! A record that was torn by a crash was not durable yet, so nothing followed from it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::marker::PhantomData;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Bytes of one place: no other place shares a block of the disk with it.
const PLACE_BYTES: usize = 4096;
const PLACES: usize = 2;

/// Why a record can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system's error.
    #[error("cannot keep {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file holds something, and no whole record.
    #[error("{} is damaged: restore or remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The record has no place in the file.
    #[error("a record of {bytes} bytes is too long for {}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length with what stands around it.
        bytes: usize,
    },
}

/// The file of one record.
#[derive(Debug)]
pub struct RecordFile<T> {
    path: PathBuf,
    file: File,
    /// Of the record that holds; 0 is none.
    sequence: u64,
    record: PhantomData<T>,
}

#[derive(Serialize, Deserialize)]
struct Place {
    sequence: u64,
    crc32: u32,
    /// JSON by itself: a [`serde_json::Value`] has no 128-bit numbers.
    record: String,
}

impl Place {
    fn checksum(sequence: u64, record: &str) -> u32 {
        crc32fast::hash(format!("{sequence} {record}").as_bytes())
    }

    /// What a place holds, if that is whole.
    fn read(bytes: &[u8]) -> Option<Self> {
        let place: Self = serde_json::from_slice(bytes).ok()?;
        (place.sequence > 0 && place.crc32 == Self::checksum(place.sequence, &place.record)).then_some(place)
    }
}

impl<T: Serialize + DeserializeOwned> RecordFile<T> {
    /// Opens the file, which is made when it is not there, and reads its record.
    ///
    /// # Errors
    /// [`RecordError`]; a file that was made and never written has no record.
    pub fn open(path: &Path) -> Result<(Self, Option<T>), RecordError> {
        let file = open_or_make(path).map_err(failed(path))?;
        let (sequence, record) = newest(&file, path)?;
        let this = Self {
            path: path.to_owned(),
            file,
            sequence,
            record: PhantomData,
        };
        Ok((this, record))
    }

    /// Reads the record of a file that belongs to somebody else. No file is no record.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn read(path: &Path) -> Result<Option<T>, RecordError> {
        match File::open(path) {
            Ok(file) => Ok(newest(&file, path)?.1),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(path)(error)),
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the record; it is durable when this returns.
    ///
    /// # Errors
    /// [`RecordError`]: then either record may be read later.
    pub fn write(&mut self, record: &T) -> Result<(), RecordError> {
        let sequence = self.sequence + 1;
        let record = serde_json::to_string(record).map_err(|error| failed(&self.path)(error.into()))?;
        let place = Place {
            sequence,
            crc32: Place::checksum(sequence, &record),
            record,
        };
        let mut bytes = serde_json::to_vec(&place).map_err(|error| failed(&self.path)(error.into()))?;
        if bytes.len() > PLACE_BYTES {
            return Err(RecordError::TooLong {
                path: self.path.clone(),
                bytes: bytes.len(),
            });
        }
        bytes.resize(PLACE_BYTES, b' ');
        let at = (sequence - 1) % PLACES as u64 * PLACE_BYTES as u64;
        self.file
            .write_all_at(&bytes, at)
            .and_then(|()| self.file.sync_data())
            .map_err(failed(&self.path))?;
        self.sequence = sequence;
        Ok(())
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> RecordError + '_ {
    move |source| RecordError::File {
        path: path.to_owned(),
        source,
    }
}

/// The record that holds, with its sequence; 0 and none in a file that was only made.
fn newest<T: DeserializeOwned>(file: &File, path: &Path) -> Result<(u64, Option<T>), RecordError> {
    let mut bytes = Vec::new();
    file.take((PLACES * PLACE_BYTES) as u64)
        .read_to_end(&mut bytes)
        .map_err(failed(path))?;
    let newest = bytes
        .chunks(PLACE_BYTES)
        .filter_map(Place::read)
        .max_by_key(|place| place.sequence);
    let damaged = || RecordError::Damaged {
        path: path.to_owned(),
    };
    match newest {
        Some(place) => {
            let record = serde_json::from_str(&place.record).map_err(|_| damaged())?;
            Ok((place.sequence, Some(record)))
        }
        // Only the very first record can be torn with nothing before it.
        None if bytes.iter().skip(PLACE_BYTES).all(|byte| *byte == b' ') && !is_foreign(&bytes) => {
            Ok((0, None))
        }
        None => Err(damaged()),
    }
}

/// Bytes that a torn first record can't be: no beginning of one.
fn is_foreign(bytes: &[u8]) -> bool {
    const BEGINNING: &[u8] = b"{\"sequence\":1,";
    let place = bytes.get(..PLACE_BYTES).unwrap_or(bytes);
    let blank = place.iter().all(|byte| matches!(byte, b' ' | 0));
    !blank && !place.starts_with(BEGINNING)
}

fn open_or_make(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened,
    }
    // Made whole beside it, so that its blocks are there before it has its name.
    romulus_host_sys::durable::replace(path, &[b' '; PLACE_BYTES * PLACES])?;
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<(RecordFile<String>, Option<String>), RecordError> {
        RecordFile::open(path)
    }

    #[test]
    fn the_newest_record_holds_whichever_place_it_is_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        assert_eq!(open(&path).unwrap().1, None);
        for turn in 0..5 {
            let (mut file, before) = open(&path).unwrap();
            assert_eq!(before, (turn > 0).then(|| (turn - 1).to_string()));
            file.write(&turn.to_string()).unwrap();
        }
        let (mut file, last) = open(&path).unwrap();
        assert_eq!(last.as_deref(), Some("4"));
        file.write(&"5".to_owned()).unwrap();
        file.write(&"6".to_owned()).unwrap();
        assert_eq!(open(&path).unwrap().1.as_deref(), Some("6"));
    }

    #[test]
    fn a_record_with_the_largest_numbers_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        let record = (u128::MAX, u64::MAX);
        RecordFile::open(&path).unwrap().0.write(&record).unwrap();
        assert_eq!(RecordFile::<(u128, u64)>::read(&path).unwrap(), Some(record));
    }

    #[test]
    fn a_torn_record_leaves_the_one_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        let (mut file, _) = open(&path).unwrap();
        file.write(&"one".to_owned()).unwrap();
        file.write(&"two".to_owned()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..60 {
            let mut torn = whole.clone();
            torn[PLACE_BYTES + cut] = b'#';
            std::fs::write(&path, &torn).unwrap();
            let record = open(&path).unwrap().1;
            assert!(
                matches!(record.as_deref(), Some("one" | "two")),
                "byte {cut}: {record:?}"
            );
        }
    }

    #[test]
    fn a_first_record_that_was_torn_is_none_and_anything_else_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        let (mut file, _) = open(&path).unwrap();
        file.write(&"one".to_owned()).unwrap();
        let mut torn = std::fs::read(&path).unwrap();
        torn[30..PLACE_BYTES].fill(b' ');
        std::fs::write(&path, &torn).unwrap();
        assert_eq!(open(&path).unwrap().1, None);
        for foreign in [&b"{\"term\":3}"[..], &[0xff; 9000]] {
            std::fs::write(&path, foreign).unwrap();
            assert!(matches!(open(&path), Err(RecordError::Damaged { .. })));
        }
        file.write(&"two".to_owned()).unwrap();
        file.write(&"three".to_owned()).unwrap();
        let mut both = std::fs::read(&path).unwrap();
        both[20] ^= 1;
        both[PLACE_BYTES + 20] ^= 1;
        std::fs::write(&path, &both).unwrap();
        assert!(matches!(open(&path), Err(RecordError::Damaged { .. })));
    }

    #[test]
    fn a_record_that_has_no_room_is_refused_and_the_last_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        let (mut file, _) = open(&path).unwrap();
        file.write(&"one".to_owned()).unwrap();
        assert!(matches!(
            file.write(&"x".repeat(5000)),
            Err(RecordError::TooLong { .. })
        ));
        assert_eq!(open(&path).unwrap().1.as_deref(), Some("one"));
    }
}
