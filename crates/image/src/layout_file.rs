//! The file `layout`: whose image this is and how its memory is laid out.
//!
//! ```text
//!   offset size  field (little-endian)
//!        0    8  magic "RMLSIMG\0"
//!        8    4  version, 1
//!       12    4  length of the payload in bytes
//!       16    4  CRC-32 of bytes 0..16 and the payload
//!       20    …  payload: (VmId, RamLayout) in postcard's encoding
//! ```
//!
//! It is written last when an image is created: an image without it was never completed.

use romulus_types::{BLOCK_NAME_BYTES_MAX, BLOCKS_MAX, Digest, NAME_BYTES_MAX, RamLayout, VmId};
use xxhash_rust::xxh3::xxh3_128;

use crate::ImageError;
use crate::error::Named;
use crate::files::{FileName, Files};

const MAGIC: [u8; 8] = *b"RMLSIMG\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 20;
/// A name, and for each block a name, two lengths and a number, none over 10 bytes.
const PAYLOAD_BYTES_MAX: usize = NAME_BYTES_MAX + 20 + BLOCKS_MAX * (BLOCK_NAME_BYTES_MAX + 30);

/// Encodes the file.
pub(crate) fn encode(vm: &VmId, layout: &RamLayout) -> Vec<u8> {
    let payload = postcard::to_stdvec(&(vm, layout)).expect("names and numbers always have an encoding");
    assert!(
        payload.len() <= PAYLOAD_BYTES_MAX,
        "a valid layout fits in its limit"
    );
    let length = u32::try_from(payload.len()).expect("the limit fits in 32 bits");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    let crc = crc(&bytes, &payload);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&payload);
    bytes
}

/// Names a layout file in the commit slots.
pub(crate) fn digest(bytes: &[u8]) -> Digest {
    Digest(xxh3_128(bytes))
}

fn crc(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

/// Reads and checks the file; [`ImageError::LayoutDamaged`] when there is none.
pub(crate) fn read<F: Files>(files: &mut F) -> Result<(VmId, RamLayout, Digest), ImageError> {
    let file = FileName::Layout;
    let length = files
        .open(file)
        .named("open", file)?
        .ok_or(ImageError::LayoutDamaged)?;
    let length = usize::try_from(length).map_err(|_| ImageError::LayoutDamaged)?;
    if !(HEADER_BYTES..=HEADER_BYTES + PAYLOAD_BYTES_MAX).contains(&length) {
        return Err(ImageError::LayoutDamaged);
    }
    let mut bytes = vec![0; length];
    files.read_at(file, 0, &mut bytes).named("read", file)?;
    let (vm, layout) = decode(&bytes)?;
    Ok((vm, layout, digest(&bytes)))
}

fn decode(bytes: &[u8]) -> Result<(VmId, RamLayout), ImageError> {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let payload = &bytes[HEADER_BYTES..];
    if bytes[..8] != MAGIC || word(16) != crc(&bytes[..16], payload) {
        return Err(ImageError::LayoutDamaged);
    }
    if word(8) != VERSION {
        return Err(ImageError::Version {
            file: FileName::Layout,
            found: word(8),
            known: VERSION,
        });
    }
    let (parsed, rest): ((VmId, RamLayout), &[u8]) =
        postcard::take_from_bytes(payload).map_err(|_| ImageError::LayoutDamaged)?;
    if usize::try_from(word(12)) != Ok(payload.len()) || !rest.is_empty() {
        return Err(ImageError::LayoutDamaged);
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use romulus_types::RamBlock;

    fn sample() -> Vec<u8> {
        let block = RamBlock {
            name: "pc.ram".into(),
            bytes: 1 << 30,
        };
        encode(&VmId::new("web").unwrap(), &RamLayout::new(vec![block]).unwrap())
    }

    #[test]
    fn the_layout_reads_back_as_it_was_written() {
        let (vm, layout) = decode(&sample()).unwrap();
        assert_eq!((vm.as_str(), layout.bytes()), ("web", 1 << 30));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let good = sample();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(
                matches!(decode(&bytes), Err(ImageError::LayoutDamaged)),
                "bit {bit}"
            );
        }
        for length in HEADER_BYTES..good.len() {
            assert!(
                matches!(decode(&good[..length]), Err(ImageError::LayoutDamaged)),
                "length {length}"
            );
        }
    }

    #[test]
    fn the_largest_layout_fits_in_the_limit() {
        let blocks = (0..BLOCKS_MAX)
            .map(|i| RamBlock {
                name: format!("{i:0>255}"),
                bytes: 4096 << 24,
            })
            .collect();
        let layout = RamLayout::new(blocks).unwrap();
        let bytes = encode(&VmId::new("v".repeat(NAME_BYTES_MAX)).unwrap(), &layout);
        assert_eq!(decode(&bytes).unwrap().1, layout);
    }
}
