//! A small network for one test, in a network namespace of the test's own thread: nothing outside sees it, nothing is left of it.
//!
//! ```text
//!   guest (the test, holding the tap's fd) ── nbg0 ─┐
//!                                                   ├─ bridge nbbr0
//!   client (the test, too) ─────────────────  nbc0 ─┘
//! ```
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::process::Command;
use std::time::Duration;

use net_buffer::{Gate, GateOptions};
use romulus_host_sys::netns;
use romulus_host_sys::tap::{Tap, VNET_HEADER_BYTES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x99, 0, 2];
pub const CLIENT: [u8; 6] = [0x52, 0x54, 0, 0x99, 0, 1];
pub const NO_OFFLOAD: [u8; VNET_HEADER_BYTES] = [0; VNET_HEADER_BYTES];

pub struct Lab {
    pub guest: Tap,
    pub client: Tap,
}

/// Waits until `condition` holds. A tap that was closed can live a moment longer: a child that another test is just starting
/// has a copy of the descriptor until it executes its program.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what} did not happen");
}

/// Removes a gate whose process, or whose value, is gone.
pub fn remove_stale() {
    eventually("removing a stale gate", || match Gate::remove_stale("nbg0") {
        Ok(found) => found,
        Err(net_buffer::GateError::InUse { .. }) => false,
        Err(error) => panic!("{error:?}"),
    });
}

/// Runs a command and returns what it printed.
pub fn run(command: &str) -> String {
    run_with(command, &[])
}

/// Runs a command with further arguments, which may hold spaces.
pub fn run_with(command: &str, arguments: &[&str]) -> String {
    let words: Vec<_> = command.split_whitespace().collect();
    let mut child = Command::new(words[0]);
    let output = child.args(&words[1..]).args(arguments).output().expect(command);
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Lab {
    pub fn new() -> Self {
        Self::with_guest_header(true)
    }

    pub fn with_guest_header(vnet_header: bool) -> Self {
        netns::enter_new().expect("the tests need root");
        for which in ["all", "default"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1").unwrap();
        }
        run("ip link add nbbr0 type bridge mcast_snooping 0");
        run("ip link set nbbr0 up");
        let guest = Tap::create("nbg0", vnet_header).unwrap();
        let client = Tap::create("nbc0", true).unwrap();
        for name in ["nbg0", "nbc0"] {
            run(&format!("ip link set {name} master nbbr0 up"));
        }
        Self { guest, client }
    }

    pub fn gate(&self) -> Gate {
        Gate::prepare(&GateOptions::new("nbg0")).unwrap()
    }

    pub fn closed_gate(&self) -> Gate {
        let gate = self.gate();
        gate.close().unwrap();
        gate
    }

    /// The guest sends a frame without offloads.
    pub fn guest_sends(&self, frame: &[u8]) {
        send(&self.guest, &NO_OFFLOAD, frame);
    }

    /// What the client's tap has of the guest now. A frame that leaks is there as soon as the guest's write returns, as
    /// the kernel forwards it within that call.
    pub fn client_has(&self) -> Vec<Vec<u8>> {
        received(&self.client)
            .into_iter()
            .map(|(_, frame)| frame)
            .collect()
    }

    /// Waits until the client has got `count` frames of the guest.
    pub fn client_gets(&self, count: usize) -> Vec<Vec<u8>> {
        receive(&self.client, count)
            .into_iter()
            .map(|(_, frame)| frame)
            .collect()
    }
}

pub fn send(tap: &Tap, header: &[u8], frame: &[u8]) {
    let bytes = [header, frame].concat();
    assert_eq!(rustix::io::write(tap, &bytes).unwrap(), bytes.len());
}

/// Reads what there is: (header, frame) of frames from the guest's MACs (52:54:00:99:00:02 and up).
pub fn received(tap: &Tap) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut all = Vec::new();
    let mut bytes = vec![0; 128 * 1024];
    loop {
        match rustix::io::read(tap, &mut bytes[..]) {
            Ok(n) => {
                let (header, frame) = bytes[..n].split_at(VNET_HEADER_BYTES);
                if frame[6..11] == GUEST[..5] && frame[11] >= GUEST[5] {
                    all.push((header.to_vec(), frame.to_vec()));
                }
            }
            Err(rustix::io::Errno::AGAIN) => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Waits for `count` frames, at most 10 s.
pub fn receive(tap: &Tap, count: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut all = received(tap);
    while all.len() < count {
        let timeout = Timespec::try_from(Duration::from_secs(10)).unwrap();
        let ready = poll(&mut [PollFd::new(tap, PollFlags::IN)], Some(&timeout)).unwrap();
        assert!(ready > 0, "{} of {count} frames came", all.len());
        all.extend(received(tap));
    }
    all
}

/// An Ethernet frame of a protocol that nobody knows.
pub fn frame(text: &str) -> Vec<u8> {
    frame_from(GUEST, text.as_bytes())
}

pub fn frame_from(mac: [u8; 6], payload: &[u8]) -> Vec<u8> {
    ethernet(&[0xff; 6], &mac, &[0x88, 0xb5], payload)
}

pub fn ethernet(to: &[u8], from: &[u8], kind: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from, kind, payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |b| u32::from(*b)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// An IPv4 packet (no options) that carries `data`.
fn ipv4(protocol: u8, to: [u8; 4], data: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend(u16::try_from(20 + data.len()).unwrap().to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 99, 0, 2]);
    ip.extend(to);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(data);
    ip
}

/// A UDP datagram without checksum to 224.0.0.5.
pub fn multicast() -> Vec<u8> {
    datagram(&[1, 0, 0x5e, 0, 0, 5], [224, 0, 0, 5], b"many")
}

/// A UDP datagram without checksum to port 80 of a host.
pub fn datagram(mac: &[u8; 6], to: [u8; 4], data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap().to_be_bytes();
    let udp = [&[4, 210, 0, 80][..], &length, &[0, 0], data].concat();
    ethernet(mac, &GUEST, &[8, 0], &ipv4(17, to, &udp))
}

/// A TCP segment of 8,000 bytes over IPv4 that asks to be cut into 1,448-byte segments: header and frame.
pub fn large_tcp() -> (Vec<u8>, Vec<u8>) {
    let data = vec![b'x'; 8000];
    let tcp = [
        4, 210, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ];
    let frame = ethernet(
        &CLIENT,
        &GUEST,
        &[8, 0],
        &ipv4(6, [10, 99, 0, 1], &[&tcp[..], &data].concat()),
    );
    // NEEDS_CSUM, TCPv4, header length 54, segment 1448, checksum from 34 on at +16.
    let mut header = vec![1, 1];
    for field in [54u16, 1448, 34, 16] {
        header.extend(field.to_le_bytes());
    }
    (header, frame)
}
