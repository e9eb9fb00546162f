//! Pings at a steady pace. They make the guest speak, so that the sniffer sees when it can; while it is silent they come more often,
//! so that the end of the silence is seen to the millisecond.

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::Lab;
use crate::namespace::within;
use crate::netns::{GUEST_IP, Host};

/// Without a reply for so long the guest is silent: longer than a gate holds one.
const SILENCE: Duration = Duration::from_millis(150);
/// Pace while it is silent.
const EVERY_IN_SILENCE: Duration = Duration::from_millis(1);

/// The running pinger. Dropping it ends it.
#[derive(Debug)]
pub struct Pinger {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pinger {
    /// Begins to ping the guest from the client's host.
    ///
    /// # Errors
    /// When raw sockets are not allowed.
    pub fn start(lab: &Lab, every: Duration) -> Result<Pinger> {
        let socket = within(&lab.net.namespace(Host::Client), || {
            Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))
                .context("cannot open a raw socket; be root")
        })?;
        socket
            .set_nonblocking(true)
            .context("cannot make a socket non-blocking")?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || ping(&socket, every, &stop)
        });
        Ok(Pinger {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A pinger that panicked has no result to spoil.
            let _ = thread.join();
        }
    }
}

fn ping(socket: &Socket, every: Duration, stop: &AtomicBool) {
    let guest = SocketAddr::from((GUEST_IP, 0)).into();
    let mut sequence = 0_u16;
    let mut sink = [MaybeUninit::<u8>::uninit(); 2048];
    let mut answered_at = Instant::now();
    while !stop.load(Ordering::Acquire) {
        // While nobody answers for the guest's address, sending fails: that is what is being watched.
        let _ = socket.send_to(&echo_request(sequence), &guest);
        sequence = sequence.wrapping_add(1);
        // The sniffer sees the replies and has their times; here only whether there are any counts.
        while socket.recv(&mut sink).is_ok() {
            answered_at = Instant::now();
        }
        let silent = answered_at.elapsed() > SILENCE;
        sleep(if silent {
            EVERY_IN_SILENCE.min(every)
        } else {
            every
        });
    }
}

/// An ICMP echo request (RFC 792).
fn echo_request(sequence: u16) -> [u8; 24] {
    let mut packet = [0_u8; 24];
    packet[0] = 8;
    packet[4..6].copy_from_slice(&0x526f_u16.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_its_checksum_sums_to_nothing() {
        for sequence in [0, 1, 0xfffe, 0xffff] {
            assert_eq!(checksum(&echo_request(sequence)), 0, "{sequence}");
        }
    }
}
