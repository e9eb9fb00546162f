//! Whatever a client sends, the VMM answers with a named error, keeps no more than one message, and its guest runs on. Against the
//! fake VMM.

mod common;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use common::{LONG, Vmm, closed, empty, hello, next, refused, running, say};
use romulus_vmm_attach::channel::Channel;
use romulus_vmm_attach::fake::fake_info;
use romulus_vmm_attach::memfd;
use romulus_vmm_attach::proto::{
    DESCRIPTORS_MAX, ErrorCode, HEADER_BYTES, Halt, Header, Hello, MachineInfo, Prepare, Reply, Request,
    Restore, VERSION, Versions,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::pipe::pipe;

/// Bytes that are not a message, and what the VMM says of them.
fn nonsense() -> Vec<(&'static str, Vec<u8>)> {
    let arm = Request::Arm.encode(2).unwrap();
    let changed = |at: usize, bytes: &[u8]| {
        let mut message = arm.clone();
        message[at..at + bytes.len()].copy_from_slice(bytes);
        message
    };
    vec![
        ("other bytes than RATT", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("over the limit", changed(8, &u32::MAX.to_le_bytes())),
        ("over the limit", changed(8, &(64 * 1024 + 1u32).to_le_bytes())),
        ("version 2", changed(4, &2u16.to_le_bytes())),
        ("kind 0x77", changed(6, &0x77u16.to_le_bytes())),
        ("kind 0x102", changed(6, &0x102u16.to_le_bytes())),
        (
            "3 bytes follow",
            [&changed(8, &3u32.to_le_bytes())[..], b"abc"].concat(),
        ),
        ("can't be read", changed(6, &0x04u16.to_le_bytes())),
    ]
}

#[test]
fn nonsense_is_refused_by_name_and_the_guest_runs() {
    let vmm = running(|_| {});
    for (says, bytes) in nonsense() {
        let raw = vmm.raw_welcomed();
        raw.send(&bytes, &[], LONG).unwrap();
        refused(&raw, ErrorCode::Malformed, says);
        closed(&raw);
    }
    vmm.is_well();
}

#[test]
fn nonsense_during_a_pause_ends_the_pause() {
    let vmm = running(|_| {});
    for (says, bytes) in nonsense() {
        let raw = paused(&vmm);
        raw.send(&bytes, &[], LONG).unwrap();
        refused(&raw, ErrorCode::Malformed, says);
        vmm.runs();
    }
    vmm.is_well();
}

fn paused(vmm: &Vmm) -> Channel {
    let raw = vmm.raw_welcomed();
    say(&raw, 2, &Request::Arm, &[]);
    let pause = romulus_vmm_attach::proto::Pause {
        limit_ns: 30_000_000_000,
    };
    say(&raw, 3, &Request::Pause(pause), &[]);
    let names: Vec<&str> = (0..3).map(|_| next(&raw).name()).collect();
    assert_eq!(names, ["Armed", "Paused", "Captured"]);
    raw
}

#[test]
fn a_client_of_another_version_is_told_both_versions() {
    let vmm = running(|_| {});
    for (min, max) in [(2, 9), (0, 0), (9, 2)] {
        let raw = vmm.raw();
        let hello = Request::Hello(Hello {
            versions: Versions { min, max },
            client: "newer".into(),
        });
        // Whatever its header says.
        let mut message = hello.encode(1).unwrap();
        message[4..6].copy_from_slice(&9u16.to_le_bytes());
        raw.send(&message, &[], LONG).unwrap();
        refused(&raw, ErrorCode::NoCommonVersion, &format!("{min} to {max}"));
        closed(&raw);
    }
    vmm.is_well();
}

#[test]
fn nothing_comes_before_hello_and_hello_comes_once() {
    let vmm = running(|_| {});
    let raw = vmm.raw();
    say(&raw, 1, &Request::Arm, &[]);
    refused(&raw, ErrorCode::WrongOrder, "Arm came before Hello");
    closed(&raw);
    let raw = vmm.raw_welcomed();
    say(&raw, 2, &hello(), &[]);
    refused(&raw, ErrorCode::WrongOrder, "Hello does not belong here");
    say(&raw, 3, &Request::Arm, &[]);
    assert_eq!(next(&raw), Reply::Armed, "the connection goes on");
}

#[test]
fn requests_in_the_wrong_order_change_nothing() {
    let info = || fake_info(&[4]);
    let file = memfd::sealed("memory", 4 * 4096).unwrap();
    let one = [file.as_fd()];
    let prepare = Request::Prepare(Prepare {
        machine: info(),
        private: false,
    });
    let restore = Request::Restore(Restore { state_bytes: 24 });
    let vmm = running(|_| {});
    let raw = vmm.raw_welcomed();
    let wrong: [(&Request, &[BorrowedFd<'_>]); 5] = [
        (&Request::Resume, &[]),
        (&Request::Go, &[]),
        (&Request::Activate, &[]),
        (&prepare, &one),
        (&restore, &one),
    ];
    for (request, files) in wrong {
        say(&raw, 2, request, files);
        refused(&raw, ErrorCode::WrongOrder, "the guest runs");
    }
    vmm.runs();
    drop(raw);
    let raw = paused(&vmm);
    for request in [Request::Arm, Request::Harvest, Request::Go] {
        say(&raw, 4, &request, &[]);
        refused(&raw, ErrorCode::WrongOrder, "the guest is paused");
    }
    vmm.stands_still();
    say(&raw, 5, &Request::Resume, &[]);
    assert_eq!(next(&raw).name(), "Resumed");

    let vmm = empty();
    let raw = vmm.raw_welcomed();
    for request in [Request::Resume, Request::Activate] {
        say(&raw, 2, &request, &[]);
        refused(&raw, ErrorCode::WrongOrder, "waits for Prepare");
    }
    say(&raw, 3, &Request::Arm, &[]);
    refused(&raw, ErrorCode::WrongOrder, "connect anew");
}

#[test]
fn a_wrong_number_of_descriptors_is_refused() {
    let vmm = empty();
    let file = memfd::sealed("memory", 4 * 4096).unwrap();
    let prepare = Request::Prepare(Prepare {
        machine: fake_info(&[4]),
        private: false,
    });
    let restore = Request::Restore(Restore { state_bytes: 1 });
    for (request, count) in [
        (&prepare, 0),
        (&prepare, 2),
        (&restore, 0),
        (&restore, 2),
        (&Request::Detach, 1),
    ] {
        let raw = vmm.raw_welcomed();
        say(&raw, 2, request, &vec![file.as_fd(); count]);
        refused(
            &raw,
            ErrorCode::WrongDescriptors,
            &format!("brought {count} file descriptors"),
        );
        closed(&raw);
    }
}

#[test]
fn descriptors_in_the_middle_of_a_message_or_too_many_are_refused() {
    let vmm = running(|_| {});
    let file = memfd::sealed("something", 4096).unwrap();
    let raw = vmm.raw_welcomed();
    let halt = Request::Halt(Halt { for_good: false }).encode(2).unwrap();
    raw.send(&halt[..HEADER_BYTES], &[], LONG).unwrap();
    raw.send(&halt[HEADER_BYTES..], &[file.as_fd()], LONG).unwrap();
    refused(&raw, ErrorCode::WrongDescriptors, "in the middle");
    closed(&raw);
    let raw = vmm.raw_welcomed();
    let message = Request::Arm.encode(2).unwrap();
    raw.send(&message[..8], &[file.as_fd()], LONG).unwrap();
    raw.send(&message[8..], &[], LONG).unwrap();
    refused(&raw, ErrorCode::WrongDescriptors, "brought 1");

    // More than this side would send: from a socket without our checks.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let theirs = Channel::new(theirs);
    for (count, taken) in [
        (DESCRIPTORS_MAX, true),
        (DESCRIPTORS_MAX + 1, false),
        (200, false),
    ] {
        send_many(&ours, &message, &vec![file.as_fd(); count]);
        let came = theirs
            .receive(LONG, LONG)
            .map(|message| message.unwrap().descriptors.len());
        assert_eq!(came.is_ok_and(|came| came == count), taken, "{count}");
    }
    vmm.is_well();
}

fn send_many(socket: &std::os::unix::net::UnixStream, message: &[u8], files: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let rights = SendAncillaryMessage::ScmRights(files);
    let mut space = vec![std::mem::MaybeUninit::uninit(); rights.size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rights));
    sendmsg(
        socket,
        &[std::io::IoSlice::new(message)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
}

#[test]
fn files_of_the_wrong_kind_or_size_are_refused_by_the_regions_name() {
    let vmm = empty();
    let info = fake_info(&[4, 4]);
    let bytes = 4 * 4096;
    let good = memfd::sealed("good", bytes).unwrap();
    let short = memfd::sealed("short", bytes - 1).unwrap();
    let unsealed = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&unsealed, bytes).unwrap();
    let (reader, _writer) = pipe().unwrap();
    let folder: OwnedFd = std::fs::File::open("/").unwrap().into();
    let raw = vmm.raw_welcomed();
    let prepare = Request::Prepare(Prepare {
        machine: info,
        private: false,
    });
    let wrong = [
        (&short, "has 16383 bytes, but 16384 are needed"),
        (&unsealed, "is not sealed"),
        (&reader, "not that of a regular file"),
        (&folder, "not that of a regular file"),
    ];
    for (file, says) in wrong {
        say(&raw, 2, &prepare, &[good.as_fd(), file.as_fd()]);
        refused(&raw, ErrorCode::WrongDescriptors, says);
        say(&raw, 2, &prepare, &[good.as_fd(), file.as_fd()]);
        refused(&raw, ErrorCode::WrongDescriptors, "memory region \"ram1\"");
    }
    // An ordinary file, which can't be sealed.
    let ordinary: OwnedFd = tempfile::tempfile().unwrap().into();
    ftruncate(&ordinary, bytes).unwrap();
    say(&raw, 3, &prepare, &[good.as_fd(), ordinary.as_fd()]);
    assert_eq!(next(&raw), Reply::Prepared);
    let state = memfd::sealed_with("state", b"24 bytes and nothing else").unwrap();
    for (state_bytes, code, says) in [
        (u64::MAX, ErrorCode::OutOfRange, "over the limit"),
        ((16 << 20) + 1, ErrorCode::OutOfRange, "over the limit"),
        (26, ErrorCode::WrongDescriptors, "has 25 bytes, but 26"),
        (24, ErrorCode::MachineFailed, "not of one moment"),
        (3, ErrorCode::MachineFailed, "not as long as"),
    ] {
        say(
            &raw,
            4,
            &Request::Restore(Restore { state_bytes }),
            &[state.as_fd()],
        );
        refused(&raw, code, says);
    }
    say(
        &raw,
        5,
        &Request::Restore(Restore { state_bytes: 0 }),
        &[reader.as_fd()],
    );
    refused(&raw, ErrorCode::WrongDescriptors, "not that of a regular file");
}

#[test]
fn machines_that_cannot_be_are_refused() {
    let vmm = empty();
    let file = memfd::sealed("memory", 4 * 4096).unwrap();
    let change = |change: &dyn Fn(&mut MachineInfo)| {
        let mut info = fake_info(&[4]);
        change(&mut info);
        info
    };
    let wrong: [(&str, MachineInfo); 8] = [
        ("0 vCPUs", change(&|info| info.vcpus = 0)),
        ("whole pages", change(&|info| info.regions[0].bytes += 1)),
        ("whole pages", change(&|info| info.regions[0].bytes = 0)),
        (
            "whole pages",
            change(&|info| info.regions[0].gpa = u64::MAX - 4095),
        ),
        (
            "whole pages",
            change(&|info| info.regions[0].fd_offset = u64::MAX - 4095),
        ),
        ("over the limit", change(&|info| info.regions[0].bytes = 17 << 40)),
        (
            "bytes of configuration",
            change(&|info| info.config = vec![0; 32 * 1024 + 1]),
        ),
        ("used twice", change(&|info| info.vmm = String::new())),
    ];
    for (says, machine) in wrong {
        let raw = vmm.raw_welcomed();
        let prepare = Request::Prepare(Prepare {
            machine,
            private: false,
        });
        say(&raw, 2, &prepare, &[file.as_fd()]);
        refused(&raw, ErrorCode::Malformed, says);
        closed(&raw);
    }
    let raw = vmm.raw_welcomed();
    let prepare = Request::Prepare(Prepare {
        machine: change(&|info| info.vmm = "qemu".into()),
        private: false,
    });
    say(&raw, 2, &prepare, &[file.as_fd()]);
    refused(&raw, ErrorCode::MachineFailed, "the machine is of \"qemu\"");
}

#[test]
fn a_client_that_says_nothing_or_half_a_message_loses_its_place() {
    let vmm = running(|options| {
        options.hello_limit = Duration::from_millis(50);
        options.message_limit = Duration::from_millis(50);
    });
    let silent = vmm.raw();
    closed(&silent);
    let half = vmm.raw_welcomed();
    half.send(&Request::Arm.encode(2).unwrap()[..HEADER_BYTES - 1], &[], LONG)
        .unwrap();
    closed(&half);
    let half = vmm.raw_welcomed();
    let header = Header {
        version: VERSION,
        kind: 4,
        length: 5000,
        number: 2,
    };
    half.send(&header.encode(), &[], LONG).unwrap();
    closed(&half);
    // One that was welcomed may be silent for as long as it likes.
    let quiet = vmm.raw_welcomed();
    std::thread::sleep(Duration::from_millis(200));
    say(&quiet, 2, &Request::Arm, &[]);
    assert_eq!(next(&quiet), Reply::Armed);
}

#[test]
fn many_connections_at_once_cost_one_place() {
    let vmm = running(|_| {});
    let first = paused(&vmm);
    let others: Vec<Channel> = (0..100).map(|_| vmm.raw()).collect();
    for other in &others {
        refused(other, ErrorCode::Busy, "raw");
        closed(other);
    }
    vmm.stands_still();
    say(&first, 4, &Request::Resume, &[]);
    assert_eq!(next(&first).name(), "Resumed");
}
