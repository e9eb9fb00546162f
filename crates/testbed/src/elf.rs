//! Reads what has to be loaded out of an ELF file: 64 bits, little-endian, x86-64, executable, at fixed addresses.
//!
//! The file is the operator's, and may be anything: every number is checked before it is used.

use std::ops::Range;

/// Most parts of a file that are looked at.
const PARTS_MAX: usize = 64;
const FILE_HEADER_BYTES: usize = 64;
const PART_HEADER_BYTES: usize = 56;
/// `PT_LOAD`
const LOAD: u32 = 1;
/// `EM_X86_64`
const X86_64: u16 = 62;
/// `ET_EXEC`
const EXECUTABLE: u16 = 2;

/// A part of the file that belongs into memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Where it begins in memory.
    pub address: u64,
    /// Its bytes in the file.
    pub file: Range<usize>,
    /// Its size in memory; what the file does not have is zeros.
    pub memory_bytes: u64,
}

/// Why a file is not a guest's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// It does not begin as an ELF file does.
    #[error("not an ELF file for x86-64, at fixed addresses: give the guest that was built with this VMM")]
    Kind,
    /// A header or a part lies outside the file.
    #[error("the file ends before its {0}: it is cut off or damaged")]
    Short(&'static str),
    /// More parts than any guest has.
    #[error("the file has {0} parts, at most {PARTS_MAX} are read")]
    Parts(usize),
}

/// The parts of `file` that belong into memory.
///
/// # Errors
/// [`ElfError`] when it is not such a file.
pub fn parts(file: &[u8]) -> Result<Vec<Part>, ElfError> {
    let header: &[u8; FILE_HEADER_BYTES] = file.first_chunk().ok_or(ElfError::Short("header"))?;
    let magic = header.starts_with(b"\x7fELF\x02\x01\x01");
    if !magic || u16_at(header, 16) != EXECUTABLE || u16_at(header, 18) != X86_64 {
        return Err(ElfError::Kind);
    }
    let count = usize::from(u16_at(header, 56));
    if count > PARTS_MAX {
        return Err(ElfError::Parts(count));
    }
    if usize::from(u16_at(header, 54)) != PART_HEADER_BYTES {
        return Err(ElfError::Kind);
    }
    let table = within(
        file,
        u64_at(header, 32),
        (count * PART_HEADER_BYTES) as u64,
        "table of parts",
    )?;
    let headers = file[table].chunks_exact(PART_HEADER_BYTES);
    headers
        .filter(|header| u32_at(header, 0) == LOAD)
        .map(|header| part(file, header))
        .collect()
}

fn part(file: &[u8], header: &[u8]) -> Result<Part, ElfError> {
    let bytes = within(file, u64_at(header, 8), u64_at(header, 32), "parts")?;
    let memory_bytes = u64_at(header, 40).max(bytes.len() as u64);
    Ok(Part {
        address: u64_at(header, 24),
        file: bytes,
        memory_bytes,
    })
}

fn within(file: &[u8], offset: u64, bytes: u64, what: &'static str) -> Result<Range<usize>, ElfError> {
    let end = offset
        .checked_add(bytes)
        .and_then(|end| usize::try_from(end).ok());
    match (usize::try_from(offset), end) {
        (Ok(start), Some(end)) if end <= file.len() => Ok(start..end),
        _ => Err(ElfError::Short(what)),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// An ELF file with one part, for tests of what loads it.
#[cfg(test)]
pub mod sample {
    /// `contents` at `address`.
    pub fn image(address: u64, contents: &[u8], memory_bytes: u64) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend(super::EXECUTABLE.to_le_bytes());
        file.extend(super::X86_64.to_le_bytes());
        file.resize(32, 0);
        file.extend(64u64.to_le_bytes());
        file.resize(54, 0);
        file.extend(56u16.to_le_bytes());
        file.extend(1u16.to_le_bytes());
        file.resize(64, 0);
        file.extend(super::LOAD.to_le_bytes());
        file.extend([0; 4]);
        for word in [120, address, address, contents.len() as u64, memory_bytes, 0x1000] {
            file.extend(word.to_le_bytes());
        }
        file.extend(contents);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loadable_part_of_a_file_is_found() {
        let file = sample::image(0x40_0000, b"guest", 0x2000);
        let found = parts(&file).unwrap();
        assert_eq!(
            found,
            [Part {
                address: 0x40_0000,
                file: 120..125,
                memory_bytes: 0x2000
            }]
        );
    }

    #[test]
    fn a_file_cut_off_anywhere_is_refused_without_a_panic() {
        let file = sample::image(0x40_0000, b"guest", 0x2000);
        for length in 0..file.len() {
            assert!(parts(&file[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn no_single_wrong_byte_makes_it_panic() {
        let file = sample::image(0x40_0000, b"guest", 0x2000);
        for at in 0..120 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut wrong = file.clone();
                wrong[at] = value;
                let _ = parts(&wrong);
            }
        }
    }
}
