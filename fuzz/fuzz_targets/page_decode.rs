//! Any payload at the page decoder: no panic, and a page that comes out can be encoded and decoded again.
//!
//! Bytes of the input: the kind, what the previous version is (0: there is none), the payload.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use romulus_page_codec::{PAYLOAD_BYTES_MAX, Page, Scratch, decode, encode};
use romulus_types::PAGE_BYTES;

fn previous_version(seed: u8) -> Option<Page> {
    let multiplier = usize::from(seed);
    (seed > 0).then(|| std::array::from_fn(|i| (i / 16 * multiplier).to_le_bytes()[0]))
}

fuzz_target!(|data: &[u8]| {
    let [kind, seed, payload @ ..] = data else { return };
    let previous = previous_version(*seed);
    let mut page = [0xaa; PAGE_BYTES];
    if let Err(error) = decode(*kind, payload, previous.as_ref(), &mut page) {
        assert!(!error.to_string().is_empty());
        return;
    }
    let mut encoded = Vec::new();
    let kind = encode(&page, previous.as_ref(), &mut Scratch::new(), &mut encoded);
    assert!(encoded.len() <= PAYLOAD_BYTES_MAX);
    let mut again = [0x55; PAGE_BYTES];
    decode(kind.number(), &encoded, previous.as_ref(), &mut again).expect("what was encoded decodes");
    assert!(again == page, "{kind:?} changed the page");
});
