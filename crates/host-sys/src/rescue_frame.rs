//! A way home for a thread that runs a call for us, in case we die before we can put its registers back.
//!
//! The call is made by an existing `syscall; ret` with the stack pointer at a frame in unused stack (below the
//! red zone). If we live, we restore the registers and the frame is never looked at. If we die, the kernel lets
//! the thread go: it finishes the call, `ret` leads it to the C library's rt_sigreturn, and the kernel
//! itself restores all registers and the signal mask from the frame, as after a signal handler.
//!
//! ```text
//!   rsp ─► | address of rt_sigreturn | flags | link | alt stack | registers | fpu = none | signal mask | siginfo |
//!          '------------------------ struct rt_sigframe of the kernel (x86-64) ----------------------------------'
//! ```
//!
//! Two things are lost in that case only: a call that would have resumed its own timeout returns EINTR instead,
//! and the floating-point control words go back to their defaults. Calls may do the first at any time, and
//! every thread starts with the second.

use crate::gadget::Gadgets;

/// Bytes below the stack pointer that a function may use without moving it (System V ABI).
const RED_ZONE_BYTES: u64 = 128;
/// pretcode, ucontext (8 + 8 + 24 + 256 + 8), siginfo.
pub(crate) const FRAME_BYTES: usize = 8 + 304 + 128;

const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;
/// Not a valid flag: the kernel then leaves the alternate signal stack as it is.
const ALT_STACK_UNCHANGED: u64 = 0x10;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Where the frame goes for a thread with these registers.
pub(crate) fn address(registers: &libc::user_regs_struct) -> u64 {
    (registers.rsp - RED_ZONE_BYTES - FRAME_BYTES as u64) & !0xf
}

/// The frame's bytes.
pub(crate) fn build(registers: &libc::user_regs_struct, signal_mask: u64, gadgets: Gadgets) -> Vec<u8> {
    let (rax, rip) = resumed(registers);
    let r = registers;
    let selectors = (r.cs & 0xffff) | ((r.ss & 0xffff) << 48);
    let mut words = vec![gadgets.sigreturn, UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS, 0];
    words.extend([0, ALT_STACK_UNCHANGED, 0]);
    words.extend([r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]);
    words.extend([
        r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, rax, r.rcx, r.rsp, rip, r.eflags, selectors,
    ]);
    words.extend([0; 4]); // err, trapno, oldmask, cr2
    words.push(0); // no floating-point state
    words.extend([0; 8]);
    words.push(signal_mask);
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
    bytes.resize(FRAME_BYTES, 0);
    bytes
}

/// rax and rip with which the thread goes on: an interrupted system call is begun again, as the kernel does it
/// when there was no signal.
fn resumed(registers: &libc::user_regs_struct) -> (u64, u64) {
    let in_call = registers.orig_rax.cast_signed() >= 0;
    match registers.rax.cast_signed() {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND if in_call => (registers.orig_rax, registers.rip - 2),
        ERESTART_RESTARTBLOCK if in_call => (i64::from(-libc::EINTR).cast_unsigned(), registers.rip),
        _ => (registers.rax, registers.rip),
    }
}
