//! The client against a monitor played by a thread, line by line.

use std::io::{BufRead, BufReader, Write};
use std::thread::{self, JoinHandle};

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": []}}"#;

/// Plays a transcript: `> ` lines are expected from the client, `< ` lines are sent to it.
fn monitor(transcript: &'static [&'static str]) -> (UnixStream, JoinHandle<UnixStream>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let player = thread::spawn(move || {
        let mut reader = BufReader::new(theirs.try_clone().unwrap());
        let mut writer = theirs.try_clone().unwrap();
        writeln!(writer, "{GREETING}\r").unwrap();
        for step in [
            r#"> {"execute":"qmp_capabilities","id":1}"#,
            r#"< {"return": {}, "id": 1}"#,
        ]
        .iter()
        .chain(transcript)
        {
            match step.split_at(2) {
                ("> ", expected) => {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    let sent: Value = serde_json::from_str(&line).unwrap();
                    assert_eq!(sent, serde_json::from_str::<Value>(expected).unwrap());
                }
                (_, line) => writeln!(writer, "{line}\r").unwrap(),
            }
        }
        theirs
    });
    (ours, player)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn replies_are_told_from_events_and_events_keep_their_order_and_time() {
    let (stream, player) = monitor(&[
        r#"> {"execute":"stop","id":2}"#,
        r#"< {"timestamp": {"seconds": 9, "microseconds": 1}, "event": "STOP"}"#,
        r#"< {"return": {}, "id": 2}"#,
        r#"> {"execute":"human-monitor-command","arguments":{"command-line":"info status"},"id":3}"#,
        r#"< {"timestamp": {"seconds": 9, "microseconds": 2}, "event": "RESUME"}"#,
        r#"< {"return": "VM status: running\r\n", "id": 3}"#,
    ]);
    let mut qmp = Qmp::negotiate(stream, soon()).unwrap();
    assert_eq!(qmp.version().to_string(), "7.2.22");
    qmp.execute("stop", Value::Null).unwrap();
    assert!(qmp.hmp("info status").unwrap().contains("running"));
    let names = [(); 2]
        .map(|()| qmp.next_event(soon()).unwrap().unwrap())
        .map(|e| (e.name.clone(), e.at_us()));
    assert_eq!(
        names,
        [("STOP".to_owned(), 9_000_001), ("RESUME".to_owned(), 9_000_002)]
    );
    drop(player.join().unwrap());
    assert!(matches!(qmp.next_event(soon()), Err(QmpError::Closed)));
}

#[test]
fn a_refusal_carries_the_words_of_qemu_and_the_connection_lives_on() {
    let (stream, _player) = monitor(&[
        r#"> {"execute":"migrate","id":2}"#,
        r#"< {"error": {"class": "GenericError", "desc": "There's a migration process in progress"}, "id": 2}"#,
        r#"> {"execute":"query-status","id":3}"#,
        r#"< {"return": {"status": "running"}, "id": 3}"#,
    ]);
    let mut qmp = Qmp::negotiate(stream, soon()).unwrap();
    let error = qmp.execute("migrate", Value::Null).unwrap_err();
    assert!(
        error.is_refusal() && error.to_string().contains("in progress"),
        "{error}"
    );
    assert_eq!(
        qmp.execute("query-status", Value::Null).unwrap()["status"],
        "running"
    );
}

#[test]
fn the_late_reply_to_a_command_that_was_given_up_is_not_taken_for_another() {
    let (stream, _player) = monitor(&[
        r#"> {"execute":"slow","id":2}"#,
        r#"> {"execute":"fast","id":3}"#,
        r#"< {"return": "slow", "id": 2}"#,
        r#"< {"return": "fast", "id": 3}"#,
    ]);
    let mut qmp = Qmp::negotiate(stream, soon()).unwrap();
    qmp.set_command_timeout(Duration::from_millis(10));
    assert!(
        matches!(qmp.execute("slow", Value::Null), Err(QmpError::Timeout { command }) if command == "slow")
    );
    qmp.set_command_timeout(COMMAND_TIMEOUT);
    assert_eq!(qmp.execute("fast", Value::Null).unwrap(), "fast");
}

#[test]
fn a_command_that_was_sent_can_be_waited_for_again_after_a_timeout() {
    let (stream, _player) = monitor(&[
        r#"> {"execute":"a","id":2}"#,
        r#"> {"execute":"b","id":3}"#,
        r#"< {"return": 1, "id": 2}"#,
        r#"< {"return": 2, "id": 3}"#,
    ]);
    let mut qmp = Qmp::negotiate(stream, soon()).unwrap();
    qmp.send("a", Value::Null, &[]).unwrap();
    assert!(matches!(
        qmp.next_reply(Instant::now()),
        Err(QmpError::Timeout { .. })
    ));
    qmp.send("b", Value::Null, &[]).unwrap();
    assert_eq!(qmp.next_reply(soon()).unwrap(), 1);
    assert_eq!(qmp.next_reply(soon()).unwrap(), 2);
}

#[test]
fn a_line_that_is_no_json_is_a_named_error() {
    let (stream, _player) = monitor(&[r#"> {"execute":"x","id":2}"#, "< {\"return\": {"]);
    let mut qmp = Qmp::negotiate(stream, soon()).unwrap();
    assert!(matches!(qmp.execute("x", Value::Null), Err(QmpError::Line(_))));
}

#[test]
fn a_monitor_that_never_greets_is_reported_as_held_by_another_client() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let deadline = Instant::now() + Duration::from_millis(20);
    assert!(matches!(
        Qmp::negotiate(ours, deadline),
        Err(QmpError::NoGreeting)
    ));
}

#[test]
fn a_flood_of_events_costs_bounded_memory_and_is_counted() {
    let (stream, player) = monitor(&[]);
    let mut qmp = Qmp::negotiate(stream, soon()).unwrap();
    let mut theirs = player.join().unwrap();
    let writer = thread::spawn(move || {
        for _ in 0..EVENTS_MAX + 3 {
            writeln!(
                theirs,
                r#"{{"timestamp": {{"seconds": 1, "microseconds": 1}}, "event": "X"}}"#
            )
            .unwrap();
        }
        theirs
    });
    while qmp.events_lost < 3 {
        assert!(qmp.pump(soon()).unwrap());
    }
    assert_eq!(
        (qmp.events.len(), qmp.take_events_lost(), qmp.take_events_lost()),
        (EVENTS_MAX, 3, 0)
    );
    drop(writer.join());
}

#[test]
fn a_line_without_an_end_is_refused_at_the_limit() {
    let (stream, player) = monitor(&[]);
    let mut qmp = Qmp::negotiate(stream, soon()).unwrap();
    let mut theirs = player.join().unwrap();
    let writer = thread::spawn(move || {
        let chunk = vec![b' '; 1 << 20];
        while theirs.write_all(&chunk).is_ok() {}
    });
    assert!(matches!(qmp.next_event(soon()), Err(QmpError::LineTooLong)));
    drop(qmp);
    writer.join().unwrap();
}

#[test]
fn file_descriptors_arrive_with_the_command() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (passed, mut kept) = UnixStream::pair().unwrap();
    write_all(&ours, b"{}\n", &[passed.as_fd()], "getfd", soon()).unwrap();
    drop(passed);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0u8; 16];
    let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
    rustix::net::recvmsg(
        &theirs,
        &mut slices,
        &mut ancillary,
        rustix::net::RecvFlags::empty(),
    )
    .unwrap();
    let fd = ancillary
        .drain()
        .find_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .expect("an fd came along");
    kept.write_all(b"x").unwrap();
    let mut byte = [0u8];
    UnixStream::from(fd).read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}
