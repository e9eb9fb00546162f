//! What has to be changed in the registers of a local APIC before they are given to another VM.

use kvm_bindings::kvm_lapic_state;

/// First of the registers of interrupts in service, and of those requested; 32 vectors each, 16 bytes apart (Intel SDM volume
/// 3A, 12.8.4).
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;
/// The timer's vector and mode, its initial and its current count (12.5.4).
const TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
/// Bits of [`TIMER`] that say periodic or TSC-deadline; one-shot is neither.
const TIMER_MODE: u32 = 3 << 17;

/// Takes back a one-shot timer whose interrupt is on its way. The kernel starts a timer anew that has an initial count, and
/// at once when the current count is 0: the interrupt would come twice. Where the interrupt is not to be seen, it may not
/// have been delivered yet; then it has to come again.
pub(super) fn stop_fired_timer(lapic: &mut kvm_lapic_state) {
    let timer = register(lapic, TIMER);
    let fired = timer & TIMER_MODE == 0 && register(lapic, CURRENT_COUNT) == 0;
    if fired && (pending(lapic, REQUESTED, timer & 0xff) || pending(lapic, IN_SERVICE, timer & 0xff)) {
        lapic.regs[INITIAL_COUNT..INITIAL_COUNT + 4].fill(0);
    }
}

fn pending(lapic: &kvm_lapic_state, bank: usize, vector: u32) -> bool {
    register(lapic, bank + (vector as usize / 32) * 16) >> (vector % 32) & 1 == 1
}

fn register(lapic: &kvm_lapic_state, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| lapic.regs[at + byte].cast_unsigned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VECTOR: u32 = 0x21;

    fn lapic(changes: &[(usize, u32)]) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        for (at, value) in [(TIMER, VECTOR), (INITIAL_COUNT, 1000)].iter().chain(changes) {
            for (to, from) in lapic.regs[*at..].iter_mut().zip(value.to_le_bytes()) {
                *to = from.cast_signed();
            }
        }
        stop_fired_timer(&mut lapic);
        lapic
    }

    #[test]
    fn a_timer_whose_interrupt_is_on_its_way_does_not_fire_again() {
        for bank in [REQUESTED, IN_SERVICE] {
            let lapic = lapic(&[(bank + 16, 1 << (VECTOR % 32))]);
            assert_eq!(register(&lapic, INITIAL_COUNT), 0);
        }
    }

    #[test]
    fn a_timer_that_may_still_have_to_fire_is_left_alone() {
        let requested = (REQUESTED + 16, 1 << (VECTOR % 32));
        for changes in [
            &[][..],
            &[(REQUESTED + 16, 1 << 5)],
            &[requested, (CURRENT_COUNT, 7)],
            &[requested, (TIMER, VECTOR | 1 << 17)],
            &[requested, (TIMER, VECTOR | 2 << 17)],
        ] {
            assert_eq!(register(&lapic(changes), INITIAL_COUNT), 1000, "{changes:?}");
        }
    }
}
