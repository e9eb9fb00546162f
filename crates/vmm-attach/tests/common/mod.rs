//! A fake VMM behind a server, and hands to touch it with.
#![allow(dead_code, reason = "each test file uses some of it")]

pub mod shadow;

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use romulus_vmm_attach::channel::{Channel, Incoming};
use romulus_vmm_attach::client::{Attachment, Client};
use romulus_vmm_attach::fake::{FAKE_VMM, FakeMachine};
use romulus_vmm_attach::proto::{ErrorCode, Hello, Reply, Request, Role, Versions};
use romulus_vmm_attach::server::{Events, ServeOptions, ServerHandle, bind, serve};
use tempfile::TempDir;

/// Long enough for anything on a busy machine.
pub const LONG: Duration = Duration::from_secs(30);
/// Between two steps of the guest.
pub const PACE: Duration = Duration::from_micros(200);
/// The regions' pages; neither fills its last word of the bitmap.
pub const PAGES: [u64; 2] = [70, 33];

/// A VMM.
pub struct Vmm {
    pub machine: Arc<FakeMachine>,
    pub events: Events,
    pub socket: PathBuf,
    pub server: ServerHandle,
    _folder: TempDir,
}

/// One with a guest.
pub fn running(change: impl FnOnce(&mut ServeOptions)) -> Vmm {
    start(FakeMachine::running(&PAGES, PACE), Role::Running, change)
}

/// One without.
pub fn empty() -> Vmm {
    start(FakeMachine::empty(PACE), Role::Empty, |_| {})
}

fn start(machine: Arc<FakeMachine>, role: Role, change: impl FnOnce(&mut ServeOptions)) -> Vmm {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("attach.sock");
    let events = Events::new().unwrap();
    let mut options = ServeOptions::new(FAKE_VMM, "1", events.clone());
    options.pause_limit_max = LONG;
    change(&mut options);
    let server = serve(bind(&socket).unwrap(), role, machine.clone(), options).unwrap();
    Vmm {
        machine,
        events,
        socket,
        server,
        _folder: folder,
    }
}

impl Vmm {
    /// A client, as soon as the last one's place is free.
    pub fn client(&self) -> (Client, Attachment) {
        let until = Instant::now() + LONG;
        loop {
            match Client::connect(&self.socket, "test", LONG) {
                Ok(attached) => return attached,
                Err(error) => assert!(Instant::now() < until, "no place for a client: {error}"),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// A client that may send whatever it likes.
    pub fn raw(&self) -> Channel {
        Channel::new(UnixStream::connect(&self.socket).unwrap())
    }

    /// The same, after its welcome.
    pub fn raw_welcomed(&self) -> Channel {
        loop {
            let raw = self.raw();
            say(&raw, 1, &hello(), &[]);
            match next(&raw) {
                Reply::Welcome(_) => return raw,
                Reply::Error(refusal) => assert_eq!(refusal.code, ErrorCode::Busy),
                other => panic!("{other:?}"),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The guest does something.
    pub fn runs(&self) {
        let before = self.machine.steps();
        wait("the guest runs", || self.machine.steps() > before);
    }

    /// It does nothing for a while.
    pub fn stands_still(&self) {
        let before = self.machine.steps();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(self.machine.steps(), before, "the guest runs where it must not");
    }

    /// A good client is served and the guest runs: nothing of what came before is left.
    pub fn is_well(&self) {
        let (mut client, attachment) = self.client();
        assert_eq!(attachment.welcome.role, Role::Running);
        self.runs();
        client.arm().unwrap();
        client.pause(LONG).unwrap();
        client.captured().unwrap();
        client.resume().unwrap();
        client.detach().unwrap();
        self.runs();
        wait("the tracking ends", || !self.machine.is_armed());
    }
}

/// Waits for something that must become true.
pub fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < until, "it never happened that {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A proper first message.
pub fn hello() -> Request {
    Request::Hello(Hello {
        versions: Versions { min: 1, max: 1 },
        client: "raw".into(),
    })
}

/// Sends a proper message with whatever descriptors.
pub fn say(raw: &Channel, number: u32, request: &Request, descriptors: &[BorrowedFd<'_>]) {
    raw.send(&request.encode(number).unwrap(), descriptors, LONG)
        .unwrap();
}

/// The next answer.
pub fn next(raw: &Channel) -> Reply {
    let Incoming { header, payload, .. } = raw.receive(LONG, LONG).unwrap().expect("an answer comes");
    Reply::decode(&header, &payload).unwrap()
}

/// The next answer is a refusal with this code, and says this.
pub fn refused(raw: &Channel, code: ErrorCode, says: &str) {
    match next(raw) {
        Reply::Error(refusal) => {
            assert_eq!(refusal.code, code, "{}", refusal.text);
            assert!(
                refusal.text.contains(says),
                "{:?} does not say {says:?}",
                refusal.text
            );
        }
        other => panic!("{other:?} instead of {code:?}"),
    }
}

/// The connection has ended.
pub fn closed(raw: &Channel) {
    use romulus_vmm_attach::channel::ChannelError;
    let end = raw.receive(LONG, LONG);
    assert!(matches!(end, Err(ChannelError::Closed)), "{end:?}");
}
