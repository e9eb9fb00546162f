//! A client of the guest's service.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Where it serves: keys and values by TCP, an echo by UDP.
pub const PORT: u16 = 6379;
/// How long an answer may take on a busy machine.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a guest may take to start to serve.
const START: Duration = Duration::from_secs(60);

/// One connection.
pub struct Service {
    stream: BufReader<TcpStream>,
}

impl Service {
    /// Connects, as soon as the guest takes connections.
    pub fn connect() -> Service {
        let begin = Instant::now();
        loop {
            match TcpStream::connect_timeout(&SocketAddr::from((GUEST, PORT)), Duration::from_secs(2)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(ANSWER)).unwrap();
                    stream.set_nodelay(true).unwrap();
                    return Service {
                        stream: BufReader::new(stream),
                    };
                }
                Err(error) => assert!(begin.elapsed() < START, "the guest takes no connection: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends words as one command.
    pub fn send(&mut self, command: &str) {
        self.stream
            .get_mut()
            .write_all(format!("{command}\r\n").as_bytes())
            .unwrap();
    }

    /// The next reply; a bulk as its text, an array as its items separated by blanks.
    pub fn reply(&mut self) -> String {
        let line = self.line();
        match line.split_at_checked(1) {
            Some(("$", "-1")) => "(none)".to_owned(),
            Some(("$", bytes)) => self.bulk(bytes.parse().unwrap()),
            Some(("*", count)) => {
                let count: usize = count.parse().unwrap();
                (0..count).map(|_| self.reply()).collect::<Vec<_>>().join(" ")
            }
            Some((":", number)) => number.to_owned(),
            _ => line,
        }
    }

    /// Sends a command and waits for its reply.
    pub fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.reply()
    }

    /// A figure of `INFO`: what the guest has done so far.
    pub fn figure(&mut self, name: &str) -> u64 {
        let report = self.ask("INFO");
        let mut values = report
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let value = values
            .next()
            .unwrap_or_else(|| panic!("INFO has no {name}: {report}"));
        value.parse().unwrap()
    }

    fn bulk(&mut self, bytes: usize) -> String {
        let mut text = vec![0; bytes + 2];
        self.stream.read_exact(&mut text).expect("the connection lives");
        text.truncate(bytes);
        String::from_utf8(text).unwrap()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let bytes = self.stream.read_line(&mut line).expect("the connection lives");
        assert!(bytes > 0, "the guest closed the connection");
        line.trim_end().to_owned()
    }
}
