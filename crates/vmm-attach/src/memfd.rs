//! Memory files that travel over the socket: how they are made, and what is checked of one that a peer sent.
//!
//! Whoever maps a file that another process can make shorter can be killed by SIGBUS. So what we make is sealed, and what we get is
//! refused when it could have been sealed and was not. An ordinary file, such as an image on a tmpfs, can't be sealed; it is taken at its size.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{
    FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};

/// Why a file from a peer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The kernel refused a call.
    #[error("{call} on the file of {what} failed")]
    Call {
        /// The call.
        call: &'static str,
        /// What the file is for.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A pipe, a socket, a device, …
    #[error("the descriptor for {what} is not that of a regular file or a memory file")]
    Kind {
        /// What it is for.
        what: String,
    },
    /// It is too short.
    #[error("the file for {what} has {bytes} bytes, but {needed} are needed")]
    TooShort {
        /// What it is for.
        what: String,
        /// Its size.
        bytes: u64,
        /// What was announced.
        needed: u64,
    },
    /// It could shrink while it is mapped.
    #[error("the memory file for {what} is not sealed against shrinking (F_SEAL_SHRINK)")]
    NotSealed {
        /// What it is for.
        what: String,
    },
}

/// Whether a file that can't be sealed is acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seals {
    /// It must be a memory file with a seal against shrinking.
    Needed,
    /// It must have that seal if it can have one.
    IfPossible,
    /// It is only read, never mapped.
    NotNeeded,
}

/// Makes a memory file of so many zero bytes whose size never changes.
///
/// # Errors
/// The kernel's: no memory, or no descriptor left.
pub fn sealed(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Makes a memory file with this content, which never changes.
///
/// # Errors
/// The kernel's: no memory, or no descriptor left.
pub fn sealed_with(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let file = File::from(memfd_create(
        name,
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?);
    file.write_all_at(content, 0)?;
    let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    fcntl_add_seals(&file, all)?;
    Ok(file.into())
}

/// Checks a file that came from a peer: what it is, that `needed` bytes are there, and that they stay.
///
/// # Errors
/// [`FileError`] names what is wrong with the file for `what`.
pub fn check(file: impl AsFd, what: &str, needed: u64, seals: Seals) -> Result<(), FileError> {
    let what = || what.to_owned();
    let stat = fstat(&file).map_err(|errno| FileError::Call {
        call: "fstat",
        what: what(),
        source: errno.into(),
    })?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(FileError::Kind { what: what() });
    }
    let bytes = u64::try_from(stat.st_size).unwrap_or(0);
    if bytes < needed {
        return Err(FileError::TooShort {
            what: what(),
            bytes,
            needed,
        });
    }
    // A file system that knows no seals says EINVAL; a file that can't get any more seals has the seal against sealing.
    let held = fcntl_get_seals(&file).unwrap_or(SealFlags::SEAL);
    let sealed = held.contains(SealFlags::SHRINK);
    let sealable = !held.contains(SealFlags::SEAL);
    match seals {
        Seals::Needed if !sealed => Err(FileError::NotSealed { what: what() }),
        Seals::IfPossible if !sealed && sealable => Err(FileError::NotSealed { what: what() }),
        _ => Ok(()),
    }
}
