//! Whatever a VMM sends, the sidecar's end answers with a named error. Against a thread that plays the VMM badly.

mod common;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::LONG;
use romulus_vmm_attach::channel::{Channel, ChannelError};
use romulus_vmm_attach::client::{Attachment, Client, ClientError};
use romulus_vmm_attach::fake::fake_info;
use romulus_vmm_attach::memfd;
use romulus_vmm_attach::proto::{
    Captured, ErrorCode, Event, MachineInfo, Paused, Refusal, Reply, Role, VERSION, Welcome,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

fn welcome() -> Welcome {
    let machine = fake_info(&[70]);
    Welcome {
        version: VERSION,
        vmm: "liar".into(),
        vmm_version: "1".into(),
        role: Role::Running,
        bitmap_bytes: machine.bitmap_bytes(),
        machine: Some(machine),
        state_bytes_max: 4096,
        pause_limit_ns_max: 1_000_000_000,
        halt_limit_ns: 1_000_000_000,
    }
}

/// The files that belong to it.
fn files() -> Vec<OwnedFd> {
    vec![
        memfd::sealed("memory", 70 * 4096).unwrap(),
        memfd::sealed("bitmap", 16).unwrap(),
        memfd::sealed("state", 4096).unwrap(),
    ]
}

/// A VMM that answers each request with the next of these, whatever was asked.
struct Liar {
    thread: JoinHandle<()>,
    stream: Option<UnixStream>,
}

type Answer = (Vec<Vec<u8>>, Vec<OwnedFd>);

impl Liar {
    fn with(answers: Vec<Answer>) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(theirs);
        let play = move || {
            for (messages, files) in answers {
                if channel.receive(LONG, LONG).is_err() {
                    return;
                }
                let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
                for (index, message) in messages.iter().enumerate() {
                    let beside = if index == 0 { &files[..] } else { &[] };
                    let _ = channel.send(message, beside, LONG);
                }
            }
            let _ = channel.receive(LONG, LONG);
        };
        Self {
            thread: thread::spawn(play),
            stream: Some(ours),
        }
    }

    fn meet(&mut self) -> Result<(Client, Attachment), ClientError> {
        Client::over(self.stream.take().unwrap(), "test", LONG)
    }

    fn end(self) {
        self.thread.join().unwrap();
    }
}

fn say(number: u32, reply: &Reply) -> Vec<u8> {
    reply.encode(number).unwrap()
}

fn honest_welcome() -> Answer {
    (vec![say(1, &Reply::Welcome(welcome()))], files())
}

/// What a client makes of this first answer.
fn met(messages: Vec<Vec<u8>>, files: Vec<OwnedFd>) -> ClientError {
    let mut liar = Liar::with(vec![(messages, files)]);
    let error = liar.meet().map(|_| ()).unwrap_err();
    liar.end();
    error
}

/// What a client makes of these answers to `Arm`.
fn armed(messages: Vec<Vec<u8>>) -> ClientError {
    let mut liar = Liar::with(vec![honest_welcome(), (messages, Vec::new())]);
    let (mut client, _) = liar.meet().unwrap();
    let error = client.arm().unwrap_err();
    assert!(matches!(client.arm(), Err(ClientError::Broken)), "{error}");
    drop(client);
    liar.end();
    error
}

#[test]
fn a_welcome_with_too_few_or_too_many_files_is_refused() {
    let welcomed = || vec![say(1, &Reply::Welcome(welcome()))];
    for count in [0, 2, 4] {
        let mut some = files();
        some.push(memfd::sealed("another", 4096).unwrap());
        some.truncate(count);
        let error = met(welcomed(), some);
        let named = matches!(&error, ClientError::Descriptors { reply: "Welcome", came, wanted: 3 } if *came == count);
        assert!(named, "{error}");
    }
}

#[test]
fn files_that_are_too_short_of_the_wrong_kind_or_could_shrink_are_refused() {
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let unsealed = || {
        let file = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 1 << 20).unwrap();
        file
    };
    let ordinary = || {
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        ftruncate(&file, 1 << 20).unwrap();
        file
    };
    let wrong: [(usize, OwnedFd, &str); 7] = [
        (
            0,
            memfd::sealed("short", 70 * 4096 - 1).unwrap(),
            "memory region \"ram0\" has 286719 bytes",
        ),
        (0, unsealed(), "memory region \"ram0\" is not sealed"),
        (0, reader, "not that of a regular file"),
        (
            1,
            memfd::sealed("short", 15).unwrap(),
            "the dirty bitmap has 15 bytes",
        ),
        (1, unsealed(), "the dirty bitmap is not sealed"),
        (1, ordinary(), "the dirty bitmap is not sealed"),
        (
            2,
            memfd::sealed("short", 4095).unwrap(),
            "the state has 4095 bytes",
        ),
    ];
    for (place, file, says) in wrong {
        let mut all = files();
        all[place] = file;
        let error = met(vec![say(1, &Reply::Welcome(welcome()))], all);
        let ClientError::File(file) = &error else {
            panic!("{error}");
        };
        assert!(file.to_string().contains(says), "{file}");
    }
    // The memory of a guest that was taken over lies in ordinary files.
    let mut all = files();
    all[0] = ordinary();
    let mut liar = Liar::with(vec![(vec![say(1, &Reply::Welcome(welcome()))], all)]);
    drop(liar.meet().unwrap());
    liar.end();
}

