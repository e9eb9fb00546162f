//! What several targets share.
#![forbid(unsafe_code)]

/// The attach protocol's stream.
pub mod attach {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use romulus_vmm_attach::channel::Channel;
    use romulus_vmm_attach::proto::{Header, PAYLOAD_BYTES_MAX, VERSION};

    /// A message of any kind with any payload, cut to what a message may have.
    pub fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let payload = &payload[..payload.len().min(PAYLOAD_BYTES_MAX)];
        let header = Header {
            version: VERSION,
            kind,
            length: u32::try_from(payload.len()).expect("it was cut"),
            number: 7,
        };
        [&header.encode(), payload].concat()
    }

    /// Sends bytes through a socket and hands out each message that arrives, until one can't be framed. A request that is longer than
    /// a socket takes at once is left out.
    pub fn each_message(bytes: &[u8], mut read: impl FnMut(&Header, &[u8])) {
        let (ours, theirs) = UnixStream::pair().expect("there is a socket");
        let (ours, theirs) = (Channel::new(ours), Channel::new(theirs));
        if ours.send(bytes, &[], Duration::ZERO).is_err() {
            return;
        }
        drop(ours);
        while let Ok(Some(incoming)) = theirs.receive(Duration::ZERO, Duration::ZERO) {
            assert!(incoming.payload.len() <= PAYLOAD_BYTES_MAX && incoming.descriptors.is_empty());
            read(&incoming.header, &incoming.payload);
        }
    }
}
