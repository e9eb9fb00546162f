//! Port output.

use core::arch::asm;

/// Writes a byte to a port.
pub fn write_u8(port: u16, value: u8) {
    // SAFETY: the instruction touches no memory of the program; what the VMM does with it is the contract's.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Writes a double word to a port.
pub fn write_u32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}
