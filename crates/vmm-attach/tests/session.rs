//! What a client may rely on, and what the guest may rely on whatever a client does. Against the fake VMM.

mod common;

use std::time::Duration;

use common::shadow::{armed, paused};
use common::{LONG, next, running, say, wait};
use romulus_vmm_attach::channel::Channel;
use romulus_vmm_attach::client::{Client, ClientError};
use romulus_vmm_attach::fake::{Call, FakeMachine};
use romulus_vmm_attach::proto::{ErrorCode, Event, Pause, Request};
use romulus_vmm_attach::server::{EVENTS_MAX, bind};

#[test]
fn every_write_is_in_a_checkpoint() {
    let vmm = running(|_| {});
    let (mut client, mut shadow) = armed(&vmm);
    let mut state = Vec::new();
    for round in 0..20 {
        vmm.runs();
        vmm.machine.device_write(71);
        if round % 3 == 0 {
            client.harvest().unwrap();
        }
        client.pause(LONG).unwrap();
        let pages = shadow.copy_dirty();
        let captured = client.captured().unwrap();
        client.read_state(&captured, &mut state).unwrap();
        assert!(
            pages > 0 && shadow.bytes == vmm.machine.contents(),
            "round {round}"
        );
        assert_eq!(
            state[8..16],
            shadow.bytes[..8],
            "state and memory are of one moment"
        );
        client.resume().unwrap();
    }
    client.detach().unwrap();
    wait("the tracking ends", || !vmm.machine.is_armed());
    vmm.runs();
}

#[test]
fn the_guest_stands_still_from_pause_to_resume() {
    let vmm = running(|_| {});
    let (mut client, _) = armed(&vmm);
    for _ in 0..3 {
        let paused = client.pause(LONG).unwrap();
        vmm.stands_still();
        client.captured().unwrap();
        let resumed = client.resume().unwrap();
        assert!(resumed.resumed_at_ns > paused.stopped_at_ns);
        vmm.runs();
    }
}

#[test]
fn a_client_that_dies_frees_the_guest() {
    let vmm = running(|_| {});
    drop(paused(&vmm));
    vmm.is_well();
    let mut client = paused(&vmm);
    client.captured().unwrap();
    drop(client);
    vmm.is_well();
    let (mut client, _) = vmm.client();
    client.halt(false).unwrap();
    vmm.stands_still();
    drop(client);
    vmm.is_well();
}

#[test]
fn a_client_that_never_resumes_loses_its_pause_and_is_told() {
    let vmm = running(|_| {});
    let (mut client, _) = armed(&vmm);
    for _ in 0..3 {
        client.pause(Duration::from_millis(30)).unwrap();
        client.captured().unwrap();
        vmm.runs();
        assert!(matches!(client.resume(), Err(ClientError::PauseExpired(_))));
        client.pause(LONG).unwrap();
        vmm.stands_still();
        client.resume().unwrap();
    }
    client.pause(Duration::from_millis(30)).unwrap();
    vmm.runs();
    assert!(
        matches!(client.halt(false), Err(ClientError::PauseExpired(_))),
        "it ran in between"
    );
    vmm.runs();
    assert!(vmm.machine.is_armed(), "the session goes on");
}

#[test]
fn a_short_pause_after_long_ones_has_its_own_limit() {
    let vmm = running(|_| {});
    let (mut client, _) = armed(&vmm);
    for _ in 0..3 {
        client.pause(LONG).unwrap();
        client.resume().unwrap();
    }
    client.pause(Duration::from_millis(20)).unwrap();
    vmm.runs();
}

/// Asks without reading answers, until the VMM can't write any more and reads no more.
fn flood(raw: &Channel) {
    let harvest = Request::Harvest.encode(9).unwrap();
    while raw.send(&harvest, &[], Duration::from_millis(200)).is_ok() {}
}

#[test]
fn a_client_that_stops_reading_is_disconnected() {
    let vmm = running(|options| options.write_limit = Duration::from_millis(300));
    let raw = vmm.raw_welcomed();
    say(&raw, 2, &Request::Arm, &[]);
    flood(&raw);
    // Our end is still open.
    vmm.is_well();
}

