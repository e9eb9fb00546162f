//! What the registers of a local APIC say about its timer, and what has to be changed in them for another VM.

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

/// Whether the LAPIC's timer is a one-shot timer that was armed and has expired. KVM never takes its initial count back:
/// the registers do not say whether the interrupt is still to come, on its way, or long served.
pub(super) fn expired(lapic: &kvm_lapic_state) -> bool {
    register(lapic, TIMER) & TIMER_MODE == 0
        && register(lapic, INITIAL_COUNT) != 0
        && register(lapic, CURRENT_COUNT) == 0
}

/// Whether the timer's interrupt waits in the LAPIC.
pub(super) fn requested(lapic: &kvm_lapic_state) -> bool {
    pending(lapic, REQUESTED, register(lapic, TIMER) & 0xff)
}

/// Whether the guest serves the timer's interrupt.
pub(super) fn in_service(lapic: &kvm_lapic_state) -> bool {
    pending(lapic, IN_SERVICE, register(lapic, TIMER) & 0xff)
}

/// Takes a timer back whose interrupt was delivered: whoever is given an initial count without a current one starts the
/// timer anew, and it fires at once.
pub(super) fn take_back(lapic: &mut kvm_lapic_state) {
    lapic.regs[INITIAL_COUNT..INITIAL_COUNT + 4].fill(0);
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
        lapic
    }

    #[test]
    fn only_a_one_shot_timer_that_was_armed_and_has_no_time_left_has_expired() {
        assert!(expired(&lapic(&[])));
        for changes in [
            (CURRENT_COUNT, 7),
            (INITIAL_COUNT, 0),
            (TIMER, VECTOR | 1 << 17),
            (TIMER, VECTOR | 2 << 17),
        ] {
            assert!(!expired(&lapic(&[changes])), "{changes:?}");
        }
    }

    #[test]
    fn an_interrupt_is_seen_where_it_is_and_only_the_timers_own() {
        let (own, other) = (1 << (VECTOR % 32), 1 << 5);
        let seen = |bank: usize, bits| {
            let lapic = lapic(&[(bank + 16, bits)]);
            (requested(&lapic), in_service(&lapic))
        };
        assert_eq!(seen(REQUESTED, own), (true, false));
        assert_eq!(seen(IN_SERVICE, own), (false, true));
        assert_eq!(
            (seen(REQUESTED, other), seen(IN_SERVICE, other)),
            ((false, false), (false, false))
        );
    }

    #[test]
    fn a_timer_that_was_taken_back_is_not_armed() {
        let mut lapic = lapic(&[]);
        take_back(&mut lapic);
        assert!(!expired(&lapic));
        assert_eq!(register(&lapic, TIMER), VECTOR);
    }
}
