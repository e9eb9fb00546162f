//! Any bytes at the sidecar's end of the attach protocol: no panic, bounded memory, and whatever is accepted is within its limits and
//! is written back as a message that is read the same.
//!
//! The first byte chooses: even, the rest is what comes over the socket; odd, it is the payload of a message whose kind is the next byte.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use romulus_fuzz::attach::{each_message, message};
use romulus_vmm_attach::proto::{DESCRIPTORS_MAX, Header, Reply, TEXT_BYTES_MAX};

/// The kinds of replies: a row, a refusal, an event.
const KINDS: [u16; 3] = [0x101, 0x1ff, 0x201];

fuzz_target!(|data: &[u8]| {
    match data {
        [mode, rest @ ..] if mode % 2 == 0 => each_message(rest, read),
        [_, choice, payload @ ..] => {
            let kind = KINDS[usize::from(choice / 16) % 3];
            let kind = if kind == KINDS[0] {
                kind + u16::from(choice % 16)
            } else {
                kind
            };
            each_message(&message(kind, payload), read);
        }
        _ => {}
    }
});

fn read(header: &Header, payload: &[u8]) {
    match Reply::decode(header, payload) {
        Ok(reply) => {
            assert!(reply.descriptors() <= DESCRIPTORS_MAX && !reply.name().is_empty());
            if let Reply::Welcome(welcome) = &reply {
                let machine = welcome.machine.as_ref();
                assert!(machine.is_none_or(|machine| machine.check().is_ok()));
            }
            if let Reply::Error(refusal) = &reply {
                assert!(refusal.text.len() <= TEXT_BYTES_MAX);
            }
            let again = reply
                .encode(header.number)
                .expect("what was short enough still is");
            each_message(&again, |header, payload| {
                assert_eq!(Reply::decode(header, payload).expect("it was accepted"), reply);
            });
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
