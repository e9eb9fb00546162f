//! What the test VMM and its guest agree on: where things lie in guest memory, the image's header, the boot information.
//!
//! Everything the VMM writes lies in guest memory under 2 MiB, so that a checkpoint carries it like the rest:
//!
//! ```text
//!   0x1000 PML4   0x2000 PDPT   0x3000..0x7000 PDs of 0-4 GiB (2 MiB pages, identity)
//!   0x8000 GDT    0x9000 IDT    0xc000 interrupt counters, total, fault record, progress
//!   0xd000 kvmclock, 64 bytes a vCPU     0xe000 BootInfo     0xf000 command line
//!   0x10000 TSS of each vCPU, 0x4000 apart     0x60000 ring-0 stacks, 0x1000 each
//!   0x70000..0x200000 PDs of the RAM over 4 GiB, one a GiB
//!   0x200000 ring-3 stacks, 0x40000 each       0x400000 the guest's image, then what it allocates
//! ```
//!
//! The guest enters at [`ImageHeader::entry`] on every vCPU at once, in ring 3, with rdi = vCPU number, rsi = address of
//! [`BootInfo`], rsp = [`user_stack_top`]. All numbers are little-endian. Both sides are built from this file; the magic
//! and the version still stand in both structures, so that a guest handed in as a file is refused by name.

use core::fmt;

/// Version of this contract. A guest of another version is refused.
pub const ABI_VERSION: u32 = 1;
/// Most vCPUs that the layout has room for.
pub const VCPUS_MAX: u32 = 4;
/// Most devices that [`BootInfo`] can name.
pub const DEVICES_MAX: usize = 4;
/// Where low RAM must end: from here to 4 GiB are devices and the local APIC.
pub const RAM_LOW_END: u64 = 0xc000_0000;
/// Where RAM that did not fit under the hole goes on.
pub const RAM_HIGH_START: u64 = 0x1_0000_0000;
/// Least RAM with which the guest starts, in bytes.
pub const RAM_BYTES_MIN: u64 = 32 << 20;
/// Most RAM over 4 GiB for which there is room for page tables, in bytes.
pub const RAM_HIGH_BYTES_MAX: u64 = ((HIGH_PDS_END - HIGH_PDS) / 0x1000) << 30;

/// Page table of the first level.
pub const PML4: u64 = 0x1000;
/// Page table of the second level, the only one.
pub const PDPT: u64 = 0x2000;
/// Page directories of the first 4 GiB, 0x1000 each.
pub const LOW_PDS: u64 = 0x3000;
/// Page directories of the RAM over 4 GiB, 0x1000 a GiB.
pub const HIGH_PDS: u64 = 0x7_0000;
/// End of the room for [`HIGH_PDS`].
pub const HIGH_PDS_END: u64 = 0x20_0000;
/// Flags of a page directory's entry: present, writable, user, 2 MiB.
pub const PDE_FLAGS: u64 = 0x87;
/// Flags of an entry above a page directory: present, writable, user.
pub const TABLE_FLAGS: u64 = 0x7;
/// Segment descriptors.
pub const GDT: u64 = 0x8000;
/// Interrupt gates: 256, from the image's handlers, ring 0, DPL 3.
pub const IDT: u64 = 0x9000;
/// Ring-0 code selector.
pub const KERNEL_CODE: u16 = 0x10;
/// Data selector, ring 3.
pub const USER_DATA: u16 = 0x2b;
/// Code selector, ring 3, 64 bits.
pub const USER_CODE: u16 = 0x33;
/// Selector of vCPU 0's task state; each further vCPU's is 0x10 higher.
pub const TSS_SELECTOR: u16 = 0x40;
/// Interrupts taken, one u64 a vector.
pub const IRQ_COUNTERS: u64 = 0xc000;
/// Interrupts taken, of all vectors together, u64.
pub const IRQ_TOTAL: u64 = 0xc800;
/// What an exception leaves behind: vector, error code, rip, cr2, rsp of ring 3; each u64.
pub const FAULT_RECORD: u64 = 0xc900;
/// Where [`Progress`] is kept.
pub const PROGRESS: u64 = 0xcb00;
/// kvmclock areas, one a vCPU.
pub const KVMCLOCK: u64 = 0xd000;
/// Distance of two vCPUs' kvmclock areas, in bytes.
pub const KVMCLOCK_STRIDE: u64 = 64;
/// Where [`BootInfo`] lies.
pub const BOOT_INFO: u64 = 0xe000;
/// Where the command line lies.
pub const CMDLINE: u64 = 0xf000;
/// Longest command line, in bytes, without the NUL that ends it.
pub const CMDLINE_BYTES_MAX: usize = 4095;
/// Task state segments.
pub const TSS: u64 = 0x1_0000;
/// Distance of two task states, in bytes.
pub const TSS_STRIDE: u64 = 0x4000;
/// Offset of the I/O permission bitmap (8 KiB of zeros, then 0xff) in a task state.
pub const TSS_IO_BITMAP: u64 = 0x68;
/// Limit of a task state, with its I/O permission bitmap.
pub const TSS_LIMIT: u32 = 0x2068;
/// Ring-0 stacks, 0x1000 bytes each.
pub const KERNEL_STACKS: u64 = 0x6_0000;
/// Ring-3 stacks.
pub const USER_STACKS: u64 = 0x20_0000;
/// Size of a ring-3 stack, in bytes.
pub const USER_STACK_BYTES: u64 = 0x4_0000;
/// Where the guest's image is loaded, and its [`ImageHeader`] lies.
pub const IMAGE: u64 = 0x40_0000;

