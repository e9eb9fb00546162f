//! What the guest says on the wire, seen at the switch's port of a host or at the guest's own tap: every frame with the
//! guest's source address that comes *in* from there, with the kernel's time.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use romulus_host_sys::packet::{PacketSocket, SeenFrame};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::guest::MAC_BYTES;
use crate::links::Links;
use crate::namespace::within;
use crate::netns::{Host, TAP};
use crate::{Lab, Stamp};

/// As much of a frame as tells it from others.
const HELD_BYTES: usize = 4096;
/// How often the thread looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const ETHERNET_HEADER_BYTES: usize = 14;
/// The shortest frame, without its checksum.
const ETHERNET_BYTES_MIN: usize = 60;

/// What a frame is, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Says where an address is and answers nobody: RARP, gratuitous ARP, an unsolicited neighbour advertisement.
    /// The agent sends these in the guest's name.
    Announcement,
    /// Anything else: the guest itself.
    Guest,
}

/// A frame that passed.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// When.
    pub at: Stamp,
    /// Its length on the wire.
    pub bytes: usize,
    /// What it is.
    pub kind: Kind,
    /// A hash of its length and its first 4096 bytes, both without Ethernet's padding, to tell frames apart.
    pub hash: u64,
}

/// A running capture. Dropping it ends it.
#[derive(Debug)]
pub struct Sniffer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    frames: Mutex<Vec<Frame>>,
    stop: AtomicBool,
}

impl Sniffer {
    /// Begins to capture at `host`'s port of the switch.
    ///
    /// # Errors
    /// When packet sockets are not allowed.
    pub fn start(lab: &Lab, host: Host) -> Result<Sniffer> {
        Sniffer::start_at(&lab.net.switch(), &host.port())
    }

    /// Begins to capture what the guest sends, before any gate, at its tap on the primary. What a gate lets go is seen here once
    /// more, as it goes through the tap again.
    ///
    /// # Errors
    /// As [`Sniffer::start`].
    pub fn start_at_tap(lab: &Lab) -> Result<Sniffer> {
        Sniffer::start_at(&lab.net.namespace(Host::Primary), TAP)
    }

    fn start_at(namespace: &str, device: &str) -> Result<Sniffer> {
        let socket = within(namespace, || {
            let index = Links::open()?.index(device)?;
            PacketSocket::open(index, MAC_BYTES).context("cannot open a packet socket; be root")
        })?;
        let shared = Arc::new(Shared::default());
        let place = format!("{device} in {namespace}");
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                if let Err(error) = shared.capture(&socket) {
                    eprintln!("the capture at {place} ended: {error:#}");
                }
                // Verdicts that are drawn from it are not to be trusted then.
                if let Ok(lost @ 1..) = socket.lost() {
                    eprintln!("the capture at {place} lost {lost} frames");
                }
            }
        });
        Ok(Sniffer {
            shared,
            thread: Some(thread),
        })
    }

    /// The first frame after `from` that the guest itself sent.
    #[must_use]
    pub fn first_guest_frame(&self, from: Stamp) -> Option<Frame> {
        self.find(|frame| frame.at > from && frame.kind == Kind::Guest)
    }

    /// The first frame after `from`, whatever it is.
    #[must_use]
    pub fn first_frame(&self, from: Stamp) -> Option<Frame> {
        self.find(|frame| frame.at > from)
    }

    /// How many frames have come after `from`.
    #[must_use]
    pub fn count_after(&self, from: Stamp) -> usize {
        self.lock().iter().filter(|frame| frame.at > from).count()
    }

    /// All frames so far.
    #[must_use]
    pub fn frames(&self) -> Vec<Frame> {
        self.lock().clone()
    }

    fn find(&self, fits: impl Fn(&Frame) -> bool) -> Option<Frame> {
        self.lock().iter().copied().find(fits)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Frame>> {
        self.shared.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn capture(&self, socket: &PacketSocket) -> Result<()> {
        let mut buffer = vec![0; HELD_BYTES];
        let look_every = Timespec::try_from(LOOK_EVERY).context("a poll that long")?;
        while !self.stop.load(Ordering::Acquire) {
            // A signal may cut the wait short.
            let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&look_every));
            loop {
                let seen = match socket.next(&mut buffer) {
                    Ok(Some(seen)) => seen,
                    Ok(None) => break,
                    // The cable was cut; frames come again once it is plugged in.
                    Err(error) if error.kind() == ErrorKind::NetworkDown => break,
                    Err(error) => return Err(error).context("cannot fetch a frame"),
                };
                let frame = frame_of(seen, &buffer[..seen.bytes.min(HELD_BYTES)]);
                self.frames
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(frame);
            }
        }
        Ok(())
    }
}

