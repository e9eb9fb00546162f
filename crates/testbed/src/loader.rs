//! Writes into guest memory what must be there before a vCPU enters: the image, tables, and what the guest is told.
//!
//! Where everything lies is `romulus_guest_core::abi`. All of it is guest memory, so a checkpoint carries it and a
//! restore needs no loader.

use romulus_guest_core::abi::{self, AbiError, BootInfo, Device, ImageHeader};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::elf::{self, ElfError};

/// What the loader has to know of a machine.
#[derive(Debug, Clone)]
pub struct Boot<'a> {
    /// The guest's ELF file.
    pub image: &'a [u8],
    /// vCPUs, 1 to 4.
    pub vcpus: u32,
    /// RAM from address 0, in bytes.
    pub ram_low_bytes: u64,
    /// RAM from 4 GiB, in bytes.
    pub ram_high_bytes: u64,
    /// Ticks of the time stamp counter in a millisecond.
    pub tsc_khz: u64,
    /// The guest's command line.
    pub cmdline: &'a str,
    /// The machine's devices.
    pub devices: &'a [Device],
}

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not a guest's file.
    #[error("the guest's file: {0}")]
    Elf(#[from] ElfError),
    /// Not a guest for this VMM, or a machine that the layout has no room for.
    #[error("the guest: {0}")]
    Abi(#[from] AbiError),
    /// A part that does not fit.
    #[error(
        "the guest's image has {bytes} bytes at {address:#x}, which is not free RAM: give the machine more memory"
    )]
    Room {
        /// Where the part should be.
        address: u64,
        /// Its size in memory.
        bytes: u64,
    },
    /// A command line that the guest can't be given.
    #[error("the guest's command line has {0} bytes, at most {max} are possible, none of them NUL", max = abi::CMDLINE_BYTES_MAX)]
    CommandLine(usize),
    /// The tables do not fit.
    #[error("the machine's tables do not fit into its RAM: give it at least {} MiB", abi::RAM_BYTES_MIN >> 20)]
    Tables,
}

/// Loads the guest. Returns the address at which every vCPU enters.
///
/// # Errors
/// [`LoadError`], which says what to change.
pub fn load<M: GuestMemory>(memory: &M, boot: &Boot<'_>) -> Result<u64, LoadError> {
    let cmdline = boot.cmdline.as_bytes();
    if cmdline.len() > abi::CMDLINE_BYTES_MAX || cmdline.contains(&0) {
        return Err(LoadError::CommandLine(cmdline.len()));
    }
    let cmdline_bytes = u32::try_from(cmdline.len()).map_err(|_| LoadError::CommandLine(cmdline.len()))?;
    let info = BootInfo::new(
        boot.vcpus,
        boot.ram_low_bytes,
        boot.ram_high_bytes,
        boot.tsc_khz,
        cmdline_bytes,
        boot.devices,
    )?;
    load_image(memory, boot.image)?;
    let mut header = vec![0; ImageHeader::BYTES];
    memory
        .read_slice(&mut header, GuestAddress(abi::IMAGE))
        .map_err(|_| LoadError::Tables)?;
    let header = ImageHeader::from_bytes(&header)?;
    page_tables(memory, boot.ram_high_bytes)?;
    segments(memory, boot.vcpus)?;
    interrupt_gates(memory, &header)?;
    put(memory, abi::BOOT_INFO, &info.to_bytes())?;
    put(memory, abi::CMDLINE, cmdline)?;
    put(memory, abi::CMDLINE + cmdline.len() as u64, &[0])?;
    Ok(header.entry)
}

fn load_image<M: GuestMemory>(memory: &M, image: &[u8]) -> Result<(), LoadError> {
    for part in elf::parts(image)? {
        let (address, bytes) = (part.address, part.memory_bytes);
        let room = LoadError::Room { address, bytes };
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        if address < abi::IMAGE || !memory.check_range(GuestAddress(address), length, Permissions::Write) {
            return Err(room);
        }
        let rest = part.file.len() as u64;
        put(memory, address, &image[part.file])?;
        fill_zero(memory, address + rest, address + bytes)?;
    }
    Ok(())
}

/// Identity map with 2 MiB pages: the first 4 GiB, devices among them, and the RAM above.
fn page_tables<M: GuestMemory>(memory: &M, ram_high_bytes: u64) -> Result<(), LoadError> {
    put_word(memory, abi::PML4, abi::PDPT | abi::TABLE_FLAGS)?;
    let high_gib = ram_high_bytes.div_ceil(1 << 30);
    for gib in 0..4 + high_gib {
        let directory = match gib.checked_sub(4) {
            None => abi::LOW_PDS + gib * 0x1000,
            Some(above) => abi::HIGH_PDS + above * 0x1000,
        };
        put_word(memory, abi::PDPT + gib * 8, directory | abi::TABLE_FLAGS)?;
        let pages: Vec<u8> = (0..512)
            .flat_map(|page| ((gib << 30 | page << 21) | abi::PDE_FLAGS).to_le_bytes())
            .collect();
        put(memory, directory, &pages)?;
    }
    Ok(())
}

