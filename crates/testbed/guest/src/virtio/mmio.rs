//! The mmio transport: finding a device and agreeing with it.

use core::fmt;

use romulus_guest_core::abi::Device;

use crate::virtio::queue::Queue;

const MAGIC: usize = 0x00;
const VERSION: usize = 0x04;
const DEVICE_ID: usize = 0x08;
const DEVICE_FEATURES: usize = 0x10;
const DEVICE_FEATURES_SELECT: usize = 0x14;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SELECT: usize = 0x24;
const QUEUE_SELECT: usize = 0x30;
const QUEUE_SIZE_MAX: usize = 0x34;
const QUEUE_SIZE: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
const QUEUE_DESCRIPTORS: usize = 0x80;
const QUEUE_AVAILABLE: usize = 0x90;
const QUEUE_USED: usize = 0xa0;
const CONFIG: usize = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const VERSION_1: u64 = 1 << 32;

/// A device that does not do as the specification says.
#[derive(Debug, Clone, Copy)]
pub struct NoDevice {
    what: &'static str,
    got: u64,
}

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "virtio device: {} is {:#x}", self.what, self.got)
    }
}

/// A device's registers.
#[derive(Debug, Clone, Copy)]
pub struct Registers {
    base: u64,
}

impl Registers {
    /// Resets the device and agrees on features: those of `wanted` that it offers, and version 1.
    ///
    /// # Errors
    /// [`NoDevice`] when it is not such a device.
    pub fn negotiate(device: &Device, wanted: u64) -> Result<(Self, u64), NoDevice> {
        let this = Registers { base: device.mmio };
        this.expect("the magic number", MAGIC, u32::from_le_bytes(*b"virt"))?;
        this.expect("the version", VERSION, 2)?;
        this.expect("the device's number", DEVICE_ID, device.virtio_id)?;
        this.write(STATUS, 0);
        this.write(STATUS, ACKNOWLEDGE);
        this.write(STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in [0, 1] {
            this.write(DEVICE_FEATURES_SELECT, half);
            offered |= u64::from(this.read(DEVICE_FEATURES)) << (32 * half);
        }
        if offered & VERSION_1 == 0 {
            return Err(NoDevice {
                what: "the set of features, without version 1,",
                got: offered,
            });
        }
        let taken = offered & (wanted | VERSION_1);
        for (half, bits) in [(0, taken & 0xffff_ffff), (1, taken >> 32)] {
            this.write(DRIVER_FEATURES_SELECT, half);
            this.write(DRIVER_FEATURES, u32::try_from(bits).unwrap_or(0));
        }
        this.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        this.expect("the status", STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        Ok((this, taken))
    }

    /// Tells the device where its next queue lies.
    ///
    /// # Errors
    /// [`NoDevice`] when it does not take so long a queue.
    pub fn add_queue(&self, number: u32, queue: &Queue) -> Result<(), NoDevice> {
        self.write(QUEUE_SELECT, number);
        let max = self.read(QUEUE_SIZE_MAX);
        if max < u32::from(queue.size()) {
            return Err(NoDevice {
                what: "the longest queue",
                got: max.into(),
            });
        }
        self.write(QUEUE_SIZE, queue.size().into());
        let parts = [QUEUE_DESCRIPTORS, QUEUE_AVAILABLE, QUEUE_USED];
        for (register, address) in parts.into_iter().zip(queue.addresses()) {
            self.write(register, u32::try_from(address & 0xffff_ffff).unwrap_or(0));
            self.write(register + 4, u32::try_from(address >> 32).unwrap_or(0));
        }
        self.write(QUEUE_READY, 1);
        Ok(())
    }

    /// Says that the driver is ready.
    pub fn go(&self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Rings the bell of a queue.
    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// A byte of the device's configuration.
    pub fn config_u8(&self, offset: u64) -> u8 {
        // SAFETY: the device's registers are mapped and no memory of the program's.
        unsafe { ((self.base + CONFIG as u64 + offset) as *const u8).read_volatile() }
    }

    /// A double word of the device's configuration.
    pub fn config_u32(&self, offset: u64) -> u32 {
        // SAFETY: as above.
        unsafe { ((self.base + CONFIG as u64 + offset) as *const u32).read_volatile() }
    }

    fn expect(&self, what: &'static str, register: usize, want: u32) -> Result<(), NoDevice> {
        let got = self.read(register);
        if got == want {
            Ok(())
        } else {
            Err(NoDevice {
                what,
                got: got.into(),
            })
        }
    }

    fn read(&self, register: usize) -> u32 {
        // SAFETY: the device's registers are mapped and no memory of the program's.
        unsafe { ((self.base + register as u64) as *const u32).read_volatile() }
    }

    fn write(&self, register: usize, value: u32) {
        // SAFETY: as above; what the device does to memory is what the queues allow it.
        unsafe { ((self.base + register as u64) as *mut u32).write_volatile(value) }
    }
}
