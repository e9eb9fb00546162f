//! Calculations that live in registers alone, for long enough that checkpoints strike in their middle.
//!
//! One register of each kind takes part in every other's steps, and each of them in its: no step forgets a bit. Started
//! twice from the same values, a chain ends with the same values, unless a register was lost or changed on the way.

use core::arch::global_asm;
use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

use romulus_guest_core::random::Random;

/// General registers in the chain: all but rsp and rcx, which counts.
const GENERAL_WORDS: usize = 14;
/// Words of the sixteen 256-bit registers.
const YMM_WORDS: usize = 16 * 4;
/// Words of the thirty-two 512-bit registers, then of the mask registers k1 to k7.
const ZMM_WORDS: usize = 32 * 8 + 7;
/// Rounds of the longest stretch without a store: some ten microseconds.
const ROUNDS: u64 = 600;

global_asm!(
    ".section .text.chain, \"ax\"",
    "chain_general:",
    ".irp r, rbx, rbp, r12, r13, r14, r15, rdi",
    "  pushq %\\r",
    ".endr",
    "  movq %rsi, %rcx",
    ".set at, 0",
    ".irp r, rax, rbx, rdx, rsi, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rdi",
    "  movq at(%rdi), %\\r",
    "  .set at, at + 8",
    ".endr",
    "1:",
    ".irp r, rbx, rdx, rsi, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rdi",
    "  addq %rax, %\\r",
    "  rolq $7, %\\r",
    "  xorq %\\r, %rax",
    ".endr",
    "  decq %rcx",
    "  jnz 1b",
    "  popq %rcx",
    ".set at, 0",
    ".irp r, rax, rbx, rdx, rsi, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rdi",
    "  movq %\\r, at(%rcx)",
    "  .set at, at + 8",
    ".endr",
    ".irp r, r15, r14, r13, r12, rbp, rbx",
    "  popq %\\r",
    ".endr",
    "  retq",
    "chain_ymm:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "  vmovdqu 32*\\n(%rdi), %ymm\\n",
    ".endr",
    "1:",
    ".irp n, 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "  vpaddq %ymm0, %ymm\\n, %ymm\\n",
    "  vpxor %ymm\\n, %ymm0, %ymm0",
    ".endr",
    "  decq %rsi",
    "  jnz 1b",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "  vmovdqu %ymm\\n, 32*\\n(%rdi)",
    ".endr",
    "  vzeroupper",
    "  retq",
    "chain_zmm:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "  vmovdqu64 64*\\n(%rdi), %zmm\\n",
    ".endr",
    ".irp n, 1,2,3,4,5,6,7",
    "  kmovq 2040+8*\\n(%rdi), %k\\n",
    ".endr",
    "1:",
    ".irp n, 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "  vpaddq %zmm0, %zmm\\n, %zmm\\n",
    "  vpxorq %zmm\\n, %zmm0, %zmm0",
    ".endr",
    ".irp n, 2,3,4,5,6,7",
    "  kaddq %k1, %k\\n, %k\\n",
    "  kxorq %k\\n, %k1, %k1",
    ".endr",
    "  decq %rsi",
    "  jnz 1b",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "  vmovdqu64 %zmm\\n, 64*\\n(%rdi)",
    ".endr",
    ".irp n, 1,2,3,4,5,6,7",
    "  kmovq %k\\n, 2040+8*\\n(%rdi)",
    ".endr",
    "  vzeroupper",
    "  retq",
    options(att_syntax)
);

unsafe extern "C" {
    /// Loads the words, calculates for so many rounds (at least one), stores them again. So do the others.
    fn chain_general(words: *mut u64, rounds: u64);
    fn chain_ymm(words: *mut u64, rounds: u64);
    fn chain_zmm(words: *mut u64, rounds: u64);
}

/// Which vector registers the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vectors {
    /// 128 bits only, which the program itself uses.
    Xmm,
    /// 256 bits (AVX2).
    Ymm,
    /// 512 bits and masks (AVX-512 F and BW).
    Zmm,
}

impl Vectors {
    /// Asks the processor, and the VMM which of its registers are switched on.
    pub fn detect() -> Self {
        const OSXSAVE: u32 = 1 << 27;
        const AVX2: u32 = 1 << 5;
        const AVX512_F_BW: u32 = 1 << 16 | 1 << 30;
        if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
            return Vectors::Xmm;
        }
        let features = __cpuid_count(7, 0).ebx;
        // SAFETY: the processor says that the instruction is switched on.
        let on = unsafe { xcr0() };
        if features & AVX512_F_BW == AVX512_F_BW && on & 0xe6 == 0xe6 {
            Vectors::Zmm
        } else if features & AVX2 != 0 && on & 0x6 == 0x6 {
            Vectors::Ymm
        } else {
            Vectors::Xmm
        }
    }
}

/// # Safety
/// The processor must have XGETBV switched on.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

/// Calculates twice in the general registers from values that follow from `seed`; the word that differs, if one does.
pub fn check_general(seed: u64) -> Option<usize> {
    // SAFETY: the words are as many as the chain loads and stores, and the rounds are not zero.
    twice::<GENERAL_WORDS>(seed, |words| unsafe {
        chain_general(words.as_mut_ptr(), 4 * ROUNDS)
    })
}

/// Calculates twice in all vector registers of the machine; the word that differs, if one does.
pub fn check_vectors(vectors: Vectors, seed: u64) -> Option<usize> {
    match vectors {
        Vectors::Xmm => None,
        // SAFETY: the words are as many as the chain loads and stores, and the machine has the registers.
        Vectors::Ymm => twice::<YMM_WORDS>(seed, |words| unsafe { chain_ymm(words.as_mut_ptr(), ROUNDS) }),
        // SAFETY: as above.
        Vectors::Zmm => twice::<ZMM_WORDS>(seed, |words| unsafe { chain_zmm(words.as_mut_ptr(), ROUNDS) }),
    }
}

/// A unit of countable work: some ten microseconds in the general registers, and one store of each.
pub fn work(words: &mut [u64; GENERAL_WORDS]) {
    // SAFETY: the words are as many as the chain loads and stores.
    unsafe { chain_general(words.as_mut_ptr(), ROUNDS) }
}

fn twice<const WORDS: usize>(seed: u64, chain: impl Fn(&mut [u64; WORDS])) -> Option<usize> {
    let mut random = Random::new(seed);
    let mut first = [0; WORDS];
    first.fill_with(|| random.number());
    let mut second = first;
    chain(&mut first);
    chain(&mut second);
    first.iter().zip(&second).position(|(a, b)| a != b)
}
