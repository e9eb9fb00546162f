//! The image's header, and the code that runs in ring 0: a few instructions for each interrupt, as ring 0 may be
//! emulated and slow.
//!
//! An interrupt is counted, ended and forgotten; the program finds the rest by looking at rings and counters. An
//! exception is written down and ends the machine, except for the one that [`idle`] makes on purpose.

use core::arch::{asm, global_asm};

use romulus_guest_core::abi::{
    ABI_VERSION, End, FAULT_RECORD, IRQ_COUNTERS, IRQ_TOTAL, LAPIC, PORT_END, TIMER_VECTOR, VCPUS_MAX,
};

/// What rax holds when an invalid instruction means "sleep": tells it from a real one.
const IDLE: u32 = u32::from_le_bytes(*b"IDLE");

global_asm!(
    ".section .header, \"a\"",
    ".ascii \"ROMGUEST\"",
    ".long {version}",
    ".long 0",
    ".quad guest_entry",
    ".set vector, 0",
    ".rept 256",
    ".quad ring0_stubs + 32 * vector",
    ".set vector, vector + 1",
    ".endr",

    ".section .text.ring0, \"ax\"",
    ".balign 32",
    "ring0_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 32",
    ".if vector == 6",
    "  jmp ring0_invalid",
    ".elseif vector < 32",
    // Some exceptions push an error code themselves: 8, 10 to 14, 17, 21, 29, 30.
    "  .if ((0x60227d00 >> vector) & 1) == 0",
    "  pushq $0",
    "  .endif",
    "  pushq $vector",
    "  jmp ring0_fault",
    ".elseif vector >= {timers} && vector < {timers} + {vcpus}",
    "  lock incq {counters} + 8 * vector",
    "  jmp ring0_timer",
    ".else",
    "  lock incq {counters} + 8 * vector",
    "  jmp ring0_interrupt",
    ".endif",
    ".set vector, vector + 1",
    ".endr",

    // A one-shot timer that has fired is taken back before its interrupt ends: a restore would let it fire again, as
    // the timer's registers do not say whether the interrupt has been delivered.
    ".balign 32",
    "ring0_timer:",
    "  pushq %rax",
    "  movl ${initial_count}, %eax",
    "  movl $0, (%rax)",
    "  popq %rax",
    "ring0_interrupt:",
    "  lock incq {total}",
    "  pushq %rax",
    "  movl ${eoi}, %eax",
    "  movl $0, (%rax)",
    "  popq %rax",
    "  iretq",

    // idle: rdi holds what the counter at rsi was when there was nothing to do. Interrupts are off between the
    // comparison and the halt, so none is slept through.
    ".balign 32",
    "ring0_invalid:",
    "  cmpq ${idle}, %rax",
    "  jne 2f",
    "  addq $2, (%rsp)",
    "  cmpq %rdi, (%rsi)",
    "  jne 1f",
    "  sti",
    "  hlt",
    "1: iretq",
    "2: pushq $0",
    "  pushq $6",

    "ring0_fault:",
    "  movq (%rsp), %rax",
    "  movq %rax, {fault}",
    "  movq 8(%rsp), %rax",
    "  movq %rax, {fault} + 8",
    "  movq 16(%rsp), %rax",
    "  movq %rax, {fault} + 16",
    "  movq %cr2, %rax",
    "  movq %rax, {fault} + 24",
    "  movq 40(%rsp), %rax",
    "  movq %rax, {fault} + 32",
    "  movl ${end_code}, %eax",
    "  movl ${end_port}, %edx",
    "3: outl %eax, %dx",
    "  hlt",
    "  jmp 3b",
    version = const ABI_VERSION,
    counters = const IRQ_COUNTERS,
    total = const IRQ_TOTAL,
    eoi = const LAPIC + 0xb0,
    initial_count = const LAPIC + 0x380,
    timers = const TIMER_VECTOR,
    vcpus = const VCPUS_MAX,
    idle = const IDLE,
    fault = const FAULT_RECORD,
    end_code = const End::Fault as u32,
    end_port = const PORT_END,
    options(att_syntax)
);

/// Interrupts taken by all vCPUs so far.
pub fn interrupts() -> u64 {
    counter(IRQ_TOTAL)
}

/// Interrupts taken of one vector.
pub fn interrupts_of(vector: u8) -> u64 {
    counter(IRQ_COUNTERS + 8 * u64::from(vector))
}

fn counter(address: u64) -> u64 {
    // SAFETY: the contract with the VMM puts a u64 there, mapped and aligned; interrupts write it, so it is volatile.
    unsafe { (address as *const u64).read_volatile() }
}

/// Sleeps until an interrupt comes, unless one has come since [`interrupts`] gave `seen`.
pub fn idle(seen: u64) {
    // SAFETY: the stub at `ring0_invalid` skips this instruction and changes no register or flag.
    unsafe { asm!("ud2", in("rax") u64::from(IDLE), in("rdi") seen, in("rsi") IRQ_TOTAL) }
}
