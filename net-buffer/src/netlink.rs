//! A blocking rtnetlink socket: one request, its answers, its acknowledgement.
//!
//! `netlink-packet-route` writes and reads the messages. The `rtnetlink` crate above it is left out because it is
//! asynchronous, and closing the gate is one request made while the guest stands still.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The kernel's answers fit in 32 KiB; twice that is room to spare.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The kernel answers at once; this only keeps a surprise from becoming a hang.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// `struct nlmsghdr`: length u32, type u16, flags u16, sequence u32, port u32.
const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// A socket for questions to, and changes of, the network of one namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    answer: Vec<u8>,
}

impl Netlink {
    /// A socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// As socket(2) says.
    pub fn open() -> io::Result<Self> {
        let socket = net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None, // NETLINK_ROUTE is protocol 0
        )?;
        net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self {
            socket,
            sequence: 0,
            answer: vec![0; ANSWER_BYTES_MAX],
        })
    }

    /// Sends a request, with `flags` beside those of every request, and waits for its acknowledgement.
    ///
    /// # Errors
    /// The kernel's, or that it did not answer for 5 s.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, flags, |_| ())
    }

    /// Sends a request and hands the payload of each answer to `each`, until the last one.
    ///
    /// # Errors
    /// As [`Netlink::change`].
    pub fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        net::send(&self.socket, &bytes, SendFlags::empty())?;
        loop {
            let (got, _) = net::recv(&self.socket, &mut self.answer[..], RecvFlags::empty())?;
            if let Some(end) = read_answers(&self.answer[..got], self.sequence, &mut each)? {
                return end;
            }
        }
    }
}

/// Walks the messages of one datagram. `Some` is the end of the exchange.
fn read_answers(
    mut bytes: &[u8],
    sequence: u32,
    each: &mut impl FnMut(&[u8]),
) -> io::Result<Option<io::Result<()>>> {
    let torn = || io::Error::new(io::ErrorKind::InvalidData, "a torn netlink answer");
    while !bytes.is_empty() {
        let header = bytes.get(..HEADER_BYTES).ok_or_else(torn)?;
        let length = usize::try_from(word(header, 0)).map_err(|_| torn())?;
        let payload = bytes.get(HEADER_BYTES..length).ok_or_else(torn)?;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        if word(header, 8) != sequence {
            continue; // the late answer to a request that was given up
        }
        match kind {
            NLMSG_ERROR | NLMSG_DONE => {
                let code = payload.get(..4).map_or(0, |code| word(code, 0).cast_signed());
                let end = if code == 0 {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(code.wrapping_neg()))
                };
                return Ok(Some(end));
            }
            _ => each(payload),
        }
    }
    Ok(None)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(0u16.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_exchange_ends_with_the_error_of_its_own_request() {
        let mut bytes = message(NLMSG_ERROR, 6, &(-1i32).to_ne_bytes());
        bytes.extend(message(16, 7, b"abc"));
        bytes.extend(message(NLMSG_ERROR, 7, &(-17i32).to_ne_bytes()));
        let mut seen = Vec::new();
        let end = read_answers(&bytes, 7, &mut |payload: &[u8]| seen.push(payload.to_vec()));
        assert_eq!(end.unwrap().unwrap().unwrap_err().raw_os_error(), Some(17));
        assert_eq!(seen, [b"abc".to_vec()]);
    }

    #[test]
    fn a_torn_answer_is_an_error_and_not_a_panic() {
        let whole = message(16, 7, b"abcdefgh");
        for cut in 1..whole.len() {
            let _ = read_answers(&whole[..cut], 7, &mut |_: &[u8]| ());
        }
        let mut lying = whole;
        lying[0] = 3;
        lying[1..4].fill(0);
        assert!(read_answers(&lying, 7, &mut |_: &[u8]| ()).is_err());
    }
}
