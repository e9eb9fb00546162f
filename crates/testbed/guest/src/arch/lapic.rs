//! The local APIC's timer, one shot at a time. KVM's counts nanoseconds when it divides by one.

use romulus_guest_core::abi::{LAPIC, TIMER_VECTOR};

const LVT_TIMER: u64 = 0x320;
const INITIAL_COUNT: u64 = 0x380;
const DIVIDE: u64 = 0x3e0;
const DIVIDE_BY_ONE: u32 = 0b1011;
const MASKED: u32 = 1 << 16;

/// Vector of a vCPU's timer.
pub fn timer_vector(vcpu: u32) -> u8 {
    TIMER_VECTOR + u8::try_from(vcpu).unwrap_or(0)
}

/// Makes this vCPU's timer ready.
pub fn start(vcpu: u32) {
    write(DIVIDE, DIVIDE_BY_ONE);
    write(LVT_TIMER, timer_vector(vcpu).into());
}

/// Takes the timer back. An interrupt of it that was on its way has come when this is over.
pub fn disarm() {
    write(INITIAL_COUNT, 0);
}

/// Has the timer, which is not armed, fire once, in `delay_ns` from now.
pub fn arm(delay_ns: u32) {
    write(INITIAL_COUNT, delay_ns.max(1));
}

/// Has the timer's interrupts be lost from now on: for a test of the check that finds it.
pub fn mask_timer(vcpu: u32) {
    write(LVT_TIMER, u32::from(timer_vector(vcpu)) | MASKED);
}

fn write(register: u64, value: u32) {
    // SAFETY: the local APIC's page is mapped for every vCPU and has no memory of the program's in it.
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) }
}