/// Base of the first virtio-mmio device.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Distance of two virtio-mmio devices, in bytes.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Interrupt vector of the first virtio device; the next ones follow. They go to vCPU 0.
pub const DEVICE_VECTOR: u8 = 0x30;
/// Interrupt vector of vCPU 0's local timer; the next vCPUs' follow.
pub const TIMER_VECTOR: u8 = 0x20;
/// The local APIC, as the kernel's irqchip has it.
pub const LAPIC: u64 = 0xfee0_0000;

/// Port that takes a byte of the console.
pub const PORT_SERIAL: u16 = 0x3f8;
/// Port that ends the machine: a u32, one of [`End`].
pub const PORT_END: u16 = 0xf4;
/// Port that resets the machine, when [`RESET_VALUE`] is written as a byte.
pub const PORT_RESET: u16 = 0xcf9;
/// What to write to [`PORT_RESET`].
pub const RESET_VALUE: u8 = 6;

/// Ring-0 stack of a vCPU at an interrupt (`rsp0` of its task state).
#[must_use]
pub const fn kernel_stack_top(vcpu: u32) -> u64 {
    KERNEL_STACKS + (vcpu as u64 + 1) * 0x1000
}

/// Ring-3 stack of a vCPU at entry: 8 off a multiple of 16, as after a call.
#[must_use]
pub const fn user_stack_top(vcpu: u32) -> u64 {
    USER_STACKS + (vcpu as u64 + 1) * USER_STACK_BYTES - 8
}

/// How a guest says that it has ended, written to [`PORT_END`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum End {
    /// It was asked to power off.
    PowerOff = 0,
    /// A self-check found something wrong; the console says what.
    SelfCheckFailed = 1,
    /// It panicked; the console says where.
    Panic = 2,
    /// An exception that it has no answer to; see [`FAULT_RECORD`].
    Fault = 3,
}

impl End {
    /// The end that a number stands for.
    #[must_use]
    pub const fn from_code(code: u32) -> Option<End> {
        match code {
            0 => Some(End::PowerOff),
            1 => Some(End::SelfCheckFailed),
            2 => Some(End::Panic),
            3 => Some(End::Fault),
            _ => None,
        }
    }
}

/// Why an image or boot information was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbiError {
    /// Fewer bytes than the structure has.
    Short {
        /// Bytes that the structure has.
        want: usize,
        /// Bytes that were given.
        got: usize,
    },
    /// It does not begin with the magic number.
    Magic(u64),
    /// It was built for another version of this contract.
    Version(u32),
    /// A count is beyond its limit.
    Limit {
        /// What is counted.
        what: &'static str,
        /// The count.
        got: u64,
        /// Its limit.
        max: u64,
    },
}

impl fmt::Display for AbiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AbiError::Short { want, got } => {
                write!(f, "{got} bytes where {want} are needed: not a guest of this VMM")
            }
            AbiError::Magic(magic) => write!(f, "the magic number is {magic:#x}: not a guest of this VMM"),
            AbiError::Version(version) => {
                write!(
                    f,
                    "built for version {version}, this is version {ABI_VERSION}: build guest and VMM together"
                )
            }
            AbiError::Limit { what, got, max } => write!(f, "{got} {what}, at most {max} are possible"),
        }
    }
}

