//! Comparing the memory of a machine that has loaded a checkpoint with what was committed, before its guest runs.
//!
//! ```text
//!   marker file, `stop` (it will not run by itself) ─► stream ─► "paused" ─► every page compared ─► `cont`, marker gone
//! ```
//!
//! The main memory is the image's own file, mapped: that it is this very file is checked by its inode, and the pages are read from there,
//! so that holes stay holes. All other blocks are read from the machine's process.
//!
//! A machine that is found with the marker and does not run has never run: whoever finds it may end it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use romulus_host_sys::{ProcessMemory, read_maps};
use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{BlockId, Digest, PAGE_BYTES, PageIndex};
use serde_json::Value;

use super::Waiting;
use super::load::{Goal, await_goal};
use crate::memory_check::{add_file, judge, shared_mappings, unreadable};
use crate::qemu::qmp::Monitor;
use crate::qemu::source::placement::{Wanted, place};
use crate::spec::MachineSpec;
use crate::standby::{Committed, StandbyError};

const MARKER: &str = "unverified";

fn marker(folder: &Path) -> PathBuf {
    folder.join(MARKER)
}

/// Whether the machine in this folder was to be verified and nobody has said that it was.
pub(super) fn is_pending(folder: &Path) -> bool {
    marker(folder).exists()
}

/// Forgets that it was to be verified: it runs.
pub(super) fn settle(folder: &Path) {
    // Left behind it would only be looked at again.
    let _ = fs::remove_file(marker(folder));
}

/// Has a waiting machine stay paused when it has loaded.
pub(super) fn hold(machine: &mut Waiting, folder: &Path) -> Result<(), StandbyError> {
    let path = marker(folder);
    File::create(&path)
        .map_err(|error| StandbyError::new(format!("could not make {}", path.display()), error))?;
    // In the state "inmigrate" it only says that the guest is not to run afterwards.
    machine
        .qmp
        .execute("stop", Value::Null)
        .map(drop)
        .map_err(|error| StandbyError::new("the standby cannot be told to stay paused", error))
}

/// Lets a machine run whose memory was found to be right.
pub(super) fn run(machine: &mut Waiting, folder: &Path, deadline: Instant) -> Result<(), StandbyError> {
    machine
        .qmp
        .execute("cont", Value::Null)
        .map_err(|error| StandbyError::new("the verified standby cannot be let run", error))?;
    await_goal(machine, Goal::Running, deadline)?;
    settle(folder);
    Ok(())
}

/// Compares all memory of a machine that has loaded `checkpoint` and is paused with the digest of the commit.
pub(super) fn compare(
    spec: &MachineSpec,
    machine: &mut Waiting,
    checkpoint: &Committed<'_>,
    expected: Digest,
) -> Result<(), StandbyError> {
    let mut image = ImageDigest::ZERO;
    let main = &checkpoint.ram[usize::from(spec.main.0)];
    let main_bytes = spec.layout.blocks()[usize::from(spec.main.0)].bytes;
    check_main_is_the_images(machine, main, main_bytes)?;
    let first = spec.layout.first_page(spec.main);
    add_file(&mut image, main, main_bytes, first).map_err(|error| unreadable(main, error))?;
    for (block, held) in small_blocks(spec, machine, checkpoint)? {
        let pages = held.as_chunks::<PAGE_BYTES>().0;
        for (index, page) in (spec.layout.first_page(block).0..).map(PageIndex).zip(pages) {
            image.replace(Digest(0), page_digest(index, page));
        }
    }
    judge(&image, expected)
}

/// Whether the machine's memory at the guest's address 0 is a shared mapping of the whole of this file.
fn check_main_is_the_images(machine: &mut Waiting, path: &Path, bytes: u64) -> Result<(), StandbyError> {
    let failed = |error| StandbyError::new("the standby cannot be asked for its memory", error);
    let reply = machine.qmp.hmp("gpa2hva 0").map_err(failed)?;
    let address = reply
        .trim()
        .rsplit_once(" is 0x")
        .and_then(|(_, hex)| u64::from_str_radix(hex, 16).ok());
    let maps = read_maps(machine.process.pid())
        .map_err(|error| StandbyError::new("the standby's mappings cannot be read", error))?;
    let mut shared = shared_mappings(&maps, path, bytes)?;
    if address.is_some_and(|address| shared.any(|mapping| mapping.start == address)) {
        return Ok(());
    }
    Err(StandbyError::plain(format!(
        "the standby's main memory is not the file {}: the guest was not started",
        path.display()
    )))
}

/// What the machine itself holds in all blocks but the main one.
fn small_blocks(
    spec: &MachineSpec,
    machine: &mut Waiting,
    checkpoint: &Committed<'_>,
) -> Result<Vec<(BlockId, Vec<u8>)>, StandbyError> {
    let mut committed = Vec::new();
    for (position, (block, path)) in spec.layout.blocks().iter().zip(checkpoint.ram).enumerate() {
        let id = BlockId(u16::try_from(position).expect("BLOCKS_MAX fits in 16 bits"));
        if id != spec.main {
            let content = fs::read(path).map_err(|error| unreadable(path, error))?;
            committed.push((id, block, content));
        }
    }
    let wanted: Vec<Wanted<'_>> = committed
        .iter()
        .map(|(_, block, content)| Wanted {
            name: &block.name,
            bytes: block.bytes,
            content: Some(content),
        })
        .collect();
    let pid = machine.process.pid();
    let placed = place(&mut machine.qmp, pid, &wanted)
        .map_err(|error| StandbyError::new("a block of the standby's memory was not found", error))?;
    let mut memory = ProcessMemory::new(pid);
    committed
        .iter()
        .zip(placed)
        .map(|((id, block, _), place)| {
            let mut held = vec![0; usize::try_from(block.bytes).expect("a block fits in memory")];
            memory.read(place.start, &mut held).map_err(|error| {
                StandbyError::new(
                    format!("the standby's block {} cannot be read", block.name),
                    error,
                )
            })?;
            Ok((*id, held))
        })
        .collect()
}
