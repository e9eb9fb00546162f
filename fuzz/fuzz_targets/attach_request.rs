//! Any bytes at the VMM's end of the attach protocol: no panic, bounded memory, and whatever is accepted is within its limits and is
//! written back as a message that is read the same.
//!
//! The first byte chooses: even, the rest is what comes over the socket; odd, it is the payload of a message whose kind is the next byte.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use romulus_fuzz::attach::{each_message, message};
use romulus_vmm_attach::proto::{DESCRIPTORS_MAX, Header, Request};

fuzz_target!(|data: &[u8]| {
    match data {
        [mode, rest @ ..] if mode % 2 == 0 => each_message(rest, read),
        [_, kind, payload @ ..] => each_message(&message(u16::from(*kind) % 16, payload), read),
        _ => {}
    }
});

fn read(header: &Header, payload: &[u8]) {
    match Request::decode(header, payload) {
        Ok(request) => {
            assert!(request.descriptors() <= DESCRIPTORS_MAX && !request.name().is_empty());
            let again = request
                .encode(header.number)
                .expect("what was short enough still is");
            each_message(&again, |header, payload| {
                assert_eq!(
                    Request::decode(header, payload).expect("it was accepted"),
                    request
                );
            });
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
