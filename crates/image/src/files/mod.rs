//! The few file operations that an image needs, behind a trait, so that the same code runs on a host's
//! tmpfs, in the simulator's memory, and with a crash at any chosen step.
//!
//! ```text
//!   Image<F> ──► Files ──┬── HostFiles      files of the host, on a Shelf
//!                        ├── MemFiles       the simulator's disk, with power loss
//!                        ├── Crashing<F>    any of them, dying at a chosen step
//!                        └── Spilling<M, S> one of them, whose staging goes on in another one (on a host: Places)
//! ```

mod crash;
mod folder;
mod host;
mod kept;
mod mem;
mod places;
mod shelf;
mod spill;

use std::fmt;
use std::io;
use std::ops::Range;
use std::str::FromStr;

use romulus_types::BlockId;

pub use crash::{Crashing, Fuse};
pub use folder::FolderShelf;
pub use host::HostFiles;
pub use kept::{Keeper, KeptShelf};
pub use mem::MemFiles;
pub use places::{LateFiles, PlacedFiles, Places};
pub use shelf::{Claim, Shelf};
pub use spill::{Spilling, StagingShare};

/// One of the two staging areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// `staging-A`.
    A,
    /// `staging-B`.
    B,
}

impl Area {
    /// The other area.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// One file of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileName {
    /// Which VM this is and how its memory is laid out. Written last when an image is created.
    Layout,
    /// The two commit slots.
    Commit,
    /// The memory of one RAM block.
    Ram(BlockId),
    /// A staging area.
    Staging(Area),
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout => f.write_str("layout"),
            Self::Commit => f.write_str("commit"),
            Self::Ram(block) => write!(f, "ram-{}", block.0),
            Self::Staging(Area::A) => f.write_str("staging-A"),
            Self::Staging(Area::B) => f.write_str("staging-B"),
        }
    }
}

/// No file of an image has this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoSuchFile;

impl FromStr for FileName {
    type Err = NoSuchFile;

    fn from_str(name: &str) -> Result<Self, NoSuchFile> {
        let parsed = match name {
            "layout" => Self::Layout,
            "commit" => Self::Commit,
            "staging-A" => Self::Staging(Area::A),
            "staging-B" => Self::Staging(Area::B),
            _ => {
                let number = name.strip_prefix("ram-").and_then(|number| number.parse().ok());
                Self::Ram(BlockId(number.ok_or(NoSuchFile)?))
            }
        };
        // A number has one way to be written, and so has a name.
        if parsed.to_string() == name {
            Ok(parsed)
        } else {
            Err(NoSuchFile)
        }
    }
}

/// The files of one image.
///
/// Every method may fail; a failed write may have written any part of its bytes. A write that returned
/// survives the death of this process; one that was followed by [`sync`](Self::sync) survives whatever the
/// medium survives.
pub trait Files {
    /// Opens a file that exists and returns its length in bytes; `None` when there is no such file.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>>;

    /// Creates a file of `bytes` zeros without using memory for them, replacing one of the same name.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()>;

    /// Fills `into` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file is shorter, `NotFound` when it is not open.
    fn read_at(&self, name: FileName, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`, growing the file as needed.
    ///
    /// # Errors
    /// Whatever the file system reports; `NotFound` when the file is not open.
    fn write_at(&mut self, name: FileName, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes a range, in whole pages and inside the file, read as zeros and gives its memory back.
    ///
    /// # Errors
    /// Whatever the file system reports; `NotFound` when the file is not open.
    fn punch(&mut self, name: FileName, range: Range<u64>) -> io::Result<()>;

    /// Cuts a file off after `bytes` bytes; shorter files stay as they are.
    ///
    /// # Errors
    /// Whatever the file system reports; `NotFound` when the file is not open.
    fn cut(&mut self, name: FileName, bytes: u64) -> io::Result<()>;

    /// The file's contents are not needed any more; `bytes_kept` of it may stay for speed.
    ///
    /// # Errors
    /// As for [`cut`](Self::cut).
    fn reuse(&mut self, name: FileName, bytes_kept: u64) -> io::Result<()> {
        self.cut(name, bytes_kept)
    }

    /// Waits until everything written to the file is as durable as the medium allows.
    ///
    /// # Errors
    /// Whatever the file system reports; `NotFound` when the file is not open.
    fn sync(&mut self, name: FileName) -> io::Result<()>;

    /// The first range at or after `from` that may hold something else than zeros, in bytes.
    ///
    /// # Errors
    /// Whatever the file system reports; `NotFound` when the file is not open.
    fn next_data(&self, name: FileName, from: u64) -> io::Result<Option<Range<u64>>>;

    /// Memory or disk space that the file occupies, in bytes.
    ///
    /// # Errors
    /// Whatever the file system reports; `NotFound` when the file is not open.
    fn touched_bytes(&self, name: FileName) -> io::Result<u64>;

    /// Removes all files of this image.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn remove_all(&mut self) -> io::Result<()>;
}

fn not_open(name: FileName) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{name} is not open"))
}