#[test]
fn answers_to_another_question_are_refused() {
    let error = met(vec![say(1, &Reply::Armed)], Vec::new());
    assert!(
        matches!(
            error,
            ClientError::Unexpected {
                request: "Hello",
                reply: "Armed"
            }
        ),
        "{error}"
    );
    let error = armed(vec![say(2, &Reply::Halted)]);
    assert!(
        matches!(
            error,
            ClientError::Unexpected {
                request: "Arm",
                reply: "Halted"
            }
        ),
        "{error}"
    );
    let error = armed(vec![say(77, &Reply::Armed)]);
    assert!(matches!(error, ClientError::Unexpected { .. }), "{error}");
    let error = armed(vec![say(2, &Reply::Welcome(welcome()))]);
    assert!(
        matches!(error, ClientError::Descriptors { came: 0, .. }),
        "{error}"
    );
}

#[test]
fn answers_that_are_none_are_refused() {
    let error = armed(vec![b"HTTP/1.1 200 OK\r\n".to_vec()]);
    assert!(
        matches!(error, ClientError::Channel(ChannelError::Proto(_))),
        "{error:?}"
    );
    let mut long = say(2, &Reply::Armed);
    long[8..12].copy_from_slice(&(1u32 << 30).to_le_bytes());
    let error = armed(vec![long]);
    assert!(
        matches!(error, ClientError::Channel(ChannelError::Proto(_))),
        "{error:?}"
    );
    let mut newer = say(2, &Reply::Armed);
    newer[4] = 2;
    let error = armed(vec![newer]);
    assert!(matches!(error, ClientError::Proto(_)), "{error:?}");
    let half = say(2, &Reply::Error(Refusal::new(9.into(), "something")));
    let error = armed(vec![half[..20].to_vec()]);
    assert!(
        matches!(error, ClientError::Channel(ChannelError::Unfinished { .. })),
        "{error:?}"
    );
}

#[test]
fn a_vmm_that_says_nothing_is_not_waited_for_for_ever() {
    let mut liar = Liar::with(vec![honest_welcome(), (Vec::new(), Vec::new())]);
    let (mut client, _) = liar.meet().unwrap();
    client.set_reply_limit(Duration::from_millis(20));
    assert!(matches!(
        client.arm(),
        Err(ClientError::NoAnswer { request: "Arm", .. })
    ));
    drop(client);
    liar.end();
}

#[test]
fn a_vmm_that_hangs_up_is_told_from_one_that_refuses() {
    let mut liar = Liar::with(vec![honest_welcome()]);
    let (mut client, _) = liar.meet().unwrap();
    let _ = client.alive();
    liar.end();
    assert!(matches!(
        client.arm(),
        Err(ClientError::Channel(ChannelError::Closed))
    ));
}

#[test]
fn a_vmm_that_has_no_place_is_heard_although_it_hung_up_before_the_hello() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let busy = Reply::Error(Refusal::new(
        ErrorCode::Busy,
        "another client is attached".to_owned(),
    ));
    Channel::new(theirs).send(&say(0, &busy), &[], LONG).unwrap();
    let refused = Client::over(ours, "late", LONG);
    assert!(matches!(refused, Err(ClientError::Busy { .. })), "{refused:?}");
}

#[test]
fn a_flood_of_events_is_cut_off() {
    let events = vec![say(0, &Reply::Event(Event::Reset)); 300];
    let error = armed(events);
    assert!(matches!(error, ClientError::TooManyEvents), "{error}");
}

#[test]
fn a_state_that_is_not_there_is_not_read() {
    let paused = Reply::Paused(Paused {
        stopped_at_ns: 1,
        kick_ns: 1,
        harvest_ns: 1,
        dirty_pages: 1,
    });
    for state_bytes in [4097, u64::MAX] {
        let captured = Reply::Captured(Captured {
            state_bytes,
            capture_ns: 1,
        });
        let mut liar = Liar::with(vec![
            honest_welcome(),
            (vec![say(2, &paused), say(2, &captured)], Vec::new()),
        ]);
        let (mut client, _) = liar.meet().unwrap();
        client.pause(LONG).unwrap();
        let captured = client.captured().unwrap();
        let mut state = Vec::new();
        let error = client.read_state(&captured, &mut state).unwrap_err();
        assert!(
            matches!(error, ClientError::State(_)) && state.capacity() == 0,
            "{error}"
        );
        drop(client);
        liar.end();
    }
}

#[test]
fn a_machine_that_cannot_be_is_refused() {
    let machine = MachineInfo {
        vcpus: 0,
        ..fake_info(&[70])
    };
    let lie = Welcome {
        machine: Some(machine),
        ..welcome()
    };
    let error = met(vec![say(1, &Reply::Welcome(lie))], files());
    assert!(matches!(error, ClientError::Proto(_)), "{error}");
}