impl core::error::Error for AbiError {}

/// What stands at the very start of the guest's image, at [`IMAGE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageHeader {
    /// Address at which every vCPU enters.
    pub entry: u64,
    /// Address of the ring-0 handler of each interrupt vector.
    pub handlers: [u64; 256],
}

impl ImageHeader {
    /// First eight bytes of an image, `ROMGUEST` in memory.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"ROMGUEST");
    /// Size in the image, in bytes: magic, version, padding, entry, handlers.
    pub const BYTES: usize = 8 + 4 + 4 + 8 + 256 * 8;

    /// Reads the header from the first bytes of an image.
    ///
    /// # Errors
    /// [`AbiError`] when these are not the first bytes of a guest of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AbiError> {
        let mut fields = Fields::new(bytes, Self::BYTES)?;
        fields.expect(Self::MAGIC)?;
        fields.u32();
        let entry = fields.u64();
        let mut handlers = [0; 256];
        handlers.fill_with(|| fields.u64());
        Ok(ImageHeader { entry, handlers })
    }
}

/// A virtio-mmio device of the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Device {
    /// What it is, by virtio's number: 1 network, 2 block.
    pub virtio_id: u32,
    /// Interrupt vector that it raises at vCPU 0.
    pub vector: u32,
    /// Address of its registers.
    pub mmio: u64,
    /// Interrupt line by the VMM's numbering; of no use to the guest.
    pub gsi: u32,
}

/// What the VMM tells the guest, at [`BOOT_INFO`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootInfo {
    /// vCPUs that enter.
    pub vcpus: u32,
    /// RAM from address 0, in bytes.
    pub ram_low_bytes: u64,
    /// RAM from 4 GiB, in bytes.
    pub ram_high_bytes: u64,
    /// Ticks of the time stamp counter in a millisecond.
    pub tsc_khz: u64,
    /// Address of vCPU 0's kvmclock area; the others are [`KVMCLOCK_STRIDE`] apart.
    pub kvmclock: u64,
    /// Address of the command line.
    pub cmdline: u64,
    /// Its length in bytes.
    pub cmdline_bytes: u32,
    devices: [Device; DEVICES_MAX],
    device_count: u32,
}

impl BootInfo {
    /// First eight bytes, `ROMBOOT1` in memory.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"ROMBOOT1");
    /// Size in memory, in bytes.
    pub const BYTES: usize = 64 + DEVICES_MAX * 24;

    /// Boot information of a machine.
    ///
    /// # Errors
    /// [`AbiError::Limit`] when the layout has no room for it.
    pub fn new(
        vcpus: u32,
        ram_low_bytes: u64,
        ram_high_bytes: u64,
        tsc_khz: u64,
        cmdline_bytes: u32,
        devices: &[Device],
    ) -> Result<Self, AbiError> {
        within("devices", devices.len() as u64, DEVICES_MAX as u64)?;
        let mut table = [Device::default(); DEVICES_MAX];
        table[..devices.len()].copy_from_slice(devices);
        let info = BootInfo {
            vcpus,
            ram_low_bytes,
            ram_high_bytes,
            tsc_khz,
            kvmclock: KVMCLOCK,
            cmdline: CMDLINE,
            cmdline_bytes,
            devices: table,
            device_count: u32::try_from(devices.len()).unwrap_or(u32::MAX),
        };
        info.check()
    }

