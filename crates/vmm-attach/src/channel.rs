//! A Unix socket that carries messages with file descriptors. Every wait has an end, in both directions: no peer can hold the thread
//! that reads or writes here for longer than it was told.
//!
//! A message that can't be framed, or that stays half read or half written, breaks the channel: what follows on such a stream means
//! nothing.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::proto::{DESCRIPTORS_MAX, HEADER_BYTES, Header, ProtoError};

const CONTROL_BYTES: usize = cmsg_space!(ScmRights(DESCRIPTORS_MAX));

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer closed the connection, or is dead.
    #[error("the peer closed the connection")]
    Closed,
    /// It did not read in time.
    #[error("the peer does not read: {bytes} bytes waited for {limit:?}")]
    SendTimeout {
        /// How many were left.
        bytes: usize,
        /// How long we waited.
        limit: Duration,
    },
    /// Nothing came in time.
    #[error("the peer said nothing for {0:?}")]
    Silent(Duration),
    /// A message began and did not end.
    #[error("only {got} of a message's {wanted} bytes came within {limit:?}")]
    Unfinished {
        /// Bytes that came.
        got: usize,
        /// Bytes that were announced.
        wanted: usize,
        /// How long we waited for the rest.
        limit: Duration,
    },
    /// File descriptors that came with a payload instead of a header, or more than allowed at once.
    #[error("file descriptors came in the middle of a message, or more than {DESCRIPTORS_MAX} at once")]
    StrayDescriptors,
    /// The header can't be understood.
    #[error(transparent)]
    Proto(#[from] ProtoError),
    /// The socket failed.
    #[error("{call} failed")]
    Io {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl ChannelError {
    fn io(call: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::Io {
                call,
                source: other.into(),
            },
        }
    }
}

/// A message as it came, before its payload is decoded.
#[derive(Debug)]
pub struct Incoming {
    /// Its header.
    pub header: Header,
    /// Its payload, as long as the header says.
    pub payload: Vec<u8>,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Channel {
    /// Takes over a connected stream socket.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Sends a whole message, with `descriptors` beside its first byte, within `limit`.
    ///
    /// # Errors
    /// [`ChannelError`]; after one, the channel is good for nothing but what the peer has said already.
    pub fn send(
        &self,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), ChannelError> {
        let until = Instant::now() + limit;
        let mut sent = 0;
        while sent < message.len() {
            let beside: &[BorrowedFd<'_>] = if sent == 0 { descriptors } else { &[] };
            match self.send_some(&message[sent..], beside) {
                Ok(bytes) => sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, until)? {
                        let bytes = message.len() - sent;
                        return Err(ChannelError::SendTimeout { bytes, limit });
                    }
                }
                Err(errno) => return Err(ChannelError::io("sendmsg")(errno)),
            }
        }
        Ok(())
    }

    fn send_some(&self, part: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
            assert!(fits, "no message brings more than {DESCRIPTORS_MAX} descriptors");
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.stream, &[IoSlice::new(part)], &mut control, flags)
    }

    /// Waits up to `wait` for a message to begin (`None` when none did), then up to `rest` for all of it.
    ///
    /// # Errors
    /// [`ChannelError`]; after one, the channel is good for nothing.
    pub fn receive(&self, wait: Duration, rest: Duration) -> Result<Option<Incoming>, ChannelError> {
        if !self.wait(PollFlags::IN, Instant::now() + wait)? {
            return Ok(None);
        }
        let until = Instant::now() + rest;
        let mut descriptors = Vec::new();
        let mut bytes = [0; HEADER_BYTES];
        self.fill(&mut bytes, &mut descriptors, until, rest)?;
        let header = Header::decode(&bytes)?;
        let mut payload = vec![0; header.length as usize];
        let mut stray = Vec::new();
        self.fill(&mut payload, &mut stray, until, rest)?;
        if !stray.is_empty() {
            return Err(ChannelError::StrayDescriptors);
        }
        Ok(Some(Incoming {
            header,
            payload,
            descriptors,
        }))
    }

    /// Reads until `into` is full, and not a byte more: so descriptors belong to the message that they came with.
    fn fill(
        &self,
        into: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        until: Instant,
        limit: Duration,
    ) -> Result<(), ChannelError> {
        let wanted = into.len();
        let mut got = 0;
        while got < wanted {
            let mut came = Vec::new();
            match self.receive_some(&mut into[got..], &mut came) {
                Ok((0, _)) => return Err(ChannelError::Closed),
                Ok((_, true)) => return Err(ChannelError::StrayDescriptors),
                Ok((bytes, false)) => {
                    got += bytes;
                    descriptors.append(&mut came);
                    // The kernel's room for them is rounded up, so that there may be one too many.
                    if descriptors.len() > DESCRIPTORS_MAX {
                        return Err(ChannelError::StrayDescriptors);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::IN, until)? {
                        return Err(ChannelError::Unfinished { got, wanted, limit });
                    }
                }
                Err(errno) => return Err(ChannelError::io("recvmsg")(errno)),
            }
        }
        Ok(())
    }

    /// One read: how many bytes came, and whether the kernel had to drop descriptors.
    fn receive_some(&self, into: &mut [u8], came: &mut Vec<OwnedFd>) -> Result<(usize, bool), Errno> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let read = recvmsg(&self.stream, &mut [IoSliceMut::new(into)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                came.extend(rights);
            }
        }
        Ok((read.bytes, read.flags.contains(ReturnFlags::CTRUNC)))
    }

    /// Waits for the socket until a point in time; also true when it failed or the peer is gone, which the next call tells.
    fn wait(&self, what: PollFlags, until: Instant) -> Result<bool, ChannelError> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&self.stream, what)];
            match poll(&mut fds, Some(&timespec(left))) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(ChannelError::io("poll")(errno)),
            }
        }
    }
}

/// For poll(2).
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
