//! Files that a machine needs on both hosts: opened without being touched, and compared by content.
//!
//! The paths come from a command line or from a peer, so what lies there may be a FIFO, on which an open waits for ever, or a
//! device, on which one has effects. Only a regular file is ever opened, and no more of it is read than was agreed.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use romulus_types::Digest;
use rustix::fs::OFlags;
use xxhash_rust::xxh3::Xxh3;

/// Files up to this length are compared by content, longer ones by their length only.
pub(super) const DIGEST_BYTES_MAX: u64 = 256 << 20;

/// Opens a regular file for reading; returns its length, too. Symbolic links are followed, what they lead to is judged.
///
/// # Errors
/// Why it cannot be opened, or that it is no regular file.
pub(super) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    // O_PATH names the file without opening it; what was judged is then what is opened, whatever the path leads to by now.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let named = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = named.metadata()?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() {
            "it is a directory, not a regular file"
        } else {
            "it is a device, FIFO or socket, not a regular file"
        };
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let file = File::open(format!("/proc/self/fd/{}", named.as_raw_fd()))?;
    Ok((file, metadata.len()))
}

/// XXH3-128 of a file, of which no more than `bytes` are read.
///
/// # Errors
/// The file cannot be read.
pub(super) fn digest_of(file: File, bytes: u64) -> io::Result<Digest> {
    let mut limited = file.take(bytes);
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match limited.read(&mut buffer)? {
            0 => return Ok(Digest(hash.digest128())),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_a_fifo_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "12345").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), mode).unwrap();
        for name in ["file", "link"] {
            let (mut file, bytes) = open_regular(&at(name)).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!((text.as_str(), bytes), ("12345", 5));
        }
        let why = |path: &Path| open_regular(path).unwrap_err().to_string();
        assert!(why(&at("fifo")).contains("FIFO"));
        assert!(why(folder.path()).contains("directory"));
        assert!(why(Path::new("/dev/zero")).contains("device"));
    }

    #[test]
    fn a_digest_reads_no_more_than_was_agreed() {
        let endless = File::open("/dev/zero").unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, &[0; 4096]).unwrap();
        let whole = digest_of(file.reopen().unwrap(), 4096).unwrap();
        assert_eq!(digest_of(endless, 4096).unwrap(), whole);
    }
}