#[test]
fn a_pause_ends_at_its_limit_even_while_the_server_waits_for_a_client_that_does_not_read() {
    let vmm = running(|options| options.write_limit = LONG);
    let raw = vmm.raw_welcomed();
    say(&raw, 2, &Request::Arm, &[]);
    say(
        &raw,
        3,
        &Request::Pause(Pause {
            limit_ns: 300_000_000,
        }),
        &[],
    );
    flood(&raw);
    assert_eq!(vmm.machine.pauses(), 1);
    vmm.runs();
    drop(raw);
    vmm.is_well();
}

#[test]
fn what_fails_in_the_vmm_is_told_and_the_guest_runs() {
    let vmm = running(|_| {});
    let (mut client, _) = vmm.client();
    for call in [Call::Arm, Call::Pause, Call::Harvest, Call::Save] {
        vmm.machine.fail_next(call);
        let failed = client
            .arm()
            .and_then(|()| client.pause(LONG))
            .and_then(|_| client.captured());
        let Err(ClientError::Refused { code, text, .. }) = failed else {
            panic!("{failed:?}");
        };
        assert_eq!(code, ErrorCode::MachineFailed);
        assert!(text.contains(&format!("{call:?}")), "{text}");
        vmm.runs();
    }
    client.arm().unwrap();
    client.pause(LONG).unwrap();
    client.resume().unwrap();
}

#[test]
fn a_client_that_resumes_ahead_hears_of_both_and_keeps_step_when_the_state_could_not_be_saved() {
    let vmm = running(|_| {});
    let (mut client, _) = vmm.client();
    client.arm().unwrap();
    for fails in [false, true, false] {
        if fails {
            vmm.machine.fail_next(Call::Save);
        }
        client.pause(LONG).unwrap();
        client.resume_ahead().unwrap();
        assert_eq!(client.captured().is_err(), fails);
        if !fails {
            client.resume().unwrap();
        }
        vmm.runs();
        assert!(matches!(client.poll_event(), Ok(None)));
    }
    // Also when nobody asks what became of it.
    client.pause(LONG).unwrap();
    client.resume_ahead().unwrap();
    client.resume().unwrap();
    client.harvest().unwrap();
}

#[test]
fn a_halt_after_a_resume_that_was_sent_ahead_stops_the_guest() {
    let vmm = running(|_| {});
    let mut client = paused(&vmm);
    client.resume_ahead().unwrap();
    client.halt(false).unwrap();
    assert!(!vmm.machine.is_running());
    client.go().unwrap();
    vmm.runs();
}

#[test]
fn a_state_over_its_limit_is_refused_and_the_guest_runs() {
    let vmm = running(|options| options.state_bytes_max = 10);
    let mut client = paused(&vmm);
    let Err(ClientError::Refused { text, .. }) = client.captured() else {
        panic!("it was captured");
    };
    assert!(text.contains("state_bytes_max"), "{text}");
    vmm.runs();
}

#[test]
fn a_second_client_is_refused_by_name_and_does_not_disturb_the_first() {
    let vmm = running(|_| {});
    let (mut client, _) = armed(&vmm);
    client.pause(LONG).unwrap();
    let second = Client::connect(&vmm.socket, "second", LONG);
    let Err(ClientError::Busy { pid, text }) = second else {
        panic!("{second:?}");
    };
    assert_eq!(pid, std::process::id(), "the VMM's process");
    assert!(
        text.contains("\"test\"") && text.contains(&pid.to_string()),
        "{text}"
    );
    vmm.stands_still();
    client.captured().unwrap();
    client.resume().unwrap();
}

#[test]
fn events_reach_the_client_also_between_answers() {
    let vmm = running(|_| {});
    vmm.events.post(Event::Reset);
    let (mut client, _) = vmm.client();
    assert_eq!(client.poll_event().unwrap(), None, "that was before");
    let sent = [
        Event::Paused,
        Event::Resumed,
        Event::Reset,
        Event::Crashed,
        Event::PoweredOff,
    ];
    for event in sent {
        vmm.events.post(event);
    }
    client.arm().unwrap();
    let mut came = Vec::new();
    wait("the events come", || {
        came.extend(client.poll_event().unwrap());
        came.len() == sent.len()
    });
    assert_eq!(came, sent);
}

#[test]
fn more_events_than_a_client_reads_end_its_connection() {
    let vmm = running(|_| {});
    let (mut client, _) = vmm.client();
    for _ in 0..EVENTS_MAX * 50 {
        vmm.events.post(Event::Reset);
    }
    // Either they were told as they came, or the client lost its connection: never some without a word.
    let mut told = 0;
    let lost = loop {
        match client.poll_event() {
            Ok(Some(_)) => told += 1,
            Ok(None) if told == EVENTS_MAX * 50 => break false,
            Ok(None) => {}
            Err(_) => break true,
        }
    };
    assert!(lost || told == EVENTS_MAX * 50);
    drop(client);
    vmm.is_well();
}

