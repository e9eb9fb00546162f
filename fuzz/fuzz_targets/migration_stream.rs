//! Any bytes at the reader of QEMU's migration stream: no panic, progress with every item, pages inside their blocks.
//! Given in two pieces the stream reads the same as given at once.
//!
//! Bytes of the input: flags (bit 0: with addresses; bit 1: put a valid beginning in front), where to cut, the stream.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use romulus_hypervisor::qemu::stream::{
    Item, Reader, StreamError, device_sections, list_sections, vmdesc_at_end,
};
use romulus_types::PAGE_BYTES;

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04";

fn read(reader: &mut Reader, bytes: &[u8], items: &mut usize) -> Result<usize, StreamError> {
    let mut at = 0;
    while let Some((used, item)) = reader.step(&bytes[at..])? {
        match item {
            Item::Devices => break,
            Item::Page { block, offset, .. } => {
                assert!(offset + PAGE_BYTES as u64 <= reader.blocks()[block].bytes);
            }
            _ => {}
        }
        assert!(used > 0, "an item without bytes would be read for ever");
        *items += 1;
        at += used;
    }
    Ok(at)
}

fuzz_target!(|data: &[u8]| {
    let [flags, cut, rest @ ..] = data else { return };
    let with_gpa = flags & 1 != 0;
    let bytes = if flags & 2 != 0 {
        [HEAD, rest].concat()
    } else {
        rest.to_vec()
    };
    let mut at_once = 0;
    let whole = read(&mut Reader::new(with_gpa), &bytes, &mut at_once);
    let cut = usize::from(*cut).min(bytes.len());
    let mut reader = Reader::new(with_gpa);
    let mut in_pieces = 0;
    let first = read(&mut reader, &bytes[..cut], &mut in_pieces);
    let second = first.and_then(|at| read(&mut reader, &bytes[at..], &mut in_pieces).map(|more| at + more));
    assert_eq!(whole, second);
    assert_eq!(at_once, in_pieces);
    if let Some(mark) = vmdesc_at_end(&bytes) {
        assert!(mark + 5 < bytes.len());
    }
    if device_sections(&bytes).is_err() {
        assert!(list_sections(&bytes).is_err());
    }
});
