//! A guest that is stopped for longer than a checkpoint: for now, or for good. Against the fake VMM.

mod common;

use std::thread;
use std::time::Duration;

use common::shadow::{armed, paused};
use common::{LONG, running, wait};
use romulus_vmm_attach::client::ClientError;
use romulus_vmm_attach::proto::{ErrorCode, Event, Role};

#[test]
fn a_halt_lasts_while_the_client_says_something() {
    let vmm = running(|options| options.halt_limit = Duration::from_millis(300));
    let (mut client, _) = vmm.client();
    client.halt(false).unwrap();
    let before = vmm.machine.steps();
    for _ in 0..30 {
        thread::sleep(Duration::from_millis(20));
        client.alive().unwrap();
    }
    assert_eq!(vmm.machine.steps(), before);
    client.go().unwrap();
    vmm.runs();
    assert_eq!(client.poll_event().unwrap(), None);

    client.halt(false).unwrap();
    vmm.runs();
    wait("the client is told", || {
        client.poll_event().unwrap() == Some(Event::Resumed)
    });
    assert!(matches!(client.go(), Err(ClientError::PauseExpired(_))));
    drop(client);
    vmm.is_well();
}

#[test]
fn a_halt_from_a_pause_lets_nothing_run_in_between() {
    let vmm = running(|_| {});
    let (mut client, mut shadow) = armed(&vmm);
    client.pause(LONG).unwrap();
    shadow.copy_dirty();
    client.captured().unwrap();
    client.halt(false).unwrap();
    vmm.stands_still();
    assert!(shadow.bytes == vmm.machine.contents());
    assert_eq!(vmm.machine.pauses(), 1);
    client.go().unwrap();
    vmm.runs();
}

#[test]
fn a_halted_guest_can_be_captured_and_stays_halted() {
    let vmm = running(|_| {});
    let (mut client, mut shadow) = armed(&vmm);
    client.halt(false).unwrap();
    client.pause(Duration::from_millis(1)).unwrap();
    shadow.copy_dirty();
    client.captured().unwrap();
    thread::sleep(Duration::from_millis(20));
    client.resume().unwrap();
    vmm.stands_still();
    assert!(shadow.bytes == vmm.machine.contents());
    client.go().unwrap();
    vmm.runs();
}

#[test]
fn a_guest_that_was_stopped_for_good_never_runs_again() {
    let vmm = running(|options| options.halt_limit = Duration::from_millis(50));
    let mut client = paused(&vmm);
    client.halt(true).unwrap();
    thread::sleep(Duration::from_millis(100));
    drop(client);
    let (mut client, attachment) = vmm.client();
    assert_eq!(attachment.welcome.role, Role::Halted);
    client.halt(true).unwrap();
    client.halt(false).unwrap();
    for attempt in [client.go(), client.arm(), client.resume().map(|_| ())] {
        let refused =
            matches!(&attempt, Err(ClientError::Refused { code, .. }) if *code == ErrorCode::HaltedForGood);
        assert!(refused, "{attempt:?}");
    }
    client.detach().unwrap();
    drop(vmm.server);
    assert!(!vmm.machine.is_running());
}

#[test]
fn an_expired_pause_does_not_keep_a_guest_from_being_stopped_for_good() {
    let vmm = running(|_| {});
    let (mut client, _) = armed(&vmm);
    client.pause(Duration::from_millis(10)).unwrap();
    vmm.runs();
    client.halt(true).unwrap();
    vmm.stands_still();
}
