//! A client of the guest's echo: numbered datagrams, each of which the guest must see once, and so must we.

use std::net::UdpSocket;

use super::service::{GUEST, PORT};

/// The number by which the guest knows this sender.
const SENDER: u32 = 7;

/// Datagrams that were sent, and came back.
pub struct Datagrams {
    socket: UdpSocket,
    /// Whether each of those that were sent has come back.
    back: Vec<bool>,
}

impl Datagrams {
    /// A sender that has sent nothing.
    pub fn new() -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((GUEST, PORT)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Datagrams {
            socket,
            back: Vec::new(),
        }
    }

    /// Sends the next one. It may be lost on the way.
    pub fn send(&mut self) {
        let mut datagram = b"RSEQ".to_vec();
        datagram.extend(SENDER.to_le_bytes());
        datagram.extend((self.back.len() as u64).to_le_bytes());
        // While the network has no way to the guest, it says so.
        let _ = self.socket.send(&datagram);
        self.back.push(false);
    }

    /// Takes what has come back.
    ///
    /// # Panics
    /// When one comes back twice: the guest, which sees each of them once, has sent one frame twice.
    pub fn take(&mut self) {
        let mut datagram = [0; 64];
        while let Ok(bytes) = self.socket.recv(&mut datagram) {
            assert_eq!(
                bytes, 16,
                "the datagram that comes back is not the one that was sent"
            );
            let sequence = u64::from_le_bytes(datagram[8..16].try_into().unwrap());
            let back = &mut self.back[usize::try_from(sequence).unwrap()];
            assert!(
                !std::mem::replace(back, true),
                "datagram {sequence} came back twice"
            );
        }
    }

    /// How many were sent.
    pub fn sent(&self) -> usize {
        self.back.len()
    }

    /// How many came back.
    pub fn back(&self) -> usize {
        self.back.iter().filter(|back| **back).count()
    }
}
