//! Any line at the QMP parser: no panic, and an event's time never overflows.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use romulus_hypervisor::qemu::qmp::{QmpLine, parse_line};

fuzz_target!(|data: &[u8]| {
    match parse_line(data) {
        Ok(QmpLine::Event(event)) => assert!(event.at_us() >= event.seconds.min(1)),
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
