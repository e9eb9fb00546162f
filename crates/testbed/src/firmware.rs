//! A guest for QEMU on KVM that needs no kernel: 64 KiB of firmware that goes to ring 3 and writes the same pages again and again.
//!
//! ```text
//!   reset ─► 32 bits ─► 64 bits, 128 MiB mapped one to one ─► ring 3, at 0x10000:
//!     count: write a word into each of PAGES pages from 4 MiB on, STRIDE pages apart; read a word of each of READS pages from there;
//!            store count at 3 MiB; spin for a moment; count again
//! ```
//!
//! What stands in those pages tells whether memory is of one moment: with the count *n* the first of them have *n* and the others *n* - 1.
//! In ring 3 it runs at native speed wherever KVM does, also where KVM emulates ring 0. It lets no interrupt in, does no I/O and never halts.

/// Where the listing has the number of pages, the bytes from one to the next, and the number of those that are read.
const PAGES_AT: usize = 0xe6;
const STRIDE_AT: usize = 0xf0;
const READS_AT: usize = 0x100;
/// How often it spins after each count; about as many cycles.
const SPIN_AT: usize = 0x11e;
const SPIN: u32 = 1_000_000;
/// The processor's first instruction, 16 bytes before 4 GiB.
const RESET_AT: usize = 0xfff0;
/// Of the image.
pub const BYTES: usize = 0x1_0000;
/// Of the guest's memory; the page tables map as much.
pub const MEMORY_MIB: u64 = 128;
/// What has room between 4 MiB and the end of the memory.
pub const PAGES_MAX: u32 = 30_000;
/// Address of the 64 bits that count the rounds.
pub const COUNT_AT: u64 = 0x30_0000;
/// Address of the first page that is written to.
pub const WRITTEN_AT: u64 = 0x40_0000;
const PAGE_BYTES: u32 = 4096;

/// What the guest does in each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Pages that it writes to.
    pub pages: u32,
    /// From one of them to the next, in pages.
    pub stride: u32,
    /// Pages that it reads.
    pub reads: u32,
}

impl Payload {
    /// Writes to so many pages, one after the other.
    #[must_use]
    pub fn writes(pages: u32) -> Self {
        Self {
            pages,
            stride: 1,
            reads: 1,
        }
    }
}

/// The code, as an assembler makes it of what stands beside it.
const CODE: &[&[u8]] = &[
    // 16 bits: cli; lgdt cs:[gdtr]; cr0 |= 1; far jump to 8:f0018
    &[0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x68, 0x01],
    &[0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0],
    &[0x66, 0xea, 0x18, 0x00, 0x0f, 0x00, 0x08, 0x00],
    // 32 bits: ds, es, ss = 10
    &[0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0],
    // [1000] = 2007, [1004] = 0: the first level; [2000] = 3007, [2004] = 0: the second
    &[0xc7, 0x05, 0x00, 0x10, 0x00, 0x00, 0x07, 0x20, 0x00, 0x00],
    &[0xc7, 0x05, 0x04, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0xc7, 0x05, 0x00, 0x20, 0x00, 0x00, 0x07, 0x30, 0x00, 0x00],
    &[0xc7, 0x05, 0x04, 0x20, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00],
    // edi = 3000; eax = 87 (user, writable, 2 MiB); ecx = 64
    &[0xbf, 0x00, 0x30, 0x00, 0x00, 0xb8, 0x87, 0x00, 0x00, 0x00],
    &[0xb9, 0x40, 0x00, 0x00, 0x00],
    // 1: [edi] = eax; [edi + 4] = 0; eax += 200000; edi += 8; ecx -= 1; jnz 1
    &[0x89, 0x07, 0xc7, 0x47, 0x04, 0x00, 0x00, 0x00, 0x00],
    &[0x05, 0x00, 0x00, 0x20, 0x00, 0x83, 0xc7, 0x08, 0x49, 0x75, 0xec],
    // cr3 = 1000; cr4 |= PAE; efer |= LME, SCE; cr0 |= PG; far jump to 18:f009e
    &[0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8],
    &[0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0],
    &[0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32],
    &[0x0d, 0x01, 0x01, 0x00, 0x00, 0x0f, 0x30],
    &[0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0],
    &[0xea, 0x9e, 0x00, 0x0f, 0x00, 0x18, 0x00],
    // 64 bits: rsp = 90000; rsi = ring3; rdi = 10000; ecx = its length
    &[0x48, 0xc7, 0xc4, 0x00, 0x00, 0x09, 0x00],
    &[0x48, 0x8d, 0x35, 0x2f, 0x00, 0x00, 0x00],
    &[0x48, 0xc7, 0xc7, 0x00, 0x00, 0x01, 0x00],
    &[0xb9, 0x4d, 0x00, 0x00, 0x00],
    // 2: al = [rsi]; [rdi] = al; rsi += 1; rdi += 1; ecx -= 1; jnz 2
    &[0x8a, 0x06, 0x88, 0x07, 0x48, 0xff, 0xc6, 0x48, 0xff, 0xc7],
    &[0xff, 0xc9, 0x75, 0xf2],
    // push ss 2b, rsp 80000, flags 3002, cs 33, rip 10000; iretq
    &[
        0x6a, 0x2b, 0x68, 0x00, 0x00, 0x08, 0x00, 0x68, 0x02, 0x30, 0x00, 0x00,
    ],
    &[0x6a, 0x33, 0x68, 0x00, 0x00, 0x01, 0x00, 0x48, 0xcf],
    // ring3: r8 = 0; 3: rdi = 400000; ecx = PAGES
    &[0x4d, 0x31, 0xc0, 0x48, 0xc7, 0xc7, 0x00, 0x00, 0x40, 0x00],
    &[0xb9, 0x00, 0x00, 0x00, 0x00],
    // 4: [rdi] = r8; rdi += STRIDE; ecx -= 1; jnz 4
    &[0x4c, 0x89, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x00, 0x00, 0x00],
    &[0xff, 0xc9, 0x75, 0xf2],
    // rdi = 400000; ecx = READS; 6: rax = [rdi]; rdi += 4096; ecx -= 1; jnz 6
    &[
        0x48, 0xc7, 0xc7, 0x00, 0x00, 0x40, 0x00, 0xb9, 0x00, 0x00, 0x00, 0x00,
    ],
    &[0x48, 0x8b, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00],
    &[0xff, 0xc9, 0x75, 0xf2],
    // r8 += 1; [300000] = r8; ecx = SPIN; 5: ecx -= 1; jnz 5; jmp 3
    &[0x49, 0xff, 0xc0, 0x4c, 0x89, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00],
    &[0xb9, 0x00, 0x00, 0x00, 0x00, 0xff, 0xc9, 0x75, 0xfc],
    &[0xeb, 0xb6],
];
/// Null, 32-bit code and data, 64-bit code, null, data and 64-bit code of ring 3; then where they are, for lgdt.
const DESCRIPTORS: [u64; 7] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00af_9b00_0000_ffff,
    0,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];
