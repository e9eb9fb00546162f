//! As much of redis's protocol as the instruments speak.
//!
//! Source: "RESP protocol description", version 2, in redis's documentation.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::guest::REDIS_PORT;
use crate::namespace::within;
use crate::netns::{GUEST_IP, Host};
use crate::{Lab, Stamp, Vmm};

/// No value that is stored here comes near; a longer one is a broken stream.
const BULK_BYTES_MAX: usize = 1 << 16;
const ARRAY_ITEMS_MAX: usize = 1 << 12;

/// One reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// `+OK` and its like.
    Simple(String),
    /// An error that redis named.
    Error(String),
    /// A number.
    Number(i64),
    /// A value, or none.
    Bulk(Option<Vec<u8>>),
    /// Several replies.
    Array(Vec<Reply>),
}

/// Writes one command.
pub(crate) fn push_command(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// Reads one reply.
pub(crate) fn read_reply(from: &mut impl std::io::BufRead) -> Result<Reply> {
    let line = read_line(from)?;
    let (kind, rest) = line
        .split_at_checked(1)
        .ok_or_else(|| anyhow!("redis sent an empty line"))?;
    Ok(match kind {
        "+" => Reply::Simple(rest.to_owned()),
        "-" => Reply::Error(rest.to_owned()),
        ":" => Reply::Number(rest.parse().context("redis sent a bad number")?),
        "$" if rest == "-1" => Reply::Bulk(None),
        "$" => Reply::Bulk(Some(read_bulk(from, rest)?)),
        "*" => {
            let count: usize = rest.parse().context("redis sent a bad count")?;
            if count > ARRAY_ITEMS_MAX {
                bail!("redis sent an array of {count} items");
            }
            Reply::Array((0..count).map(|_| read_reply(from)).collect::<Result<_>>()?)
        }
        _ => bail!("redis sent {line:?}"),
    })
}

fn read_line(from: &mut impl std::io::BufRead) -> Result<String> {
    let mut line = String::new();
    let bytes = from
        .take(4096)
        .read_line(&mut line)
        .context("cannot read from redis")?;
    if bytes == 0 {
        bail!("redis closed the connection");
    }
    line.truncate(line.trim_end().len());
    Ok(line)
}

fn read_bulk(from: &mut impl std::io::BufRead, length: &str) -> Result<Vec<u8>> {
    let length: usize = length.parse().context("redis sent a bad length")?;
    if length > BULK_BYTES_MAX {
        bail!("redis sent a value of {length} bytes");
    }
    let mut bytes = vec![0; length + 2];
    from.read_exact(&mut bytes).context("cannot read from redis")?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Connects from the client's host to the guest's redis.
pub(crate) fn connect(lab: &Lab, at_most: Duration) -> Result<TcpStream> {
    connect_to(lab, GUEST_IP, at_most)
}

/// The same, to another guest.
pub(crate) fn connect_to(lab: &Lab, ip: Ipv4Addr, at_most: Duration) -> Result<TcpStream> {
    let address = SocketAddr::from((ip, REDIS_PORT));
    let stream = within(&lab.net.namespace(Host::Client), || {
        TcpStream::connect_timeout(&address, at_most).with_context(|| format!("cannot connect to {address}"))
    })?;
    stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
    Ok(stream)
}

/// One command at a time.
#[derive(Debug)]
pub(crate) struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    /// Connects; every later call waits no longer than `at_most`, either.
    pub(crate) fn connect(lab: &Lab, at_most: Duration) -> Result<Redis> {
        Redis::connect_to(lab, GUEST_IP, at_most)
    }

    /// The same, to another guest.
    pub(crate) fn connect_to(lab: &Lab, ip: Ipv4Addr, at_most: Duration) -> Result<Redis> {
        let stream = connect_to(lab, ip, at_most)?;
        stream
            .set_read_timeout(Some(at_most))
            .context("cannot set a timeout")?;
        Ok(Redis {
            stream: BufReader::new(stream),
        })
    }

    /// Asks and waits for the reply.
    pub(crate) fn ask(&mut self, words: &[&[u8]]) -> Result<Reply> {
        self.tell(words)?;
        read_reply(&mut self.stream)
    }

    /// Sends a command.
    pub(crate) fn tell(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut out = Vec::new();
        push_command(&mut out, words);
        self.stream
            .get_mut()
            .write_all(&out)
            .context("cannot write to redis")
    }

    /// Whether it answers.
    pub(crate) fn ping(&mut self) -> Result<()> {
        match self.ask(&[b"PING"])? {
            Reply::Simple(pong) if pong == "PONG" => Ok(()),
            other => bail!("redis answered PING with {other:?}"),
        }
    }

    /// What the testbed's guest has found in itself.
    pub(crate) fn self_check(&mut self) -> Result<()> {
        match self.ask(&[b"SELFCHECK"])? {
            Reply::Simple(ok) if ok == "OK" => Ok(()),
            other => bail!("the guest's check of itself says {other:?}"),
        }
    }

    /// By how much the guest's clock is ahead of ours, in microseconds, the least of several tries. Only differences say
    /// something: the testbed's guest counts from its own beginning.
    ///
    /// What makes a try bad is the way of the request to the guest. The reply's way, which a gate makes long, does not count.
    pub(crate) fn clock_ahead_us(&mut self, vmm: Vmm) -> Result<i64> {
        let mut least = i64::MAX;
        for _ in 0..20 {
            let sent = Stamp::now();
            let guest = self.clock_us(vmm)?;
            least = least.min(guest - i64::try_from(sent.micros())?);
        }
        Ok(least)
    }

    /// What the guest's clock says.
    fn clock_us(&mut self, vmm: Vmm) -> Result<i64> {
        let asked: &[u8] = match vmm {
            Vmm::Qemu => b"TIME",
            Vmm::Testbed => b"CLOCK",
        };
        let Reply::Array(parts) = self.ask(&[asked])? else {
            bail!("the guest did not tell its time")
        };
        let numbers: Vec<i64> = parts.iter().map(number).collect::<Result<_>>()?;
        match (vmm, &numbers[..]) {
            (Vmm::Qemu, [seconds, micros]) => Ok(seconds.saturating_mul(1_000_000).saturating_add(*micros)),
            // kvmclock in nanoseconds, then the processor's counter.
            (Vmm::Testbed, [nanos, _]) => Ok(nanos / 1000),
            _ => bail!("the guest told its time as {numbers:?}"),
        }
    }
}

fn number(reply: &Reply) -> Result<i64> {
    match reply {
        Reply::Number(number) => Ok(*number),
        Reply::Bulk(Some(bytes)) => Ok(std::str::from_utf8(bytes)?.parse()?),
        other => bail!("redis sent {other:?} in the place of a number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut bytes: &[u8]) -> Result<Reply> {
        read_reply(&mut bytes)
    }

    #[test]
    fn every_kind_of_reply_is_read() {
        assert_eq!(read(b"+OK\r\n").unwrap(), Reply::Simple("OK".to_owned()));
        assert_eq!(read(b"-OOM no\r\n").unwrap(), Reply::Error("OOM no".to_owned()));
        assert_eq!(read(b"$-1\r\n").unwrap(), Reply::Bulk(None));
        let array = Reply::Array(vec![Reply::Number(-7), Reply::Bulk(Some(b"a\r\nb".to_vec()))]);
        assert_eq!(read(b"*2\r\n:-7\r\n$4\r\na\r\nb\r\n").unwrap(), array);
    }

    #[test]
    fn a_broken_stream_is_an_error_and_not_much_memory() {
        for bytes in [
            &b""[..],
            b"\r\n",
            b"$99999999\r\n",
            b"*99999999\r\n",
            b"$5\r\nab",
            b"?\r\n",
            b"\xff\r\n",
        ] {
            assert!(read(bytes).is_err(), "{bytes:?}");
        }
    }
}
