//! A guest's service under the load of a few clients: half of the commands write, half of them read, many at once, as fast as they are answered.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use romulus_e2e::links::Links;
use romulus_guest_core::random::Random;
use romulus_host_sys::netns;
use romulus_host_sys::tap::Tap;

use crate::run::Unable;

/// In the namespace of the calling thread alone.
pub(super) const TAP: &str = "trace0";
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
const PORT: u16 = 6379;
/// What the guest is told of it.
pub(super) const WORDS: &str = "ip=10.77.0.2/24";
pub(super) const LINUX_WORDS: &str = "ip4=10.77.0.2/24 wl=redis";
const CLIENTS: u64 = 4;
const KEYS: u64 = 20_000;
const VALUE_BYTES: usize = 100;
/// Commands that are sent at once.
const BATCH: usize = 16;
const LIMIT: Duration = Duration::from_secs(180);

/// Moves the calling thread to a network of its own, with a tap for a guest in it.
pub(super) fn enter_network() -> Result<(), Unable> {
    netns::enter_new().map_err(|error| Unable::Missing {
        what: format!("no network namespace can be made ({error})"),
        remedy: "run it as root".to_owned(),
    })?;
    let made = Tap::create(TAP, false).and_then(Tap::persist);
    made.map_err(Unable::failed("making a tap"))?;
    let wired = Links::open().and_then(|mut links| {
        links.add_address(TAP, HOST, 24)?;
        links.switch(TAP, true)
    });
    wired.map_err(Unable::failed("wiring a network"))
}

/// Commands that were answered as they should be.
#[derive(Default)]
pub(super) struct Load {
    stop: AtomicBool,
    answered: AtomicU64,
}

impl Load {
    /// Fills the guest with keys, and then does `work` while clients are at it. Returns how many commands were answered meanwhile.
    pub(super) fn during<T>(work: impl FnOnce() -> Result<T, Unable>) -> Result<(T, u64), Unable> {
        let load = Self::default();
        client(1, |client| client.fill())?;
        std::thread::scope(|scope| {
            let load = &load;
            let clients: Vec<_> = (1..=CLIENTS)
                .map(|seed| scope.spawn(move || client(seed, |client| client.go_on(load))))
                .collect();
            let worked = load.begun().and_then(|()| work());
            load.stop.store(true, Ordering::Relaxed);
            for client in clients {
                let ended = client.join();
                ended.unwrap_or_else(|_| Err(Unable::Wrong("a client panicked".to_owned())))?;
            }
            Ok((worked?, load.answered.load(Ordering::Relaxed)))
        })
    }
}

impl Load {
    /// Waits for the first answers.
    fn begun(&self) -> Result<(), Unable> {
        let begun = Instant::now();
        while self.answered.load(Ordering::Relaxed) == 0 {
            if begun.elapsed() > LIMIT {
                return Err(Unable::Wrong("the guest's service answers nobody".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

struct Client {
    stream: BufReader<TcpStream>,
    random: Random,
    commands: Vec<u8>,
}

fn client(seed: u64, work: impl FnOnce(&mut Client) -> std::io::Result<()>) -> Result<(), Unable> {
    let connected = connect();
    let mut client = Client {
        stream: BufReader::new(connected.map_err(Unable::failed("connecting to the guest"))?),
        random: Random::new(seed),
        commands: Vec::new(),
    };
    work(&mut client).map_err(Unable::failed("asking the guest's service"))
}

/// The guest may only just be starting.
fn connect() -> std::io::Result<TcpStream> {
    let begun = Instant::now();
    loop {
        match TcpStream::connect_timeout(&SocketAddr::new(GUEST, PORT), Duration::from_secs(1)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(LIMIT))?;
                return Ok(stream);
            }
            Err(error) if begun.elapsed() > LIMIT => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

impl Client {
    fn fill(&mut self) -> std::io::Result<()> {
        for first in (0..KEYS).step_by(BATCH) {
            self.commands.clear();
            let keys = first..(first + BATCH as u64).min(KEYS);
            keys.clone().for_each(|key| self.set(key));
            self.ask(keys.map(|_| true))?;
        }
        Ok(())
    }

    fn go_on(&mut self, load: &Load) -> std::io::Result<()> {
        loop {
            self.commands.clear();
            for number in 0..BATCH {
                let key = self.random.below(KEYS);
                if number.is_multiple_of(2) {
                    self.set(key);
                } else {
                    let command = format!("*2\r\n$3\r\nGET\r\n$16\r\nkey:{key:012}\r\n");
                    self.commands.extend_from_slice(command.as_bytes());
                }
            }
            self.ask((0..BATCH).map(|number| number.is_multiple_of(2)))?;
            load.answered.fetch_add(BATCH as u64, Ordering::Relaxed);
            if load.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// A value of letters that nothing foretells.
    fn set(&mut self, key: u64) {
        let head = format!("*3\r\n$3\r\nSET\r\n$16\r\nkey:{key:012}\r\n${VALUE_BYTES}\r\n");
        self.commands.extend_from_slice(head.as_bytes());
        for _ in 0..VALUE_BYTES {
            let letter = b'a' + u8::try_from(self.random.below(26)).expect("26 letters");
            self.commands.push(letter);
        }
        self.commands.extend_from_slice(b"\r\n");
    }

    /// Sends what is collected, and looks at each answer: `+OK` to a write, a value of the right length to a reading.
    fn ask(&mut self, writes: impl Iterator<Item = bool>) -> std::io::Result<()> {
        self.stream.get_mut().write_all(&self.commands)?;
        for is_write in writes {
            let head = self.line()?;
            let expected = if is_write {
                "+OK".to_owned()
            } else {
                format!("${VALUE_BYTES}")
            };
            if head != expected || (!is_write && self.line()?.len() != VALUE_BYTES) {
                return Err(std::io::Error::other(format!("the guest answered {head:?}")));
            }
        }
        Ok(())
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::Error::other("the guest closed the connection"));
        }
        line.truncate(line.trim_end().len());
        Ok(line)
    }
}
