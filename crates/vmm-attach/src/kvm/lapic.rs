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
/// By how much the timer's input is divided, in bits 0, 1 and 3 (12.5.4).
const DIVIDE: usize = 0x3e0;
/// Bits of [`TIMER`] that say periodic or TSC-deadline; one-shot is neither.
const TIMER_MODE: u32 = 3 << 17;
const PERIODIC: u32 = 1 << 17;

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
    set_register(lapic, INITIAL_COUNT, 0);
}

/// Lets `forward_ns` pass for the timer, as it did for the guest's clocks: what would have fired meanwhile fires at once, and not
/// after the time that was left when the vCPU was saved. A periodic timer keeps its beat; beats that were missed are lost, as they
/// are when a guest is not run for a while. A TSC deadline is in another place, and needs nothing.
///
/// The timer's input is taken for KVM's, one count a nanosecond unless a VMM asked for something else
/// (`KVM_CAP_X86_APIC_BUS_CYCLES_NS`).
pub(super) fn advance(lapic: &mut kvm_lapic_state, forward_ns: u64) {
    let (initial, current) = (register(lapic, INITIAL_COUNT), register(lapic, CURRENT_COUNT));
    if current == 0 || current > initial {
        return;
    }
    let counts = forward_ns / divisor(register(lapic, DIVIDE));
    let left = match register(lapic, TIMER) & TIMER_MODE {
        0 => u64::from(current).saturating_sub(counts).max(1),
        PERIODIC => {
            let into_beat = (u64::from(initial - current) + counts) % u64::from(initial);
            u64::from(initial) - into_beat
        }
        _ => return,
    };
    let left = u32::try_from(left).expect("no more than the initial count, which has 32 bits");
    set_register(lapic, CURRENT_COUNT, left);
}

/// What the divide configuration register says: 2, 4, … 128, and 1 for the highest value.
fn divisor(register: u32) -> u64 {
    let power = (register & 3 | register >> 1 & 4) + 1;
    1 << (power & 7)
}

fn set_register(lapic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (to, from) in lapic.regs[at..].iter_mut().zip(value.to_le_bytes()) {
        *to = from.cast_signed();
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
            set_register(&mut lapic, *at, *value);
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

    #[test]
    fn time_that_passed_is_taken_from_what_a_timer_had_left() {
        let left_after = |changes: &[(usize, u32)], forward_ns| {
            let mut lapic = lapic(changes);
            advance(&mut lapic, forward_ns);
            register(&lapic, CURRENT_COUNT)
        };
        let by_one = (DIVIDE, 0b1011);
        let periodic = (TIMER, VECTOR | PERIODIC);
        // One shot, of 1,000 counts: on time, overdue (at once, as 0 would be "never armed"), expired before.
        assert_eq!(left_after(&[by_one, (CURRENT_COUNT, 700)], 300), 400);
        assert_eq!(left_after(&[by_one, (CURRENT_COUNT, 700)], 400_000_000), 1);
        assert_eq!(left_after(&[by_one], 300), 0);
        // In periods of 1,000.
        assert_eq!(left_after(&[by_one, periodic, (CURRENT_COUNT, 700)], 300), 400);
        assert_eq!(left_after(&[by_one, periodic, (CURRENT_COUNT, 700)], 5900), 800);
        assert_eq!(left_after(&[by_one, periodic, (CURRENT_COUNT, 700)], 700), 1000);
        // Not a timer that counts; a count that cannot be.
        assert_eq!(
            left_after(&[(TIMER, VECTOR | 2 << 17), (CURRENT_COUNT, 700)], 300),
            700
        );
        assert_eq!(left_after(&[by_one, (CURRENT_COUNT, 1001)], 300), 1001);
    }

    #[test]
    fn the_divide_register_is_read_as_the_manual_has_it() {
        let told = [0b0000, 0b0001, 0b0010, 0b0011, 0b1000, 0b1001, 0b1010, 0b1011];
        assert_eq!(told.map(divisor), [2, 4, 8, 16, 32, 64, 128, 1]);
    }
}
