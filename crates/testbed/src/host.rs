//! What a machine uses of its host: taps, files for disks, and where its console goes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use romulus_host_sys::tap::Tap;

use crate::config::MachineConfig;
use crate::error::BuildError;

/// Longest piece of the console that is kept back for the end of its line.
const LINE_BYTES_MAX: usize = 256;

/// A disk: its file and how it is called in messages.
#[derive(Debug)]
pub struct DiskFile {
    /// Where the disk's bytes are.
    pub file: File,
    /// Size of the disk in bytes.
    pub bytes: u64,
    /// The file's path; none for a disk in memory.
    pub path: Option<PathBuf>,
}

/// Opens a tap, or makes one that goes away with this process. Its state and its bridge are somebody else's.
///
/// # Errors
/// [`BuildError::Tap`], which says what to do.
pub fn open_tap(name: &str) -> Result<OwnedFd, BuildError> {
    let tap = Tap::create_or_attach_without_offloads(name).and_then(|tap| tap.try_clone_fd());
    tap.map_err(|source| {
        let hint = match source.raw_os_error() {
            Some(libc::EPERM) => "this user may not make or use it: run as root, or make it for the user with `ip tuntap add NAME mode tap user USER vnet_hdr`",
            Some(libc::EBUSY) => "another process holds it: end that process, or name another tap",
            Some(libc::ENOENT) => "there is no /dev/net/tun: load the kernel's module tun",
            Some(libc::EINVAL) => "it is no tap of one queue: name another one",
            _ => "it can't be opened",
        };
        BuildError::Tap { name: name.to_owned(), hint, source }
    })
}

/// Opens the file of a disk for reading and writing.
///
/// # Errors
/// [`BuildError::File`].
pub fn open_disk(path: &Path) -> Result<DiskFile, BuildError> {
    let wrong = |source| BuildError::File {
        what: "the disk's file",
        path: path.to_owned(),
        source,
    };
    let file = File::options().read(true).write(true).open(path).map_err(wrong)?;
    let bytes = file.metadata().map_err(wrong)?.len();
    Ok(DiskFile {
        file,
        bytes,
        path: Some(path.to_owned()),
    })
}

/// The disks of a standby: the operator's own files, in the machine's order, and an empty one in memory for each disk
/// without a file. Nothing that the description says is opened.
///
/// # Errors
/// [`BuildError::Disk`] for a file that is too small, [`BuildError::File`] for one that can't be opened.
pub fn standby_disks(config: &MachineConfig, files: &[PathBuf]) -> Result<Vec<DiskFile>, BuildError> {
    let disk = |(index, bytes): (usize, &u64)| match files.get(index) {
        Some(path) => {
            let disk = open_disk(path)?;
            let (got, want) = (disk.bytes, *bytes);
            if got < want {
                return Err(BuildError::Disk { index, got, want });
            }
            Ok(DiskFile { bytes: want, ..disk })
        }
        None => memory_disk(*bytes).map_err(BuildError::system("a disk in memory")),
    };
    config.disks.iter().enumerate().map(disk).collect()
}

fn memory_disk(bytes: u64) -> io::Result<DiskFile> {
    let file = rustix::fs::memfd_create("testbed-disk", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    tracing::warn!(
        bytes,
        "a disk of the machine has no file here: it is empty, and lost with this process"
    );
    Ok(DiskFile {
        file: file.into(),
        bytes,
        path: None,
    })
}

/// Where the guest's console goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialTarget {
    /// Nowhere.
    None,
    /// Our standard output.
    Stdout,
    /// The end of a file.
    File(PathBuf),
}

impl SerialTarget {
    /// As it is told to others: `None` when nothing leaves the machine this way.
    #[must_use]
    pub fn describe(&self) -> Option<String> {
        match self {
            SerialTarget::None => None,
            SerialTarget::Stdout => Some("stdout".to_owned()),
            SerialTarget::File(path) => Some(path.display().to_string()),
        }
    }
}

impl std::str::FromStr for SerialTarget {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "none" => SerialTarget::None,
            "stdout" => SerialTarget::Stdout,
            path => SerialTarget::File(path.into()),
        })
    }
}

/// The guest's console: bytes in, lines out.
pub struct Serial {
    out: Box<dyn Write + Send>,
    line: Vec<u8>,
}

impl Serial {
    /// Opens what `target` names.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn open(target: &SerialTarget) -> Result<Self, BuildError> {
        let out: Box<dyn Write + Send> = match target {
            SerialTarget::None => Box::new(io::sink()),
            SerialTarget::Stdout => Box::new(io::stdout()),
            SerialTarget::File(path) => {
                let wrong = |source| BuildError::File {
                    what: "the console's file",
                    path: path.clone(),
                    source,
                };
                Box::new(
                    File::options()
                        .create(true)
                        .append(true)
                        .open(path)
                        .map_err(wrong)?,
                )
            }
        };
        Ok(Serial {
            out,
            line: Vec::with_capacity(LINE_BYTES_MAX),
        })
    }

    /// A console that writes to `out`.
    #[must_use]
    pub fn to(out: Box<dyn Write + Send>) -> Self {
        Serial {
            out,
            line: Vec::with_capacity(LINE_BYTES_MAX),
        }
    }

    /// Takes bytes of the guest's. What can't be written is lost: the guest does not wait for its console.
    pub fn put(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_BYTES_MAX {
                self.flush();
            }
        }
    }

    /// Writes what is kept back.
    pub fn flush(&mut self) {
        let written = self.out.write_all(&self.line).and_then(|()| self.out.flush());
        if let Err(error) = written {
            tracing::debug!(%error, "the guest's console can't be written");
        }
        self.line.clear();
    }
}