fn frame_of(seen: SeenFrame, held: &[u8]) -> Frame {
    Frame {
        at: Stamp::from_micros(seen.at_ns / 1000),
        bytes: seen.bytes,
        kind: kind_of(held),
        hash: hash_of(held, seen.bytes),
    }
}

/// `frame` is the captured part of `length` bytes. A card like the e1000 pads what is short, and a bridge that passes packets
/// to the firewall takes the padding off again.
fn hash_of(frame: &[u8], length: usize) -> u64 {
    let unpadded = unpadded_length(frame).map_or(length, |unpadded| unpadded.min(length));
    let mut hasher = DefaultHasher::new();
    frame[..unpadded.min(frame.len())].hash(&mut hasher);
    unpadded.hash(&mut hasher);
    hasher.finish()
}

/// What an IPv4 packet's header says of its length, if that is shorter than the shortest Ethernet frame: larger packets are
/// not padded, and those that await their segmentation may say anything.
fn unpadded_length(frame: &[u8]) -> Option<usize> {
    let [0x08, 0x00, _, _, high, low, ..] = frame.get(12..)? else {
        return None;
    };
    let length = ETHERNET_HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low]));
    (length < ETHERNET_BYTES_MIN).then_some(length)
}

fn kind_of(frame: &[u8]) -> Kind {
    let payload = frame.get(14..).unwrap_or_default();
    let announcement = match frame.get(12..14) {
        Some([0x80, 0x35]) => true,
        // Sender and target protocol address are the same.
        Some([0x08, 0x06]) => payload
            .get(14..18)
            .is_some_and(|sender| Some(sender) == payload.get(24..28)),
        // ICMPv6 (58), type 136, with the solicited flag off.
        Some([0x86, 0xdd]) => {
            payload.get(6) == Some(&58)
                && payload.get(40) == Some(&136)
                && payload.get(44).is_some_and(|flags| flags & 0x40 == 0)
        }
        _ => false,
    };
    if announcement {
        Kind::Announcement
    } else {
        Kind::Guest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arp(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0; 14 + 28];
        frame[12..14].copy_from_slice(&[8, 6]);
        frame[28..32].copy_from_slice(&sender);
        frame[38..42].copy_from_slice(&target);
        frame
    }

    #[test]
    fn an_announcement_is_told_from_an_answer() {
        assert_eq!(kind_of(&arp([10, 77, 0, 2], [10, 77, 0, 2])), Kind::Announcement);
        assert_eq!(kind_of(&arp([10, 77, 0, 2], [10, 77, 0, 1])), Kind::Guest);
        assert_eq!(kind_of(&[]), Kind::Guest);
        let mut rarp = vec![0; 60];
        rarp[12..14].copy_from_slice(&[0x80, 0x35]);
        assert_eq!(kind_of(&rarp), Kind::Announcement);
        let mut advertisement = vec![0; 86];
        advertisement[12..14].copy_from_slice(&[0x86, 0xdd]);
        advertisement[20] = 58;
        advertisement[54] = 136;
        assert_eq!(kind_of(&advertisement), Kind::Announcement);
        advertisement[58] = 0x40;
        assert_eq!(kind_of(&advertisement), Kind::Guest);
    }

    #[test]
    fn a_frame_is_the_same_with_and_without_its_padding() {
        let mut short = vec![1; 58];
        short[12..14].copy_from_slice(&[8, 0]);
        short[16..18].copy_from_slice(&44_u16.to_be_bytes());
        let mut padded = short.clone();
        padded.extend_from_slice(&[0, 0]);
        assert_eq!(hash_of(&short, 58), hash_of(&padded, 60));
        let mut other = padded.clone();
        other[57] = 2;
        assert_ne!(hash_of(&padded, 60), hash_of(&other, 60));
        // Of what is longer nothing is cut off.
        assert_ne!(hash_of(&[1; 80], 80), hash_of(&[1; 80], 81));
        padded[12..14].copy_from_slice(&[8, 6]);
        assert_ne!(hash_of(&padded, 60), hash_of(&padded[..58], 58));
    }

    #[test]
    fn a_frame_keeps_its_time_and_its_length_on_the_wire() {
        let seen = SeenFrame {
            at_ns: 2_000_500_999,
            bytes: 9000,
        };
        let frame = frame_of(seen, &[7; HELD_BYTES]);
        assert_eq!((frame.at.micros(), frame.bytes), (2_000_500, 9000));
        assert_ne!(
            frame.hash,
            frame_of(SeenFrame { bytes: 9001, ..seen }, &[7; HELD_BYTES]).hash
        );
    }
}