#[test]
fn a_machine_that_changes_is_not_captured_with_the_old_bitmap() {
    let vmm = running(|_| {});
    let (mut client, _) = armed(&vmm);
    vmm.events.post(Event::MachineChanged);
    for attempt in [
        client.pause(LONG).map(|_| ()),
        client.harvest().map(|_| ()),
        client.arm(),
    ] {
        assert!(
            matches!(attempt, Err(ClientError::MachineChanged(_))),
            "{attempt:?}"
        );
    }
    assert_eq!(vmm.machine.pauses(), 0);
    wait("the client is told", || {
        client.poll_event().unwrap() == Some(Event::MachineChanged)
    });
    drop(client);
    vmm.is_well();
}

#[test]
fn a_pause_comes_after_arm_and_within_its_range() {
    let vmm = running(|options| options.pause_limit_max = Duration::from_secs(1));
    let (mut client, attachment) = vmm.client();
    assert_eq!(attachment.welcome.pause_limit_ns_max, 1_000_000_000);
    let code = |result: Result<_, ClientError>| match result {
        Err(ClientError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        code(client.pause(Duration::from_millis(5))),
        ErrorCode::WrongOrder
    );
    client.arm().unwrap();
    assert_eq!(code(client.pause(Duration::ZERO)), ErrorCode::OutOfRange);
    assert_eq!(
        code(client.pause(Duration::from_millis(1001))),
        ErrorCode::OutOfRange
    );
    assert_eq!(vmm.machine.pauses(), 0);
    client.pause(Duration::from_millis(1000)).unwrap();
}

#[test]
fn a_server_that_ends_lets_the_guest_run() {
    let vmm = running(|_| {});
    let mut client = paused(&vmm);
    drop(vmm.server);
    let before = vmm.machine.steps();
    wait("the guest runs", || vmm.machine.steps() > before);
    client.captured().unwrap();
    assert!(matches!(client.resume(), Err(ClientError::Channel(_))));
    assert!(matches!(client.resume(), Err(ClientError::Broken)));
}

#[test]
fn what_was_posted_before_the_server_ends_is_told() {
    for _ in 0..20 {
        let vmm = running(|_| {});
        let (mut client, _) = vmm.client();
        vmm.events.post(Event::PoweredOff);
        drop(vmm.server);
        assert_eq!(client.poll_event().unwrap(), Some(Event::PoweredOff));
        assert!(client.poll_event().is_err());
    }
}

#[test]
fn what_a_vmm_said_before_its_end_is_heard_although_the_next_request_fails() {
    let vmm = running(|_| {});
    let (mut client, _) = armed(&vmm);
    vmm.events.post(Event::PoweredOff);
    drop(vmm);
    let error = client.pause(LONG).unwrap_err();
    assert!(!matches!(error, ClientError::PauseExpired(_)), "{error}");
    assert_eq!(client.poll_event().unwrap(), Some(Event::PoweredOff));
    assert!(client.poll_event().is_err(), "nobody is there any more");
}

#[test]
fn a_socket_is_taken_over_from_a_vmm_that_ended_and_from_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let first = bind(&path).unwrap();
    let refused = bind(&path).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse);
    drop(first);
    let _second = bind(&path).unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "something").unwrap();
    assert!(bind(&file).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"something");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn a_resume_that_is_sent_ahead_is_done_after_the_capture() {
    let vmm = running(|_| {});
    let raw = vmm.raw_welcomed();
    say(&raw, 2, &Request::Arm, &[]);
    say(
        &raw,
        3,
        &Request::Pause(Pause {
            limit_ns: 1_000_000_000,
        }),
        &[],
    );
    say(&raw, 4, &Request::Resume, &[]);
    let names: Vec<&str> = (0..4).map(|_| next(&raw).name()).collect();
    assert_eq!(names, ["Armed", "Paused", "Captured", "Resumed"]);
    vmm.runs();
}

#[test]
fn a_fake_guest_ends_with_its_owner() {
    let machine = FakeMachine::running(&[3], Duration::ZERO);
    wait("it runs", || machine.steps() > 10);
    drop(machine);
}
