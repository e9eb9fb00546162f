//! What the guest says on the wire, seen at the switch's port of a host or at the guest's own tap: every frame with the
//! guest's source address that comes *in* from there, with the kernel's time.
//!
//! tcpdump captures; this reads its output (the pcap format, version 2.4, nanosecond variant).

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::guest::MAC;
use crate::netns::{Host, TAP};
use crate::{Lab, Stamp};

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const FRAME_BYTES_MAX: usize = 1 << 18;
const ETHERNET_HEADER_BYTES: u32 = 14;
/// The shortest frame, without its checksum.
const ETHERNET_BYTES_MIN: u32 = 60;

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
    pub bytes: u32,
    /// What it is.
    pub kind: Kind,
    /// A hash of its length and its first 4096 bytes, both without Ethernet's padding, to tell frames apart.
    pub hash: u64,
}

/// A running capture. Dropping it ends it.
#[derive(Debug)]
pub struct Sniffer {
    child: Child,
    frames: Arc<Mutex<Vec<Frame>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Sniffer {
    /// Begins to capture at `host`'s port of the switch, and returns once the capture runs.
    ///
    /// # Errors
    /// When tcpdump is missing or refuses.
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
        let mut child = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "ip",
                "netns",
                "exec",
                namespace,
                "tcpdump",
                "-i",
                device,
            ])
            .args([
                "-Q",
                "in",
                "-n",
                "-U",
                "--immediate-mode",
                "-Z",
                "root",
                "-w",
                "-",
            ])
            // A ring of many small slots: with room for the largest frame in each, a busy machine loses some.
            .args(["-s", "4096", "-B", "32768"])
            .args(["--time-stamp-precision=nano", "ether", "src", MAC])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start tcpdump; `cargo xtask setup` installs it")?;
        let stdout = child
            .stdout
            .take()
            .ok_or_else(|| anyhow!("tcpdump has no output"))?;
        let mut input = BufReader::new(stdout);
        // tcpdump writes the header once the capture is open.
        read_header(&mut input).context("tcpdump did not start to capture")?;
        let frames = Arc::new(Mutex::new(Vec::new()));
        let thread = std::thread::spawn({
            let frames = Arc::clone(&frames);
            move || {
                read_frames(input, |frame| {
                    frames.lock().unwrap_or_else(PoisonError::into_inner).push(frame)
                })
            }
        });
        Ok(Sniffer {
            child,
            frames,
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
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        // Gone already is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_header(input: &mut impl Read) -> Result<()> {
    let mut header = [0_u8; 24];
    input.read_exact(&mut header).context("no pcap header")?;
    let magic = word(&header, 0)?;
    if magic != MAGIC_NANOSECONDS {
        bail!("tcpdump writes another format ({magic:#x}) than asked for");
    }
    Ok(())
}

fn read_frames(mut input: impl Read, mut each: impl FnMut(Frame)) -> Result<()> {
    let mut header = [0_u8; 16];
    // The end of the capture is the end of tcpdump.
    while input.read_exact(&mut header).is_ok() {
        let (seconds, nanos) = (u64::from(word(&header, 0)?), u64::from(word(&header, 4)?));
        let held = usize::try_from(word(&header, 8)?)?;
        if held > FRAME_BYTES_MAX {
            bail!("a captured frame of {held} bytes");
        }
        let mut bytes = vec![0; held];
        if input.read_exact(&mut bytes).is_err() {
            break;
        }
        let length = word(&header, 12)?;
        each(Frame {
            at: Stamp::from_micros(seconds * 1_000_000 + nanos / 1000),
            bytes: length,
            kind: kind_of(&bytes),
            hash: hash_of(&bytes, length),
        });
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let four = bytes
        .get(at..at + 4)
        .ok_or_else(|| anyhow!("a truncated pcap header"))?;
    Ok(u32::from_ne_bytes(four.try_into()?))
}

/// `frame` is the captured part of `length` bytes. A card like the e1000 pads what is short, and a bridge that passes packets
/// to the firewall takes the padding off again.
fn hash_of(frame: &[u8], length: u32) -> u64 {
    let unpadded = unpadded_length(frame).map_or(length, |unpadded| unpadded.min(length));
    let captured = usize::try_from(unpadded).map_or(frame, |end| &frame[..end.min(frame.len())]);
    let mut hasher = DefaultHasher::new();
    captured.hash(&mut hasher);
    unpadded.hash(&mut hasher);
    hasher.finish()
}

/// What an IPv4 packet's header says of its length, if that is shorter than the shortest Ethernet frame: larger packets are
/// not padded, and those that await their segmentation may say anything.
fn unpadded_length(frame: &[u8]) -> Option<u32> {
    let [0x08, 0x00, _, _, high, low, ..] = frame.get(12..)? else {
        return None;
    };
    let length = ETHERNET_HEADER_BYTES + u32::from(u16::from_be_bytes([*high, *low]));
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
    fn frames_are_read_until_the_stream_is_cut() {
        let mut stream = Vec::new();
        for number in [2_u32, 500_000, 60, 60] {
            stream.extend_from_slice(&number.to_ne_bytes());
        }
        stream.extend_from_slice(&[7; 60]);
        stream.extend_from_slice(&[1, 2, 3]);
        let mut found = Vec::new();
        read_frames(&stream[..], |frame| found.push(frame)).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].at.micros(), found[0].bytes), (2_000_500, 60));
    }
}
