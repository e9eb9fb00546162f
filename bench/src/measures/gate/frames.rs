//! The frames that are sent through: each has a number, and every byte of it follows from that.

use romulus_host_sys::tap::{Tap, VNET_HEADER_BYTES};

use crate::run::Unable;

pub(super) const ETHERNET_BYTES: usize = 14;
/// IPv4 and TCP, without options.
const SEGMENT_HEADER_BYTES: usize = 20 + 20;
const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x99, 0, 2];
const CLIENT: [u8; 6] = [0x52, 0x54, 0, 0x99, 0, 1];
/// An Ethernet protocol for local experiments: the kernel looks into no such frame.
const LOCAL_EXPERIMENT: [u8; 2] = [0x88, 0xb5];
const IPV4: [u8; 2] = [8, 0];
/// What an unsegmented packet is to be cut into, if somebody has to.
const SEGMENT_BYTES: u16 = 1448;
/// A 64 KiB packet with its headers.
const FRAME_BYTES_MAX: usize = 128 << 10;

/// One kind of frame, written and looked at in place.
pub(super) struct Frames {
    /// With the virtio-net header in front.
    sent: Vec<u8>,
    got: Vec<u8>,
    /// Where the number is, and what follows from it.
    body: usize,
    next_sent: u64,
    next_got: u64,
}

impl Frames {
    /// Plain frames of so many bytes, as on a wire.
    pub(super) fn plain(bytes: usize) -> Self {
        let mut sent = vec![0; VNET_HEADER_BYTES];
        sent.extend([&CLIENT[..], &GUEST, &LOCAL_EXPERIMENT].concat());
        let body = sent.len();
        sent.resize(VNET_HEADER_BYTES + bytes, 0);
        Self::new(sent, body)
    }

    /// TCP packets with so many bytes of data that nobody has cut into segments yet.
    pub(super) fn unsegmented(data_bytes: usize) -> Self {
        // NEEDS_CSUM, TCPv4; header length, segment, where the checksum begins and where it goes.
        let mut sent = vec![1, 1];
        let headers = u16::try_from(ETHERNET_BYTES + SEGMENT_HEADER_BYTES).expect("54");
        for field in [headers, SEGMENT_BYTES, headers - 20, 16] {
            sent.extend(field.to_le_bytes());
        }
        sent.extend([&CLIENT[..], &GUEST, &IPV4].concat());
        let ip = sent.len();
        sent.extend([0x45, 0]);
        let total = u16::try_from(SEGMENT_HEADER_BYTES + data_bytes).expect("checked: an IPv4 packet");
        sent.extend(total.to_be_bytes());
        sent.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 99, 0, 2, 10, 99, 0, 1]);
        let sum = checksum(&sent[ip..]);
        sent[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        sent.extend([
            4, 210, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
        ]);
        let body = sent.len();
        sent.resize(body + data_bytes, 0);
        Self::new(sent, body)
    }

    fn new(sent: Vec<u8>, body: usize) -> Self {
        Self {
            sent,
            got: vec![0; FRAME_BYTES_MAX],
            body,
            next_sent: 0,
            next_got: 0,
        }
    }

    /// Without the virtio-net header.
    pub(super) fn bytes(&self) -> usize {
        self.sent.len() - VNET_HEADER_BYTES
    }

    /// The guest sends the next `count`.
    pub(super) fn send(&mut self, count: u32, tap: &Tap) -> Result<(), Unable> {
        for _ in 0..count {
            fill(&mut self.sent[self.body..], self.next_sent);
            self.next_sent += 1;
            let written = rustix::io::write(tap, &self.sent).map_err(Unable::failed("sending a frame"))?;
            if written != self.sent.len() {
                return Err(Unable::Wrong("a frame was sent in part".to_owned()));
            }
        }
        Ok(())
    }

    /// Takes what has arrived, which must be the next frames, whole and in order. Returns how many.
    ///
    /// What an unsegmented packet's virtio-net header says at this end is the kernel's: only that it still is one is looked at.
    pub(super) fn take(&mut self, tap: &Tap) -> Result<u32, Unable> {
        let mut count = 0;
        loop {
            let got = match rustix::io::read(tap, &mut self.got[..]) {
                Ok(bytes) => &self.got[..bytes],
                Err(rustix::io::Errno::AGAIN) => return Ok(count),
                Err(error) => return Err(Unable::failed("receiving a frame")(error)),
            };
            let source = got.get(VNET_HEADER_BYTES + 6..VNET_HEADER_BYTES + 12);
            if source != Some(&GUEST) {
                continue;
            }
            let expected = &mut self.sent;
            let later = self.next_sent;
            fill(&mut expected[self.body..], self.next_got);
            let same = got[1] == expected[1] && got[VNET_HEADER_BYTES..] == expected[VNET_HEADER_BYTES..];
            if !same || self.next_got >= later {
                return Err(Unable::Wrong(format!(
                    "frame {} did not arrive as it was sent",
                    self.next_got
                )));
            }
            self.next_got += 1;
            count += 1;
        }
    }

    /// Frames that were sent and have not arrived.
    pub(super) fn under_way(&self) -> u64 {
        self.next_sent - self.next_got
    }
}

/// The number, and bytes that tell whether a frame was mixed with another one.
fn fill(body: &mut [u8], number: u64) {
    let (first, rest) = body.split_at_mut(8);
    first.copy_from_slice(&number.to_le_bytes());
    rest.fill(number.to_le_bytes()[0] ^ 0x5a);
}

fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("it was folded")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unsegmented_packets_header_sums_up_to_nothing() {
        let frames = Frames::unsegmented(64_000);
        let ip = VNET_HEADER_BYTES + ETHERNET_BYTES;
        assert_eq!(checksum(&frames.sent[ip..ip + 20]), 0);
        assert_eq!(frames.bytes(), 64_054);
    }

    #[test]
    fn frames_of_different_numbers_differ() {
        let (mut one, mut two) = ([0; 46], [0; 46]);
        fill(&mut one, 1);
        fill(&mut two, 2);
        assert!(one[..8] != two[..8] && one[8..] != two[8..]);
    }
}
