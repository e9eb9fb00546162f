use std::os::fd::OwnedFd;

use vm_memory::{Bytes, GuestAddress};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::virtio::driver::{Driver, Memory, memory};

/// A network device whose tap is a pair of sockets; the other end is the network.
fn device() -> (Net, OwnedFd, Memory) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (tap, network) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (
        Net::new(tap, "02:00:00:00:00:02".parse().unwrap()),
        network,
        memory(),
    )
}

fn frame_from_network(bytes: usize) -> Vec<u8> {
    let frame = (0..bytes).map(|at| at.to_le_bytes()[0]);
    [0; TAP_HEADER_BYTES].into_iter().chain(frame).collect()
}

#[test]
fn a_frame_from_the_network_reaches_the_guest() {
    let (mut net, network, memory) = device();
    let mut driver = Driver::new(&memory, 0x10000);
    let head = driver.offer(&[(0x20000, 12, true), (0x30000, 2000, true)]);
    let mut queue = driver.queue();
    let frame = frame_from_network(100);
    rustix::io::write(&network, &frame).unwrap();
    assert_eq!(net.serve(RECEIVE, &mut queue, &memory).unwrap(), Served::Answered);
    assert_eq!(driver.used(), [(u32::from(head), 112)]);
    assert_eq!(driver.read(0x30000, 100), &frame[TAP_HEADER_BYTES..]);
    assert_eq!(
        driver.read(0x20000, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        "one buffer"
    );
}

#[test]
fn a_frame_without_room_in_the_guest_stays_in_the_tap() {
    let (mut net, network, memory) = device();
    let mut driver = Driver::new(&memory, 0x10000);
    let mut queue = driver.queue();
    rustix::io::write(&network, &frame_from_network(60)).unwrap();
    assert_eq!(
        net.serve(RECEIVE, &mut queue, &memory).unwrap(),
        Served::NoRequest
    );
    driver.offer(&[(0x20000, 2000, true)]);
    assert_eq!(net.serve(RECEIVE, &mut queue, &memory).unwrap(), Served::Answered);
    driver.offer(&[(0x20000, 2000, true)]);
    assert_eq!(net.serve(RECEIVE, &mut queue, &memory).unwrap(), Served::NoInput);
}

#[test]
fn a_frame_longer_than_the_guests_buffer_is_dropped_and_the_buffer_used_for_the_next() {
    let (mut net, network, memory) = device();
    let mut driver = Driver::new(&memory, 0x10000);
    driver.offer(&[(0x20000, 100, true)]);
    let mut queue = driver.queue();
    rustix::io::write(&network, &frame_from_network(500)).unwrap();
    rustix::io::write(&network, &frame_from_network(60)).unwrap();
    assert_eq!(net.serve(RECEIVE, &mut queue, &memory).unwrap(), Served::Dropped);
    assert_eq!(net.serve(RECEIVE, &mut queue, &memory).unwrap(), Served::Answered);
    assert_eq!(driver.used(), [(0, 72)]);
}

#[test]
fn a_frame_from_the_guest_reaches_the_network_without_its_offload_header() {
    let (mut net, network, memory) = device();
    let mut driver = Driver::new(&memory, 0x10000);
    // A guest that asks for offloads that were never offered.
    driver.write(0x20000, &[0xff; 12]);
    driver.write(0x20000 + 12, b"0123456789abcdef");
    driver.offer(&[(0x20000, 28, false)]);
    assert_eq!(
        net.serve(TRANSMIT, &mut driver.queue(), &memory).unwrap(),
        Served::Answered
    );
    let mut got = [0; 100];
    let length = rustix::io::read(&network, &mut got[..]).unwrap();
    assert_eq!(
        got[..length],
        [[0; TAP_HEADER_BYTES].as_slice(), b"0123456789abcdef"].concat()
    );
}

#[test]
fn frames_of_impossible_length_are_faults() {
    let (mut net, _network, memory) = device();
    for bytes in [0, 12, 25, 70_000, u32::MAX] {
        let mut driver = Driver::new(&memory, 0x10000);
        driver.offer(&[(0x20000, bytes, false)]);
        let fault = net.serve(TRANSMIT, &mut driver.queue(), &memory).unwrap_err();
        assert!(matches!(fault, QueueFault::Length { .. }), "{bytes}: {fault}");
    }
}

#[test]
fn what_the_device_writes_is_in_the_dirty_bitmap() {
    use romulus_vmm_attach::memory::GuestRam;
    use romulus_vmm_attach::proto::Region;

    let region = Region {
        name: "ram".into(),
        gpa: 0,
        bytes: 4 << 20,
        fd_offset: 0,
    };
    let ram = GuestRam::create(&[region]).unwrap();
    let (mut net, network, plain) = device();
    let mut driver = Driver::new(&plain, 0x10000);
    driver.offer(&[(0x20ff0, 2000, true)]);
    // The driver's side is written as by vCPUs: not through the memory that the device has.
    let mut rings = vec![0; 0x3000];
    plain.read_slice(&mut rings, GuestAddress(0x10000)).unwrap();
    ram.memory().write_slice(&rings, GuestAddress(0x10000)).unwrap();
    ram.bitmap().clear();
    rustix::io::write(&network, &frame_from_network(100)).unwrap();
    assert_eq!(
        net.serve(RECEIVE, &mut driver.queue(), ram.memory()).unwrap(),
        Served::Answered
    );
    // The used ring, and both pages of the buffer.
    assert_eq!(ram.bitmap().take(0), 1 << 0x12 | 1 << 0x20 | 1 << 0x21);
    assert_eq!(ram.bitmap().count(), 0);
}

#[test]
fn a_network_that_takes_nothing_does_not_hold_the_guest_up() {
    let (mut net, network, memory) = device();
    drop(network);
    let mut driver = Driver::new(&memory, 0x10000);
    driver.offer(&[(0x20000, 28, false)]);
    assert_eq!(
        net.serve(TRANSMIT, &mut driver.queue(), &memory).unwrap(),
        Served::Answered
    );
}