/// Segment descriptors and the task states, each with a bitmap that allows every port to ring 3.
fn segments<M: GuestMemory>(memory: &M, vcpus: u32) -> Result<(), LoadError> {
    let descriptor = |selector: u16| abi::GDT + u64::from(selector & !7);
    put_word(memory, descriptor(abi::KERNEL_CODE), 0x00af_9b00_0000_ffff)?;
    put_word(memory, descriptor(abi::KERNEL_CODE + 8), 0x00cf_9300_0000_ffff)?;
    put_word(memory, descriptor(abi::USER_DATA), 0x00cf_f300_0000_ffff)?;
    put_word(memory, descriptor(abi::USER_CODE), 0x00af_fb00_0000_ffff)?;
    for vcpu in 0..vcpus {
        let state = task_state(vcpu);
        let limit = u64::from(abi::TSS_LIMIT);
        let low = limit | (state & 0xff_ffff) << 16 | 0x89 << 40 | (state >> 24 & 0xff) << 56;
        let selector = task_selector(vcpu);
        put_word(memory, descriptor(selector), low)?;
        put_word(memory, descriptor(selector) + 8, state >> 32)?;
        put_word(memory, state + 4, abi::kernel_stack_top(vcpu))?;
        let bitmap = u16::try_from(abi::TSS_IO_BITMAP).expect("a small constant");
        put(memory, state + 0x66, &bitmap.to_le_bytes())?;
        put(memory, state + limit, &[0xff])?;
    }
    Ok(())
}

/// Address of a vCPU's task state.
#[must_use]
pub fn task_state(vcpu: u32) -> u64 {
    abi::TSS + u64::from(vcpu) * abi::TSS_STRIDE
}

/// Selector of a vCPU's task state.
///
/// # Panics
/// For more vCPUs than the layout has.
#[must_use]
pub fn task_selector(vcpu: u32) -> u16 {
    assert!(vcpu < abi::VCPUS_MAX);
    abi::TSS_SELECTOR + 0x10 * u16::try_from(vcpu).expect("at most four")
}

/// 256 interrupt gates that ring 3 may use, each to the image's handler.
fn interrupt_gates<M: GuestMemory>(memory: &M, header: &ImageHeader) -> Result<(), LoadError> {
    let mut gates = Vec::with_capacity(256 * 16);
    for handler in header.handlers {
        let selector = u64::from(abi::KERNEL_CODE);
        let low = handler & 0xffff | selector << 16 | 0xee00 << 32 | (handler >> 16 & 0xffff) << 48;
        gates.extend(low.to_le_bytes());
        gates.extend((handler >> 32).to_le_bytes());
    }
    put(memory, abi::IDT, &gates)
}

fn put<M: GuestMemory>(memory: &M, address: u64, bytes: &[u8]) -> Result<(), LoadError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| LoadError::Tables)
}

fn put_word<M: GuestMemory>(memory: &M, address: u64, word: u64) -> Result<(), LoadError> {
    put(memory, address, &word.to_le_bytes())
}

/// Makes all of a machine's RAM zeros, as it was when the machine began. Pages that are zeros are left alone.
///
/// # Errors
/// [`LoadError::Tables`] when `parts` are not RAM.
pub fn forget<M: GuestMemory>(
    memory: &M,
    parts: impl IntoIterator<Item = (u64, u64)>,
) -> Result<(), LoadError> {
    let mut page = [0; 4096];
    for (start, bytes) in parts {
        for at in (start..start + bytes).step_by(page.len()) {
            memory
                .read_slice(&mut page, GuestAddress(at))
                .map_err(|_| LoadError::Tables)?;
            if page != [0; 4096] {
                put(memory, at, &[0; 4096])?;
            }
        }
    }
    Ok(())
}

/// Zeros from `from` up to `to`.
fn fill_zero<M: GuestMemory>(memory: &M, from: u64, to: u64) -> Result<(), LoadError> {
    let zeros = [0; 4096];
    let mut at = from;
    while at < to {
        let piece = usize::try_from(to - at).unwrap_or(usize::MAX).min(zeros.len());
        put(memory, at, &zeros[..piece])?;
        at += piece as u64;
    }
    Ok(())
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
