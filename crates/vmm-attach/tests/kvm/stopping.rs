//! Stopping the vCPUs wherever they are, and letting them go.

use std::time::Duration;

use romulus_vmm_attach::kvm::Tracking;
use romulus_vmm_attach::server::Machine;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{ASK, Guest, INTERRUPTS, SLEEP, SPIN, WORK, wait_for};

/// An interrupt message to the first vCPU, vector 0x40.
fn interrupt(guest: &Guest) {
    let message = kvm_bindings::kvm_msi {
        address_lo: 0xfee0_0000,
        data: 0x40,
        ..Default::default()
    };
    guest
        .machine
        .exclusively(|machine| machine.vm.signal_msi(message))
        .unwrap()
        .unwrap();
}

/// Waits until the guest sleeps in HLT: an interrupt before that would be the guest's to lose.
pub fn asleep(guest: &Guest) {
    let state = || {
        guest.machine.exclusively(|machine| {
            machine
                .vcpus
                .with(0, |fd| fd.get_mp_state().unwrap().mp_state)
                .unwrap()
        })
    };
    wait_for("the guest sleeps", || {
        state().unwrap() == kvm_bindings::KVM_MP_STATE_HALTED
    });
}

#[test]
fn vcpus_that_spin_in_ring_3_stop_and_go_on_where_they_were() {
    let guest = Guest::run(WORK, 2, Tracking::Log);
    for _ in 0..100 {
        guest.progress(2, 1);
        let stopped = guest.machine.pause().unwrap();
        let counters = [guest.counter(0), guest.counter(1)];
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!([guest.counter(0), guest.counter(1)], counters, "it stands still");
        assert!(guest.machine.resume() >= stopped.stopped_at_ns);
    }
    guest.progress(2, 1);
}

#[test]
fn a_vcpu_that_sleeps_in_hlt_in_the_kernel_stops_and_still_wakes_up_later() {
    let guest = Guest::run(SLEEP, 1, Tracking::Log);
    let interrupts = |guest: &Guest| {
        guest
            .ram
            .memory()
            .read_obj::<u64>(GuestAddress(INTERRUPTS))
            .unwrap()
    };
    for round in 1..20 {
        asleep(&guest);
        guest.machine.pause().unwrap();
        guest.machine.resume();
        interrupt(&guest);
        wait_for("the guest wakes up", || guest.counter(0) == round);
        assert_eq!(interrupts(&guest), round);
    }
}

#[test]
fn an_interrupt_that_comes_while_the_guest_stands_still_is_not_lost() {
    let guest = Guest::run(SLEEP, 1, Tracking::Log);
    for round in 1..20 {
        asleep(&guest);
        guest.machine.pause().unwrap();
        interrupt(&guest);
        guest.machine.resume();
        wait_for("the guest wakes up", || guest.counter(0) == round);
    }
}

#[test]
fn input_that_was_answered_before_a_stop_is_neither_lost_nor_asked_for_again() {
    let guest = Guest::run(ASK, 1, Tracking::Log);
    for _ in 0..300 {
        guest.progress(1, 1);
        guest.machine.pause().unwrap();
        guest.machine.resume();
    }
    guest.progress(1, 10);
}

#[test]
fn stopping_twice_and_going_twice_is_harmless() {
    let guest = Guest::run(WORK, 1, Tracking::Log);
    for _ in 0..20 {
        guest.machine.pause().unwrap();
        guest.machine.pause().unwrap();
        guest.machine.resume();
        guest.machine.resume();
        guest.machine.pause().unwrap();
        guest.machine.resume();
    }
    guest.progress(1, 1);
}

#[test]
fn a_running_vcpu_gives_nobody_its_registers() {
    let guest = Guest::run(SPIN, 1, Tracking::Log);
    let file = tempfile::tempfile().unwrap();
    let mut state = romulus_vmm_attach::server::StateWriter::new(&file, 1 << 20);
    assert!(guest.machine.save(&mut state).is_err());
    guest.machine.pause().unwrap();
    guest.machine.save(&mut state).unwrap();
}

#[test]
fn the_vmm_can_change_its_machine_while_a_client_holds_it_or_not() {
    let guest = Guest::run(WORK, 1, Tracking::Log);
    let rip = || {
        guest
            .machine
            .exclusively(|machine| machine.vcpus.with(0, |fd| fd.get_regs().unwrap().rip).unwrap())
    };
    assert!(rip().unwrap() >= 0x2_0000);
    guest.progress(1, 1);
    guest.machine.pause().unwrap();
    assert_eq!(rip().unwrap(), rip().unwrap(), "still held");
    guest.machine.resume();
    guest.progress(1, 1);
}
