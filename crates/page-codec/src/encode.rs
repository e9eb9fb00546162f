//! Page → payload. Cheap probes come first; the expensive encoders run only when they promise something.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use romulus_types::PAGE_BYTES;

use crate::delta::Changes;
use crate::kind::{Kind, Page};

/// A delta of up to this many bytes is taken without trying LZ4: what LZ4 could save is not worth its time.
const DELTA_TAKEN_BYTES: usize = 1024;
/// An LZ4 payload must save at least this much over a raw page, or the time to unpack it is wasted.
const LZ4_SAVES_BYTES_MIN: usize = PAGE_BYTES / 16;
/// LZ4 of the XOR is tried when at least this many bytes did not change. Fewer, and the page itself packs as well.
const XOR_ZEROS_MIN: usize = PAGE_BYTES / 2;
/// The compressibility probe looks at every so-maniest byte: prime, so that it meets every offset in a structure.
const PROBE_STRIDE: usize = 17;
/// A sample with this many different bytes is taken for random: 241 random bytes have 156 ± 6 different values.
const PROBE_VALUES_MAX: u32 = 136;

/// Buffers that [`encode`] reuses from page to page: about 16 KiB, one for each encoding thread.
pub struct Scratch {
    xor: Box<Page>,
    packed: Vec<u8>,
    candidate: Vec<u8>,
    table: CompressTable,
}

impl Scratch {
    /// Allocates the buffers.
    pub fn new() -> Self {
        let bytes = get_maximum_output_size(PAGE_BYTES);
        Self {
            xor: Box::new([0; PAGE_BYTES]),
            packed: vec![0; bytes],
            candidate: vec![0; bytes],
            table: CompressTable::small(),
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Appends the cheapest payload found for `page` to `out`, at most [`PAYLOAD_BYTES_MAX`](crate::PAYLOAD_BYTES_MAX)
/// bytes, and tells its kind.
///
/// `previous` is the version that the other side has for certain, or `None` when nothing is known about it (which
/// is not the same as a page of zeros). The choice depends on nothing but the two pages.
pub fn encode(page: &Page, previous: Option<&Page>, scratch: &mut Scratch, out: &mut Vec<u8>) -> Kind {
    if is_zero(page) {
        return Kind::Zero;
    }
    let mut best = (Kind::Raw, PAGE_BYTES);
    let changes = previous.map(|previous| Changes::between(page, previous));
    if let Some(changes) = &changes {
        if changes.is_empty() {
            return Kind::Same;
        }
        if changes.payload_bytes() < best.1 {
            best = (Kind::Delta, changes.payload_bytes());
        }
    }
    if best.1 > DELTA_TAKEN_BYTES {
        best = scratch.pack(page, previous, best);
    }
    match best {
        (Kind::Delta, _) => changes.expect("a delta has a previous version").write(page, out),
        (Kind::XorLz4 | Kind::Lz4, bytes) => out.extend_from_slice(&scratch.packed[..bytes]),
        _ => out.extend_from_slice(page),
    }
    best.0
}

impl Scratch {
    /// Tries LZ4 where it may beat `best` by enough. The payload of the winner, if it is LZ4, is left in `packed`.
    fn pack(&mut self, page: &Page, previous: Option<&Page>, best: (Kind, usize)) -> (Kind, usize) {
        let mut best = best;
        if let Some(previous) = previous
            && xor_into(page, previous, &mut self.xor) >= XOR_ZEROS_MIN
        {
            let bytes = compress(&self.xor, &mut self.packed, &mut self.table);
            if bytes + LZ4_SAVES_BYTES_MIN <= best.1 {
                best = (Kind::XorLz4, bytes);
            }
        }
        // Where the XOR is packed to half a page, the page itself is unlikely to do better.
        if best.1 > PAGE_BYTES / 2 && looks_compressible(page) {
            let bytes = compress(page, &mut self.candidate, &mut self.table);
            if bytes + LZ4_SAVES_BYTES_MIN <= best.1 {
                std::mem::swap(&mut self.packed, &mut self.candidate);
                best = (Kind::Lz4, bytes);
            }
        }
        best
    }
}

fn compress(page: &Page, into: &mut [u8], table: &mut CompressTable) -> usize {
    compress_into_with_table(page, into, table).expect("the buffer holds LZ4's worst case")
}

/// Whether every byte is zero. Stops at the first line that is not.
pub(crate) fn is_zero(page: &Page) -> bool {
    let (lines, _) = page.as_chunks::<128>();
    lines
        .iter()
        .all(|line| line.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Writes the XOR of the two pages and counts its zero bytes.
fn xor_into(page: &Page, previous: &Page, xor: &mut Page) -> usize {
    for (byte, (new, old)) in xor.iter_mut().zip(page.iter().zip(previous)) {
        *byte = new ^ old;
    }
    // In runs short enough to be counted in bytes: that is what the compiler turns into vector code.
    let (runs, _) = xor.as_chunks::<128>();
    runs.iter()
        .map(|run| usize::from(run.iter().map(|byte| u8::from(*byte == 0)).sum::<u8>()))
        .sum()
}

/// Guesses from a sample whether LZ4 gains anything: random bytes (encrypted, compressed) have too many values.
fn looks_compressible(page: &Page) -> bool {
    let mut seen = [0u64; 4];
    for byte in page.iter().step_by(PROBE_STRIDE) {
        seen[usize::from(byte / 64)] |= 1 << (byte % 64);
    }
    seen.iter().map(|values| values.count_ones()).sum::<u32>() <= PROBE_VALUES_MAX
}
