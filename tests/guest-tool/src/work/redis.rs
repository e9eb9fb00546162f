//! `redis-benchmark` beside the server that it asks: no network's latency is in what it gets done. A unit is a command.

use std::error::Error;
use std::net::TcpStream;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Program, output};

/// SETs, and as many GETs, in a round.
const REQUESTS: u64 = 2000;

/// The server starts beside it.
const START_LIMIT: Duration = Duration::from_secs(60);

pub(super) struct Benchmark;

impl Benchmark {
    /// Waits for the server: `redis-benchmark` hangs where there is none.
    pub(super) fn begin() -> Result<Self, Box<dyn Error>> {
        let begun = Instant::now();
        while let Err(error) = TcpStream::connect(("127.0.0.1", 6379)) {
            if begun.elapsed() > START_LIMIT {
                return Err(error.into());
            }
            sleep(Duration::from_millis(50));
        }
        Ok(Self)
    }
}

impl Program for Benchmark {
    fn round(&mut self) -> Result<u64, Box<dyn Error>> {
        let requests = REQUESTS.to_string();
        let mut command = Command::new("redis-benchmark");
        command
            .args(["-t", "set,get", "-q", "-n", &requests])
            .args(["-c", "8", "-P", "4", "-r", "2000", "-d", "64"]);
        let said = output(&mut command, "")?;
        // It also ends well when the server says no.
        if said.contains("Error") || said.matches("requests per second").count() != 2 {
            return Err(format!("redis-benchmark said {:?}", said.trim()).into());
        }
        Ok(2 * REQUESTS)
    }
}
