//! Where QEMU keeps each RAM block: from names to addresses in its process.
//!
//! ```text
//!  RAM block "0000:00:02.0/vga.vram"
//!     │ mapped in the guest's physical space?  `info mtree -f` gives an address, `gpa2hva` its place in QEMU
//!     │ else                                   an anonymous mapping of just its length in front of a guard page;
//!     ▼                                        among several, the one with the block's contents
//!  /proc/PID/maps has it (always checked)
//! ```
//!
//! Blocks of one length and one content (the boot ROMs of two equal network cards) cannot be told apart. They are
//! *twins*: any assignment is right as long as none of them is written, and that is watched.

use std::collections::HashMap;
use std::fs::File;

use romulus_host_sys::{Mapping, ProcessMemory, SharedView, SysError, read_maps};

use super::error::AttachError;
use crate::qemu::qmp::{Monitor, QmpError};

/// QEMU puts one inaccessible page behind each anonymous block.
const GUARD_BYTES: u64 = 4096;

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub(in crate::qemu) struct Wanted<'a> {
    /// The block's name.
    pub(in crate::qemu) name: &'a str,
    /// Its length in use.
    pub(in crate::qemu) bytes: u64,
    /// What it holds, if known.
    pub(in crate::qemu) content: Option<&'a [u8]>,
}

/// One block's place.
#[derive(Debug)]
pub(in crate::qemu) struct Placed {
    /// The block's name.
    pub(in crate::qemu) name: String,
    /// Its first address in QEMU.
    pub(in crate::qemu) start: u64,
    /// Its length in use.
    pub(in crate::qemu) bytes: u64,
    /// The mapping that holds it, from `start` on.
    pub(in crate::qemu) mapping_bytes: u64,
    /// Our own view of it, when it is shared memory.
    pub(in crate::qemu) view: Option<SharedView>,
    /// Other places that it may just as well have: it must not be written.
    pub(in crate::qemu) twins: Vec<(u64, u64)>,
}

/// Finds all blocks of process `pid`, in the order asked for.
pub(in crate::qemu) fn place(
    monitor: &mut dyn Monitor,
    pid: u32,
    wanted: &[Wanted<'_>],
) -> Result<Vec<Placed>, AttachError> {
    let maps = read_maps(pid)?;
    let totals = parse_ramblock(&monitor.hmp("info ramblock")?);
    let fragments = parse_flat_view(&monitor.hmp("info mtree -f")?);
    let mut starts: Vec<Option<u64>> = vec![None; wanted.len()];
    for (block, start) in wanted.iter().zip(&mut starts) {
        let same_name = wanted
            .iter()
            .filter(|other| short(other.name) == short(block.name))
            .count();
        let fragment = fragments.iter().find(|f| short(&f.name) == short(block.name));
        if let Some(fragment) = fragment
            && same_name == 1
        {
            *start = host_address(monitor, fragment)?
                .filter(|start| holding(&maps, *start, block.bytes).is_some());
        }
    }
    let mut search = Search {
        pid,
        maps: &maps,
        memory: ProcessMemory::new(pid),
        taken: starts.iter().flatten().copied().collect(),
    };
    wanted
        .iter()
        .zip(starts)
        .map(|(block, start)| {
            let total = totals.get(block.name).copied().unwrap_or(block.bytes);
            let (start, twins) = match start {
                Some(start) => (start, Vec::new()),
                None => search.by_length(block, total)?,
            };
            let mapping = holding(&maps, start, block.bytes).expect("only such addresses were chosen");
            let view = if mapping.shared {
                Some(map_shared(pid, mapping, start, block.bytes)?)
            } else {
                None
            };
            Ok(Placed {
                name: block.name.to_owned(),
                start,
                bytes: block.bytes,
                mapping_bytes: (mapping.end - start).min(total.next_multiple_of(4096)),
                view,
                twins,
            })
        })
        .collect()
}

fn holding(maps: &[Mapping], start: u64, bytes: u64) -> Option<&Mapping> {
    maps.iter()
        .find(|mapping| mapping.read && mapping.contains(start, bytes))
}

struct Search<'a> {
    pid: u32,
    maps: &'a [Mapping],
    memory: ProcessMemory,
    taken: Vec<u64>,
}

impl Search<'_> {
    fn by_length(&mut self, block: &Wanted<'_>, total: u64) -> Result<(u64, Vec<(u64, u64)>), AttachError> {
        let total = total.next_multiple_of(4096);
        let candidates: Vec<u64> = self
            .maps
            .windows(2)
            .filter(|pair| {
                let (mapping, guard) = (&pair[0], &pair[1]);
                let guarded =
                    guard.start == mapping.end && !guard.read && !guard.write && guard.bytes() == GUARD_BYTES;
                mapping.inode == 0 && mapping.read && mapping.write && mapping.bytes() == total && guarded
            })
            .map(|pair| pair[0].start)
            .filter(|start| !self.taken.contains(start))
            .collect();
        let mut fitting = candidates.clone();
        if candidates.len() > 1
            && let Some(content) = block.content
        {
            fitting.retain(|start| self.holds(*start, content));
        }
        let Some((first, rest)) = fitting.split_first() else {
            return Err(AttachError::BlockNotFound {
                block: block.name.to_owned(),
                bytes: total,
                pid: self.pid,
            });
        };
        self.taken.push(*first);
        let twins = if rest.is_empty() {
            Vec::new()
        } else {
            fitting.iter().map(|start| (*start, total)).collect()
        };
        Ok((*first, twins))
    }

    fn holds(&mut self, start: u64, content: &[u8]) -> bool {
        let mut bytes = vec![0; content.len()];
        self.memory.read(start, &mut bytes).is_ok() && bytes == content
    }
}

