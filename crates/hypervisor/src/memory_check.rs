//! Comparing a standby's memory with what was committed: which files a process has mapped, and what is in them.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use romulus_host_sys::Mapping;
use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{Digest, PAGE_BYTES, PageIndex};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::standby::StandbyError;

const PAGE: u64 = PAGE_BYTES as u64;
const CHUNK_BYTES: u64 = 1 << 20;

/// Says which file could not be read.
pub(crate) fn unreadable(path: &Path, error: std::io::Error) -> StandbyError {
    StandbyError::new(format!("could not read {}", path.display()), error)
}

/// The mappings among `maps` that share the first `bytes` of this very file with whoever else has it.
pub(crate) fn shared_mappings<'a>(
    maps: &'a [Mapping],
    path: &Path,
    bytes: u64,
) -> Result<impl Iterator<Item = &'a Mapping>, StandbyError> {
    let file = fs::metadata(path).map_err(|error| unreadable(path, error))?;
    let device = format!(
        "{:02x}:{:02x}",
        rustix::fs::major(file.dev()),
        rustix::fs::minor(file.dev())
    );
    let inode = file.ino();
    Ok(maps.iter().filter(move |mapping| {
        mapping.shared
            && mapping.file_offset == 0
            && mapping.contains(mapping.start, bytes)
            && (mapping.inode, mapping.device.as_str()) == (inode, device.as_str())
    }))
}

/// Adds the pages of a file that are no holes; `first` is the number of its first page.
pub(crate) fn add_file(
    image: &mut ImageDigest,
    path: &Path,
    bytes: u64,
    first: PageIndex,
) -> std::io::Result<()> {
    let file = File::open(path)?;
    let mut chunk = Vec::new();
    let mut at = 0;
    while at < bytes {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) if data < bytes => data / PAGE * PAGE,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&file, SeekFrom::Hole(data.max(at)))?
            .next_multiple_of(PAGE)
            .min(bytes)
            .min(data + CHUNK_BYTES);
        chunk.resize(usize::try_from(end - data).expect("a chunk"), 0);
        file.read_exact_at(&mut chunk, data)?;
        for (index, page) in (first.0 + data / PAGE..)
            .map(PageIndex)
            .zip(chunk.as_chunks::<PAGE_BYTES>().0)
        {
            image.replace(Digest(0), page_digest(index, page));
        }
        at = end;
    }
    Ok(())
}

/// The commit's digest against what was found, in words.
pub(crate) fn judge(image: &ImageDigest, expected: Digest) -> Result<(), StandbyError> {
    if image.digest() == expected {
        return Ok(());
    }
    Err(StandbyError::plain(format!(
        "the standby's memory is not what was committed (its digest is {}, the commit's {expected}): the guest was not started",
        image.digest()
    )))
}
