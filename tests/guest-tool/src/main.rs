//! The workloads of the test guest, in one static program without dependencies.
//!
//! | verb | what it does | what it prints |
//! |---|---|---|
//! | `dirty PAGES MS` | writes one word into each of PAGES pages, every MS milliseconds | nothing |
//! | `counter MS` | counts | `counter N` every MS milliseconds |
//! | `check PAGES` | fills PAGES pages with a pattern, verifies them, and again | `check ok N` or `check BAD page P` |
//! | `clock MS` | reads both clocks | `clock REALTIME_US MONOTONIC_US` every MS milliseconds |
//! | `echo PORT` | answers UDP datagrams with what they hold | nothing |
//! | `trigger PORT` | writes each UDP datagram to the kernel's sysrq trigger: `o` powers off, `b` reboots | nothing |
//! | `work PROGRAM` | has `stress-ng`, `sqlite` (sqlite3), `compile` (tcc) or `redis-benchmark` do some work over and over | `work PROGRAM UNITS` after each round, `work BAD ...` when it goes wrong |
//! | `steer` | slews the clock to follow the emulated RTC | `steer ...` when it corrects |
//!
//! Everything goes to standard output, which is the guest's console.
#![forbid(unsafe_code)]

mod memory;
mod steer;
mod work;

use std::error::Error;
use std::io::Write as _;
use std::net::UdpSocket;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| -> Result<u64, Box<dyn Error>> {
        let word = words
            .get(at)
            .ok_or("guest-tool: a number is missing; see tests/guest-tool/src/main.rs")?;
        Ok(word.parse()?)
    };
    match words.first().map(String::as_str) {
        Some("dirty") => memory::dirty(usize::try_from(number(1)?)?, Duration::from_millis(number(2)?)),
        Some("check") => memory::check(usize::try_from(number(1)?)?),
        Some("counter") => counter(Duration::from_millis(number(1)?)),
        Some("clock") => clock(Duration::from_millis(number(1)?)),
        Some("echo") => echo(u16::try_from(number(1)?)?),
        Some("trigger") => trigger(u16::try_from(number(1)?)?),
        Some("work") => work::run(words.get(1).map_or("", String::as_str)),
        Some("steer") => steer::run(),
        _ => Err("guest-tool: unknown verb; see tests/guest-tool/src/main.rs".into()),
    }
}

/// Prints one whole line at once, so that the lines of several programs do not mix.
fn say(line: &str) -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes())?;
    out.flush()?;
    Ok(())
}

fn counter(every: Duration) -> Result<(), Box<dyn Error>> {
    let mut count = 0_u64;
    loop {
        say(&format!("counter {count}"))?;
        count += 1;
        sleep(every);
    }
}

fn clock(every: Duration) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    loop {
        let realtime = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
        say(&format!("clock {realtime} {}", start.elapsed().as_micros()))?;
        sleep(every);
    }
}

fn echo(port: u16) -> Result<(), Box<dyn Error>> {
    let socket = UdpSocket::bind(("::", port))?;
    let mut buffer = [0_u8; 2048];
    loop {
        let (bytes, from) = socket.recv_from(&mut buffer)?;
        // A reply that cannot be sent is a lost datagram, which UDP allows.
        let _ = socket.send_to(&buffer[..bytes], from);
    }
}

fn trigger(port: u16) -> Result<(), Box<dyn Error>> {
    let socket = UdpSocket::bind(("::", port))?;
    let mut buffer = [0_u8; 16];
    loop {
        let bytes = socket.recv(&mut buffer)?;
        std::fs::write("/proc/sysrq-trigger", &buffer[..bytes])?;
    }
}
