//! The console, and the ways in which a guest ends.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use romulus_guest_core::abi::{End, PORT_END, PORT_RESET, PORT_SERIAL, RESET_VALUE};

use crate::arch::{boot, port};
use crate::sync::Lock;

struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| port::write_u8(PORT_SERIAL, byte));
        Ok(())
    }
}

static SERIAL: Lock<Serial> = Lock::new(Serial);
static ENDED: AtomicBool = AtomicBool::new(false);

/// Writes a line to the console. Each byte is an exit of some 30 µs.
pub fn line(args: fmt::Arguments<'_>) {
    SERIAL.with(|serial| {
        // The serial port takes everything.
        let _ = serial.write_fmt(format_args!("{args}\n"));
    });
}

/// Ends the machine. The first reason that a vCPU gives is the one that counts.
pub fn end(how: End, why: fmt::Arguments<'_>) -> ! {
    if !ENDED.swap(true, Ordering::AcqRel) {
        line(why);
        port::write_u32(PORT_END, how as u32);
    }
    halt()
}

/// A self-check has found something wrong.
pub fn failed(vcpu: u32, why: fmt::Arguments<'_>) -> ! {
    end(
        End::SelfCheckFailed,
        format_args!("self-check failed on vCPU {vcpu}: {why}"),
    )
}

/// Resets the machine.
pub fn reset() -> ! {
    line(format_args!("reset"));
    port::write_u8(PORT_RESET, RESET_VALUE);
    halt()
}

fn halt() -> ! {
    loop {
        boot::idle(boot::interrupts());
    }
}