/// Maps a block of shared memory by the descriptor that QEMU keeps of it, or by its mapping itself.
fn map_shared(pid: u32, mapping: &Mapping, start: u64, bytes: u64) -> Result<SharedView, AttachError> {
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    let offset = mapping.file_offset + (start - mapping.start);
    let file = File::open(&path).or_else(|source| {
        open_by_inode(pid, mapping.inode).ok_or(AttachError::System(SysError::Proc {
            path: path.clone(),
            source,
        }))
    })?;
    let view = SharedView::map(&file, offset, bytes)?;
    view.populate(0, bytes);
    Ok(view)
}

fn open_by_inode(pid: u32, inode: u64) -> Option<File> {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    entries
        .flatten()
        .filter(|entry| std::fs::metadata(entry.path()).is_ok_and(|m| m.ino() == inode && m.is_file()))
        .find_map(|entry| File::open(entry.path()).ok())
}

/// A piece of a memory region in the guest's physical address space.
#[derive(Debug, PartialEq, Eq)]
struct Fragment {
    gpa: u64,
    offset: u64,
    name: String,
}

fn host_address(monitor: &mut dyn Monitor, fragment: &Fragment) -> Result<Option<u64>, QmpError> {
    let reply = monitor.hmp(&format!("gpa2hva {:#x}", fragment.gpa))?;
    // "Host virtual address for 0x0 (pc.ram) is 0x7fcfa3e00000"
    let found = reply.trim().rsplit_once(" is 0x").and_then(|(before, address)| {
        before
            .ends_with(&format!("({})", fragment.name))
            .then(|| u64::from_str_radix(address, 16).ok())?
    });
    Ok(found.and_then(|address| address.checked_sub(fragment.offset)))
}

/// The last part of a name: a block's is its region's behind the path of its device.
fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Lengths by block from `info ramblock`: name, page size (two words), offset, used, total.
fn parse_ramblock(text: &str) -> HashMap<String, u64> {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    text.lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let numbers: Vec<u64> = words.iter().filter_map(|word| number(word)).collect();
            let total = numbers.get(2).filter(|total| **total > 0)?;
            Some(((*words.first()?).to_owned(), *total))
        })
        .collect()
}

/// RAM and ROM pieces of the address space "memory" from `info mtree -f`.
fn parse_flat_view(text: &str) -> Vec<Fragment> {
    let mut fragments = Vec::new();
    let mut of_memory = false;
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.starts_with("FlatView #") {
            of_memory = false;
        } else if trimmed.starts_with("AS \"") {
            of_memory |= trimmed.starts_with("AS \"memory\"");
        } else if of_memory && let Some(fragment) = parse_fragment(trimmed) {
            fragments.push(fragment);
        }
    }
    fragments
}

/// `GPA-GPA (prio N, KIND): NAME[ @OFFSET][ KVM]`
fn parse_fragment(line: &str) -> Option<Fragment> {
    let (range, rest) = line.split_once(" (prio ")?;
    let (kind, name) = rest.split_once("): ")?;
    let kind = kind.split_once(", ")?.1;
    if !matches!(kind, "ram" | "rom" | "romd" | "ramd" | "nv-ram") {
        return None;
    }
    let gpa = u64::from_str_radix(range.split_once('-')?.0, 16).ok()?;
    let name = name.strip_suffix(" KVM").unwrap_or(name);
    let (name, offset) = match name.rsplit_once(" @") {
        Some((name, offset)) => (name, u64::from_str_radix(offset, 16).ok()?),
        None => (name, 0),
    };
    Some(Fragment {
        gpa,
        offset,
        name: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_and_rom_of_the_guests_memory_are_found_in_the_flat_view() {
        let text = "FlatView #0\n AS \"I/O\", root: io\n Root memory region: io\n  0000000000000000-0000000000000007 (prio 0, ram): not-this\n\
            FlatView #2\r\n AS \"memory\", root: system\r\n AS \"cpu-memory-0\", root: system\n Root memory region: system\n\
            \x20 0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\n\
            \x20 00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n\
            \x20 0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000\r\n\
            \x20 00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios\n  garbage (prio\n";
        let fragment = |gpa, offset, name: &str| Fragment {
            gpa,
            offset,
            name: name.into(),
        };
        let expected = [
            fragment(0, 0, "pc.ram"),
            fragment(0x1_0000_0000, 0xc000_0000, "pc.ram"),
            fragment(0xfffc_0000, 0, "pc.bios"),
        ];
        assert_eq!(parse_flat_view(text), expected);
    }

    #[test]
    fn lengths_are_read_with_and_without_further_columns() {
        let text = "   Block Name    PSize   Offset   Used   Total\r\n\
             /rom@etc/acpi/tables    4 KiB  0x0000000011100000 0x0000000000020000 0x0000000000200000\r\n\
             pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000 rom\n";
        let totals = parse_ramblock(text);
        assert_eq!(totals.len(), 2);
        assert_eq!(totals["/rom@etc/acpi/tables"], 0x20_0000);
        assert_eq!(totals["pc.bios"], 0x4_0000);
    }
}