    /// The machine's devices.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices[..self.device_count as usize]
    }

    /// What to write at [`BOOT_INFO`].
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&Self::MAGIC.to_le_bytes());
        put(&ABI_VERSION.to_le_bytes());
        put(&self.vcpus.to_le_bytes());
        put(&self.ram_low_bytes.to_le_bytes());
        put(&self.ram_high_bytes.to_le_bytes());
        put(&self.tsc_khz.to_le_bytes());
        put(&self.kvmclock.to_le_bytes());
        put(&self.cmdline.to_le_bytes());
        put(&self.cmdline_bytes.to_le_bytes());
        put(&self.device_count.to_le_bytes());
        for device in &self.devices {
            put(&device.virtio_id.to_le_bytes());
            put(&device.vector.to_le_bytes());
            put(&device.mmio.to_le_bytes());
            put(&device.gsi.to_le_bytes());
            put(&[0; 4]);
        }
        bytes
    }

    /// Reads what a VMM has written.
    ///
    /// # Errors
    /// [`AbiError`] when it is not boot information of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AbiError> {
        let mut fields = Fields::new(bytes, Self::BYTES)?;
        fields.expect(Self::MAGIC)?;
        let vcpus = fields.u32();
        let ram_low_bytes = fields.u64();
        let ram_high_bytes = fields.u64();
        let tsc_khz = fields.u64();
        let kvmclock = fields.u64();
        let cmdline = fields.u64();
        let cmdline_bytes = fields.u32();
        let device_count = fields.u32();
        let mut devices = [Device::default(); DEVICES_MAX];
        devices.fill_with(|| {
            let (virtio_id, vector) = (fields.u32(), fields.u32());
            let (mmio, gsi) = (fields.u64(), fields.u32());
            fields.u32();
            Device {
                virtio_id,
                vector,
                mmio,
                gsi,
            }
        });
        let info = BootInfo {
            vcpus,
            ram_low_bytes,
            ram_high_bytes,
            tsc_khz,
            kvmclock,
            cmdline,
            cmdline_bytes,
            devices,
            device_count,
        };
        info.check()
    }

    fn check(self) -> Result<Self, AbiError> {
        within("vCPUs", self.vcpus.into(), VCPUS_MAX.into())?;
        within("devices", self.device_count.into(), DEVICES_MAX as u64)?;
        within("bytes of RAM under the hole", self.ram_low_bytes, RAM_LOW_END)?;
        within("bytes of RAM over 4 GiB", self.ram_high_bytes, RAM_HIGH_BYTES_MAX)?;
        within(
            "bytes of command line",
            self.cmdline_bytes.into(),
            CMDLINE_BYTES_MAX as u64,
        )?;
        Ok(self)
    }
}

/// What the guest has done so far, at [`PROGRESS`]; written every millisecond when the command line says `progress=on`.
///
/// In memory: magic, sequence (odd while it is being written), then these fields in this order, each a u64.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Units of arithmetic that were done because of `work=on`.
    pub work_units: u64,
    /// Pages that the dirtier has written.
    pub pages_written: u64,
    /// Periods that the dirtier has completed.
    pub dirty_rounds: u64,
    /// kvmclock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// The time stamp counter at the same moment.
    pub tsc: u64,
}

impl Progress {
    /// First eight bytes, `RMLSPROG` in memory.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"RMLSPROG");
    /// Size in memory, in bytes.
    pub const BYTES: usize = 56;

    /// Reads a copy of the record; `None` when there is none, or it was being written: copy it again.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields { bytes };
        let (magic, sequence) = (fields.u64(), fields.u64());
        if magic != Self::MAGIC || sequence % 2 == 1 {
            return None;
        }
        Some(Progress {
            work_units: fields.u64(),
            pages_written: fields.u64(),
            dirty_rounds: fields.u64(),
            kvmclock_ns: fields.u64(),
            tsc: fields.u64(),
        })
    }

    /// The fields as they lie in memory.
    #[must_use]
    pub fn fields(&self) -> [u64; 5] {
        [
            self.work_units,
            self.pages_written,
            self.dirty_rounds,
            self.kvmclock_ns,
            self.tsc,
        ]
    }
}

fn within(what: &'static str, got: u64, max: u64) -> Result<(), AbiError> {
    if got > max {
        Err(AbiError::Limit { what, got, max })
    } else {
        Ok(())
    }
}

/// Takes little-endian fields from bytes whose number was checked.
struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8], want: usize) -> Result<Self, AbiError> {
        match bytes.get(..want) {
            Some(bytes) => Ok(Fields { bytes }),
            None => Err(AbiError::Short {
                want,
                got: bytes.len(),
            }),
        }
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self
            .bytes
            .split_first_chunk()
            .expect("the structure's size covers its fields");
        self.bytes = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// Magic number and version, with which every structure begins.
    fn expect(&mut self, magic: u64) -> Result<(), AbiError> {
        let got = self.u64();
        if got != magic {
            return Err(AbiError::Magic(got));
        }
        match self.u32() {
            ABI_VERSION => Ok(()),
            other => Err(AbiError::Version(other)),
        }
    }
}

#[cfg(test)]
mod tests;
