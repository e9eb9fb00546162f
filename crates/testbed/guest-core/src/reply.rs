//! Replies of the Redis protocol (RESP2), written into a bounded buffer.

use core::fmt::{self, Write};

/// Room that [`Reply::finish`] needs to say that a reply was too long.
const RESERVE_BYTES: usize = 64;

/// A buffer that replies are written to, one after the other.
#[derive(Debug)]
pub struct Reply<'a> {
    buffer: &'a mut [u8],
    length: usize,
    start: usize,
    overflow: bool,
}

impl<'a> Reply<'a> {
    /// Starts a reply after the first `length` bytes of `buffer`.
    pub fn new(buffer: &'a mut [u8], length: usize) -> Self {
        Reply {
            buffer,
            length,
            start: length,
            overflow: false,
        }
    }

    /// Ends the reply: bytes in the buffer now. A reply that found no room is replaced by an error.
    pub fn finish(mut self) -> usize {
        if self.overflow {
            self.length = self.start;
            let error = b"-ERR the reply is too long\r\n";
            let room = self.buffer.len().min(self.start + error.len()) - self.start;
            self.buffer[self.start..self.start + room].copy_from_slice(&error[..room]);
            self.length += room;
        }
        self.length
    }

    /// How much was replied so far, for [`Reply::take_back`].
    #[must_use]
    pub fn mark(&self) -> usize {
        self.length
    }

    /// Takes back what was replied after `mark`.
    pub fn take_back(&mut self, mark: usize) {
        self.length = mark.clamp(self.start, self.length);
    }

    fn raw(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        if self.overflow || end + RESERVE_BYTES > self.buffer.len() {
            self.overflow = true;
            return;
        }
        self.buffer[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }

    fn line(&mut self, args: fmt::Arguments<'_>) {
        // Writing never fails: what finds no room is noted as an overflow.
        let _ = self.write_fmt(args);
        self.raw(b"\r\n");
    }

    /// A simple string, as `OK`.
    pub fn simple(&mut self, text: &str) {
        self.line(format_args!("+{text}"));
    }

    /// An error. `text` begins with its kind, as `ERR`.
    pub fn error(&mut self, text: fmt::Arguments<'_>) {
        self.line(format_args!("-{text}"));
    }

    /// An integer.
    pub fn integer(&mut self, number: i64) {
        self.line(format_args!(":{number}"));
    }

    /// A string of bytes.
    pub fn bulk(&mut self, bytes: &[u8]) {
        self.line(format_args!("${}", bytes.len()));
        self.raw(bytes);
        self.raw(b"\r\n");
    }

    /// A string of bytes, or nothing.
    pub fn maybe(&mut self, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.bulk(bytes),
            None => self.raw(b"$-1\r\n"),
        }
    }

    /// The head of an array; its elements follow.
    pub fn array(&mut self, elements: usize) {
        self.line(format_args!("*{elements}"));
    }
}

impl fmt::Write for Reply<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.raw(text.as_bytes());
        Ok(())
    }
}

/// Text of at most `N` bytes; what is longer is cut off.
#[derive(Debug)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Text {
            bytes: [0; N],
            length: 0,
        }
    }
}

impl<const N: usize> Text<N> {
    /// The text as bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let taken = text.len().min(N - self.length);
        self.bytes[self.length..self.length + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_follow_each_other_in_the_buffer() {
        let mut buffer = [0; 200];
        let mut reply = Reply::new(&mut buffer, 0);
        reply.array(3);
        reply.integer(-5);
        reply.maybe(None);
        reply.bulk(b"ab");
        let length = reply.finish();
        let mut reply = Reply::new(&mut buffer, length);
        reply.error(format_args!("ERR {}", 7));
        let length = reply.finish();
        assert_eq!(&buffer[..length], b"*3\r\n:-5\r\n$-1\r\n$2\r\nab\r\n-ERR 7\r\n");
    }

    #[test]
    fn a_reply_without_room_becomes_an_error_and_spoils_none_before() {
        let mut buffer = [0; 100];
        let mut reply = Reply::new(&mut buffer, 0);
        reply.simple("OK");
        let length = reply.finish();
        let mut reply = Reply::new(&mut buffer, length);
        reply.array(2);
        reply.bulk(&[b'x'; 90]);
        reply.bulk(b"short");
        let length = reply.finish();
        assert_eq!(&buffer[..length], b"+OK\r\n-ERR the reply is too long\r\n");
    }

    #[test]
    fn text_that_is_too_long_is_cut_off() {
        let mut text = Text::<4>::default();
        write!(text, "{}-{}", 12, 345).unwrap();
        assert_eq!(text.bytes(), b"12-3");
    }
}
