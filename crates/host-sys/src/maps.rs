//! The mappings of a process, from `/proc/PID/maps` (proc_pid_maps(5)).

use std::io;

use crate::SysError;

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after the mapping.
    pub end: u64,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub execute: bool,
    /// Shared with other mappings of the same file (`MAP_SHARED`).
    pub shared: bool,
    /// Offset of `start` in the mapped file, in bytes.
    pub file_offset: u64,
    /// The device of the mapped file as the kernel prints it (`major:minor`, hexadecimal).
    pub device: String,
    /// The inode of the mapped file, 0 for anonymous memory.
    pub inode: u64,
    /// Path or label; empty for anonymous memory.
    pub path: String,
}

impl Mapping {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Whether `[start, start + bytes)` lies inside.
    pub fn contains(&self, start: u64, bytes: u64) -> bool {
        start >= self.start && start.checked_add(bytes).is_some_and(|end| end <= self.end)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?.as_bytes();
        let file_offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let device = fields.next()?.to_owned();
        let inode = fields.next()?.parse().ok()?;
        let path = fields.next().unwrap_or("").trim_start().to_owned();
        let (start, end) = (
            u64::from_str_radix(start, 16).ok()?,
            u64::from_str_radix(end, 16).ok()?,
        );
        if permissions.len() != 4 || end <= start {
            return None;
        }
        Some(Self {
            start,
            end,
            read: permissions[0] == b'r',
            write: permissions[1] == b'w',
            execute: permissions[2] == b'x',
            shared: permissions[3] == b's',
            file_offset,
            device,
            inode,
            path,
        })
    }
}

/// Reads the mappings of process `pid`, in the order of their addresses.
///
/// # Errors
/// [`SysError::Proc`] when the file cannot be read or a line cannot be understood.
pub fn read_maps(pid: u32) -> Result<Vec<Mapping>, SysError> {
    let path = format!("/proc/{pid}/maps");
    let text = std::fs::read(&path).map_err(|source| SysError::Proc {
        path: path.clone(),
        source,
    })?;
    String::from_utf8_lossy(&text)
        .lines()
        .map(|line| {
            Mapping::parse(line).ok_or_else(|| SysError::Proc {
                path: path.clone(),
                source: io::Error::new(io::ErrorKind::InvalidData, format!("unknown line {line:?}")),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_a_path_and_one_without_are_understood() {
        let line =
            "7f3c00000000-7f3c10000000 rw-s 00001000 00:01 2051                       /memfd:ram (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(
            (mapping.bytes(), mapping.file_offset, mapping.inode),
            (0x1000_0000, 0x1000, 2051)
        );
        assert!(mapping.read && mapping.write && mapping.shared && !mapping.execute);
        assert_eq!(mapping.path, "/memfd:ram (deleted)");
        let anonymous = Mapping::parse("55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!(anonymous.path, "");
        assert!(!anonymous.shared);
    }

    #[test]
    fn lines_that_are_not_mappings_are_refused() {
        for line in [
            "",
            "zz-yy rw-p 0 0:0 0",
            "2000-1000 rw-p 0 00:00 0",
            "1000-2000 rw 0 00:00 0",
        ] {
            assert_eq!(Mapping::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn our_own_code_is_in_our_own_mappings() {
        let here = our_address();
        let maps = read_maps(std::process::id()).unwrap();
        assert!(maps.iter().any(|m| m.execute && m.contains(here, 1)));
    }

    fn our_address() -> u64 {
        (our_address as fn() -> u64 as usize) as u64
    }
}
