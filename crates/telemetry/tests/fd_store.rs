//! What reaches systemd when a file is stored, seen by a stand-in for it.

use std::fs::File;
use std::io::{IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use romulus_telemetry::FdStore;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

const NAME: &str = "image/web/layout";
/// Far longer than a process takes on the most loaded machine.
const LONG: Duration = Duration::from_secs(60);

/// The next note and the files with it.
fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let mut files = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds);
        }
    }
    (String::from_utf8(text[..received.bytes].to_vec()).unwrap(), files)
}

/// The daemon's part of the test, in a process of its own because of its environment.
fn daemon() {
    let store = FdStore::of_this_unit().expect("the test has made one");
    assert_eq!(store.files_max(), 7);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"kept").unwrap();
    store.keep(NAME, file.as_fd()).unwrap();
    store.remove("image/web/commit").unwrap();
    store.barrier().unwrap();
}

#[test]
fn a_stored_file_reaches_systemd_and_the_barrier_waits_until_it_was_seen_to() {
    if std::env::var_os("ROMULUS_TEST_DAEMON").is_some() {
        return daemon();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_stored_file_reaches_systemd_and_the_barrier_waits_until_it_was_seen_to",
        ])
        .env("ROMULUS_TEST_DAEMON", "1")
        .env("NOTIFY_SOCKET", &path)
        .env("FDSTORE", "7")
        .spawn()
        .unwrap();
    let (note, mut files) = receive(&socket);
    assert_eq!(note, format!("FDSTORE=1\nFDNAME={NAME}\nFDPOLL=0\n"));
    let mut kept = File::from(files.pop().unwrap());
    assert!(files.is_empty());
    assert_eq!(receive(&socket).0, "FDSTOREREMOVE=1\nFDNAME=image/web/commit\n");
    let (note, barrier) = receive(&socket);
    assert_eq!((note.as_str(), barrier.len()), ("BARRIER=1\n", 1));
    assert!(child.try_wait().unwrap().is_none(), "it waits for us");
    drop(barrier);
    assert!(child.wait().unwrap().success());
    // The file is ours now, and its content outlived the daemon.
    let mut content = String::new();
    kept.rewind().unwrap();
    kept.read_to_string(&mut content).unwrap();
    assert_eq!(content, "kept");
}
