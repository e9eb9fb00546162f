//! Saving a machine and going on from that in another one.

use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_bindings::kvm_clock_data;
use romulus_vmm_attach::kvm::Tracking;
use romulus_vmm_attach::kvm::blob::{Blob, BlobWriter, Kind};
use romulus_vmm_attach::proto::MachineInfo;
use romulus_vmm_attach::server::{Machine, StateWriter};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{ASK, Guest, SLEEP, TIMER, WORK, info, long_timer, wait_for};
use crate::stopping::asleep;
use crate::tracking::whole;

pub fn saved(guest: &Guest) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    let mut out = StateWriter::new(&file, 4 << 20);
    guest.machine.save(&mut out).unwrap();
    let mut bytes = vec![0; usize::try_from(out.bytes()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn clock_ns(guest: &Guest) -> u64 {
    guest
        .machine
        .exclusively(|machine| machine.vm.get_clock().unwrap().clock)
        .unwrap()
}

/// Stops a guest and goes on in a new machine on the same memory.
fn hop(guest: Guest, info: &MachineInfo) -> Guest {
    guest.machine.pause().unwrap();
    let (state, clock) = (saved(&guest), clock_ns(&guest));
    let next = guest.standby(info, false);
    drop(guest);
    next.machine.restore(&state).unwrap();
    assert!(clock_ns(&next) >= clock, "the guest's clock went back");
    next.machine.activate().unwrap();
    next
}

#[test]
fn a_guest_goes_on_in_another_machine_with_every_register_and_never_sees_the_tsc_go_back() {
    for vcpus in [1, 2] {
        let info = info(WORK, vcpus);
        let mut guest = Guest::run(WORK, vcpus, Tracking::default());
        for _ in 0..20 {
            guest.progress(u64::from(vcpus), 100);
            guest = hop(guest, &info);
        }
        guest.progress(u64::from(vcpus), 100);
    }
}

fn memory_of(guest: &Guest) -> Vec<u8> {
    guest.machine.exclusively(|machine| whole(machine.ram)).unwrap()
}

#[test]
fn a_state_is_loaded_without_a_write_to_the_memory_which_the_activation_begins() {
    let info = info(WORK, 2);
    let guest = Guest::run(WORK, 2, Tracking::default());
    guest.progress(2, 100);
    guest.machine.pause().unwrap();
    let (state, before) = (saved(&guest), memory_of(&guest));
    let next = guest.standby(&info, false);
    drop(guest);
    next.machine.restore(&state).unwrap();
    next.machine.restore(&state).unwrap();
    let after = memory_of(&next);
    let differ = |page: &usize| before[page * 4096..][..4096] != after[page * 4096..][..4096];
    let different: Vec<usize> = (0..before.len() / 4096).filter(differ).collect();
    assert!(different.is_empty(), "pages that were written: {different:?}");
    next.machine.activate().unwrap();
    next.progress(2, 100);
}

#[test]
fn input_in_flight_survives_a_hop() {
    let info = info(ASK, 1);
    let mut guest = Guest::run(ASK, 1, Tracking::default());
    for _ in 0..20 {
        guest.progress(1, 20);
        guest = hop(guest, &info);
    }
    guest.progress(1, 20);
}

#[test]
fn a_sleeping_guest_and_its_pending_interrupt_survive_a_hop() {
    let info = info(SLEEP, 1);
    let mut guest = Guest::run(SLEEP, 1, Tracking::default());
    let message = kvm_bindings::kvm_msi {
        address_lo: 0xfee0_0000,
        data: 0x40,
        ..Default::default()
    };
    for round in 1..20 {
        asleep(&guest);
        // While it stands still: the interrupt waits in the LAPIC that is saved.
        guest.machine.pause().unwrap();
        guest
            .machine
            .exclusively(|machine| machine.vm.signal_msi(message))
            .unwrap()
            .unwrap();
        guest = hop(guest, &info);
        wait_for("the guest wakes up in its new machine", || {
            guest.counter(0) == round
        });
    }
}

/// Whether the hop finds the timer running, expired with its interrupt still to come, or fired before.
#[test]
fn a_one_shot_timer_fires_once_across_hops_and_never_twice() {
    let info = info(TIMER, 1);
    let mut guest = Guest::run(TIMER, 1, Tracking::default());
    for round in 0..60u64 {
        guest.progress(1, 1);
        // So that hops find it at all moments of its period.
        std::thread::sleep(Duration::from_micros(round * 130 % 1700));
        guest = hop(guest, &info);
    }
    guest.progress(1, 5);
}

/// The same state, as if `ago` had passed since.
fn of_long_ago(state: &[u8], ago: Duration) -> Vec<u8> {
    let ago_ns = u64::try_from(ago.as_nanos()).unwrap();
    let blob = Blob::parse(state).unwrap();
    let mut out = Vec::new();
    let mut writer = BlobWriter::begin(&mut out, blob.vcpus());
    for (kind, index, bytes) in blob.sections() {
        let mut bytes = bytes.to_vec();
        if kind == Kind::Clock {
            for at in [offset_of!(kvm_clock_data, realtime), size_of::<kvm_clock_data>()] {
                let field: &mut [u8; 8] = (&mut bytes[at..at + 8]).try_into().unwrap();
                *field = (u64::from_le_bytes(*field) - ago_ns).to_le_bytes();
            }
        }
        writer.section(kind, index, &bytes);
    }
    writer.finish().unwrap();
    out
}

#[test]
fn a_timer_that_was_due_while_nobody_ran_the_guest_fires_at_once() {
    let program = long_timer();
    let guest = Guest::run(&program, 1, Tracking::default());
    wait_for("the guest arms its timer", || guest.counter(0) == 1);
    guest.machine.pause().unwrap();
    // The timer has nearly nine minutes left, far more than `progress` waits.
    let state = of_long_ago(&saved(&guest), Duration::from_secs(600));
    let next = guest.standby(&info(&program, 1), false);
    drop(guest);
    next.machine.restore(&state).unwrap();
    next.machine.activate().unwrap();
    next.progress(1, 1);
}

#[test]
fn a_timer_that_expires_while_its_vcpu_stands_still_is_not_lost_when_that_hardly_runs_before_a_hop() {
    let info = info(TIMER, 1);
    let mut guest = Guest::run(TIMER, 1, Tracking::default());
    for _ in 0..40 {
        guest.progress(1, 1);
        guest.machine.pause().unwrap();
        std::thread::sleep(Duration::from_millis(2));
        // Mostly the vCPU's thread finds that it has to stand still again before it has entered the guest.
        guest.machine.resume();
        guest = hop(guest, &info);
    }
    guest.progress(1, 5);
}

#[test]
fn saving_changes_nothing_and_sets_no_clock_back() {
    let guest = Guest::run(WORK, 2, Tracking::default());
    guest.machine.arm().unwrap();
    let mut last = 0;
    for _ in 0..50 {
        guest.progress(2, 100);
        guest.machine.pause().unwrap();
        guest.machine.harvest().unwrap();
        guest.ram.bitmap().clear();
        let (first, second) = (saved(&guest), saved(&guest));
        assert_eq!(first.len(), second.len());
        guest.machine.harvest().unwrap();
        // Hot pages count as dirty; nothing else may.
        assert!(guest.ram.bitmap().count() < 5000);
        let clock = clock_ns(&guest);
        assert!(clock >= last, "{clock} after {last}");
        last = clock;
        guest.machine.resume();
    }
    guest.progress(2, 100);
}

/// Whoever compares a standby's memory with its checkpoint does so before the state is loaded.
#[test]
fn a_standby_writes_no_memory_before_its_state_is_loaded_and_then_the_clocks_page_only() {
    let info = info(WORK, 2);
    let guest = Guest::run(WORK, 2, Tracking::default());
    guest.progress(2, 100);
    guest.machine.pause().unwrap();
    let (state, before) = (saved(&guest), whole(&guest.ram));
    let changed = || {
        let now = whole(&guest.ram);
        let pages = before.chunks(4096).zip(now.chunks(4096)).enumerate();
        let changed = pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page);
        changed.collect::<Vec<usize>>()
    };
    let next = guest.standby(&info, false);
    assert_eq!(changed(), [0usize; 0], "prepared");
    next.machine.restore(&state).unwrap();
    assert!(changed().iter().all(|page| *page == 0xd), "{:?}", changed());
}

#[test]
fn a_trial_load_leaves_the_guest_and_its_memory_alone() {
    let info = info(WORK, 1);
    let guest = Guest::run(WORK, 1, Tracking::default());
    guest.progress(1, 100);
    guest.machine.pause().unwrap();
    let (state, before) = (saved(&guest), guest.counter(0));
    let trial = guest.standby(&info, true);
    trial.machine.restore(&state).unwrap();
    trial.machine.restore(&state).unwrap();
    trial.machine.activate().unwrap();
    trial.progress(1, 1000);
    assert_eq!(guest.counter(0), before);
    drop(trial);
    guest.machine.resume();
    guest.progress(1, 100);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_the_right_one_still_loads() {
    let guest = Guest::run(WORK, 1, Tracking::default());
    guest.progress(1, 100);
    guest.machine.pause().unwrap();
    let state = saved(&guest);
    let two = guest.standby(&info(WORK, 2), true);
    let refused = two.machine.restore(&state).unwrap_err();
    assert!(
        refused.chain().contains("1 vCPUs, this machine has 2"),
        "{}",
        refused.chain()
    );
    drop(two);
    let next = guest.standby(&info(WORK, 1), false);
    for cut in [0, 10, 16, state.len() / 2, state.len() - 1] {
        assert!(next.machine.restore(&state[..cut]).is_err());
    }
    let mut damaged = state.clone();
    damaged[state.len() / 2] ^= 1;
    assert!(next.machine.restore(&damaged).is_err());
    next.machine.restore(&state).unwrap();
    next.machine.activate().unwrap();
    next.progress(1, 100);
    let running = next.machine.restore(&state).unwrap_err();
    assert!(running.chain().contains("runs"), "{}", running.chain());
}

#[test]
fn the_vmms_devices_travel_with_the_state() {
    let info = info(WORK, 1);
    let mut guest = Guest::run(WORK, 1, Tracking::default());
    for hops in 1..4u64 {
        guest = hop(guest, &info);
        guest.machine.pause().unwrap();
        let state = saved(&guest);
        assert!(
            state.ends_with(&hops.to_le_bytes()),
            "the devices' section is the last"
        );
        guest.machine.resume();
    }
    assert!(!guest.outside.failed.load(Ordering::SeqCst));
    let _: u64 = guest.ram.memory().read_obj(GuestAddress(0)).unwrap();
}
