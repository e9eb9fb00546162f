//! One client's connection: requests in, replies out.

use romulus_guest_core::command::{self, Machine, Then};
use romulus_guest_core::reply::Reply;
use romulus_guest_core::resp::{self, REQUEST_BYTES_MAX};
use romulus_guest_core::store::Store;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

use crate::memory::Memory;

const RECEIVE_BYTES: usize = 16 << 10;
const SEND_BYTES: usize = 32 << 10;
/// No further request is carried out while so many bytes of replies wait.
const OUTPUT_SOFT_BYTES: usize = 24 << 10;
/// Longest reply on top of that.
const OUTPUT_BYTES: usize = OUTPUT_SOFT_BYTES + REQUEST_BYTES_MAX + (8 << 10);
/// Times that one turn goes round between socket and buffers.
const STEPS_MAX: usize = 8;
/// How often an idle client is asked whether it is still there, and when it is given up. A takeover makes the clock
/// jump by the time that it took, and must not give up anybody.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const GIVE_UP: Duration = Duration::from_secs(3600);

/// Makes a socket with memory of its own.
pub fn socket(memory: &mut Memory) -> tcp::Socket<'static> {
    let mut buffer = |bytes| tcp::SocketBuffer::new(memory.take_bytes(bytes));
    let mut socket = tcp::Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
    socket.set_nagle_enabled(false);
    socket.set_keep_alive(Some(KEEP_ALIVE));
    socket.set_timeout(Some(GIVE_UP));
    socket
}

/// A connection, or the place of one.
pub struct Connection {
    /// Its socket.
    pub handle: SocketHandle,
    /// Its number; 0 while nobody is connected.
    pub number: u64,
    input: &'static mut [u8],
    have: usize,
    output: &'static mut [u8],
    filled: usize,
    sent: usize,
    closing: bool,
}

impl Connection {
    /// A place for a connection.
    pub fn new(handle: SocketHandle, memory: &mut Memory) -> Self {
        let input = memory.take_bytes(REQUEST_BYTES_MAX);
        let output = memory.take_bytes(OUTPUT_BYTES);
        Connection {
            handle,
            number: 0,
            input,
            have: 0,
            output,
            filled: 0,
            sent: 0,
            closing: false,
        }
    }

    /// Whether somebody has connected who has no number yet; a place that is free listens again on `port`.
    pub fn is_new(&mut self, socket: &mut tcp::Socket<'_>, port: u16) -> bool {
        if !socket.is_open() {
            (self.number, self.have, self.filled, self.sent, self.closing) = (0, 0, 0, 0, false);
            // It only fails for port 0, which the settings refuse.
            let _ = socket.listen(port);
        }
        self.number == 0 && socket.may_recv()
    }

    /// Carries out what has been received. Says what is to be done beyond.
    pub fn turn(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        store: &mut Store<'_>,
        machine: &mut dyn Machine,
    ) -> Then {
        for _ in 0..STEPS_MAX {
            let sent = self.send(socket);
            let received = self.receive(socket);
            let (ran, then) = self.execute(store, machine);
            if matches!(then, Then::PowerOff | Then::Reset | Then::Crash) {
                self.send(socket);
                return then;
            }
            if !(sent || received || ran) {
                break;
            }
        }
        let over = self.closing || (socket.state() == tcp::State::CloseWait && !socket.can_recv());
        if over && self.filled == 0 {
            socket.close();
        }
        Then::Next
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let waiting = &self.output[self.sent..self.filled];
        if waiting.is_empty() || !socket.may_send() {
            // A client that is gone gets no replies.
            if !socket.may_send() {
                (self.sent, self.filled) = (0, 0);
            }
            return false;
        }
        let taken = socket.send_slice(waiting).unwrap_or(0);
        self.sent += taken;
        if self.sent == self.filled {
            (self.sent, self.filled) = (0, 0);
        }
        taken > 0
    }

    fn receive(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        if !socket.can_recv() {
            return false;
        }
        let taken = socket.recv_slice(&mut self.input[self.have..]).unwrap_or(0);
        self.have += taken;
        taken > 0
    }

    fn execute(&mut self, store: &mut Store<'_>, machine: &mut dyn Machine) -> (bool, Then) {
        let (mut at, mut then) = (0, Then::Next);
        while self.filled < OUTPUT_SOFT_BYTES && !self.closing && then == Then::Next {
            match resp::parse(&self.input[at..self.have]) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    let mut reply = Reply::new(self.output, self.filled);
                    then = command::execute(request.args.words(), store, machine, &mut reply);
                    self.filled = reply.finish();
                    at += request.bytes;
                }
                Err(error) => {
                    let mut reply = Reply::new(self.output, self.filled);
                    reply.error(format_args!("ERR {error}"));
                    self.filled = reply.finish();
                    at = self.have;
                    self.closing = true;
                }
            }
        }
        self.closing |= then == Then::Close;
        self.input.copy_within(at..self.have, 0);
        self.have -= at;
        (at > 0, then)
    }
}
