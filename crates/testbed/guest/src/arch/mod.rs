//! The bare machine: entry and ring-0 stubs, ports, the local timer, the clock, and the registers that are checked.

pub mod boot;
pub mod chain;
pub mod clock;
pub mod lapic;
pub mod mem;
pub mod port;
pub mod registers;