const DESCRIPTORS_AT: usize = 0x130;

/// The image of a guest that does this, for `-bios`, with [`MEMORY_MIB`].
#[must_use]
pub fn image(payload: Payload) -> Vec<u8> {
    let mut image: Vec<u8> = CODE.concat();
    assert!(
        image.len() <= DESCRIPTORS_AT,
        "the code ends before the descriptors"
    );
    image.resize(BYTES, 0);
    let filled = [
        (PAGES_AT, payload.pages),
        (STRIDE_AT, payload.stride * PAGE_BYTES),
        (READS_AT, payload.reads),
        (SPIN_AT, SPIN),
    ];
    for (at, value) in filled {
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    let descriptors: Vec<u8> = DESCRIPTORS.iter().flat_map(|one| one.to_le_bytes()).collect();
    image[DESCRIPTORS_AT..DESCRIPTORS_AT + descriptors.len()].copy_from_slice(&descriptors);
    // The limit, and the address: the firmware is also below 1 MiB.
    let place = [0x37, 0x00, 0x30, 0x01, 0x0f, 0x00];
    image[DESCRIPTORS_AT + descriptors.len()..][..place.len()].copy_from_slice(&place);
    // jmp f000:0
    image[RESET_AT..RESET_AT + 5].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_filled_in_is_where_the_instructions_have_it() {
        let image = image(Payload {
            pages: 500,
            stride: 3,
            reads: 7,
        });
        assert_eq!(image.len(), BYTES);
        // add rdi, 0x3000 and mov ecx, 7
        assert_eq!(
            image[STRIDE_AT - 3..STRIDE_AT + 4],
            [0x48, 0x81, 0xc7, 0x00, 0x30, 0x00, 0x00]
        );
        assert_eq!(image[READS_AT - 1..READS_AT + 4], [0xb9, 0x07, 0x00, 0x00, 0x00]);
        // mov ecx, 500 and mov ecx, 1000000
        assert_eq!(image[PAGES_AT - 1..PAGES_AT + 4], [0xb9, 0xf4, 0x01, 0x00, 0x00]);
        assert_eq!(image[SPIN_AT - 1..SPIN_AT + 4], [0xb9, 0x40, 0x42, 0x0f, 0x00]);
        // lgdt's operand is where the limit is.
        assert_eq!(image[6..8], [0x68, 0x01]);
        assert_eq!(image[0x168..0x16e], [0x37, 0x00, 0x30, 0x01, 0x0f, 0x00]);
        // The far jumps' targets begin as the listing says.
        assert_eq!(image[0x18..0x1a], [0x66, 0xb8]);
        assert_eq!(image[0x9e..0xa1], [0x48, 0xc7, 0xc4]);
        // What is copied to 0x10000 begins with r8 = 0, and the jump back goes to 3.
        assert_eq!(image[0xdb..0xde], [0x4d, 0x31, 0xc0]);
        let jump = 0x126;
        assert_eq!(image[jump], 0xeb);
        let back = i32::from(image[jump + 1].cast_signed());
        assert_eq!(i32::try_from(jump).unwrap() + 2 + back, 0xde);
    }
}
