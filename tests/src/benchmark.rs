//! Load by Debian's `redis-benchmark`: several connections, pipelined SETs and GETs at random keys, until it is dropped.
//!
//! It ends when one of its connections breaks, and says so; as long as it runs, none did. What it writes is not read back: that is the
//! [`crate::client`]'s part, which writes beside it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::netns::{GUEST_IP, Host};
use crate::{Lab, Process, wait_for};

/// The program, of the package redis-tools.
pub const PROGRAM: &str = "/usr/bin/redis-benchmark";
const CONNECTIONS: &str = "8";
const PIPELINE: &str = "4";
const KEYS: &str = "2000";
const VALUE_BYTES: &str = "64";
/// Before it turns to the other command.
const REQUESTS: &str = "5000";

/// The load, as long as it is held.
#[derive(Debug)]
pub struct Benchmark(Process);

impl Benchmark {
    /// Starts it on the client's host.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn start(lab: &Lab) -> Result<Benchmark> {
        if !Path::new(PROGRAM).exists() {
            bail!("{PROGRAM} is missing: `apt-get install redis-tools`, or `cargo xtask setup`");
        }
        let guest = GUEST_IP.to_string();
        let words = [PROGRAM, "-h", &guest, "-p", "6379", "-t", "set,get", "-l", "-q"];
        let sizes = [
            ("-c", CONNECTIONS),
            ("-P", PIPELINE),
            ("-r", KEYS),
            ("-d", VALUE_BYTES),
            ("-n", REQUESTS),
        ];
        let argv: Vec<String> = words
            .into_iter()
            .chain(sizes.into_iter().flat_map(|(option, value)| [option, value]))
            .map(str::to_owned)
            .collect();
        Ok(Benchmark(lab.spawn(Host::Client, "redis-benchmark", &argv)?))
    }

    /// Waits until it goes on: it must not have ended, and have answers again.
    ///
    /// # Errors
    /// What it said at its end, or that no answer comes.
    pub fn ensure_it_goes_on(&mut self, at_most: Duration) -> Result<()> {
        // From here on: what it said before may be of before the takeover.
        let said = || std::fs::read(self.0.log()).unwrap_or_default();
        let before = said().len();
        let goes_on = wait_for("an answer to redis-benchmark", at_most, || {
            let said = std::fs::read(self.0.log()).unwrap_or_default();
            let new = String::from_utf8_lossy(said.get(before..).unwrap_or_default()).into_owned();
            if self.0.ended().is_some() {
                return Some(false);
            }
            rates(&new).any(|rate| rate > 0.0).then_some(true)
        })
        .with_context(|| format!("it said last: {}", self.last_words()))?;
        if !goes_on {
            bail!("redis-benchmark ended: {}", self.last_words());
        }
        Ok(())
    }

    /// The end of what it said.
    fn last_words(&self) -> String {
        let tail = self.0.tail();
        let begin = tail.floor_char_boundary(tail.len().saturating_sub(300));
        tail[begin..].replace('\r', "\n").trim().to_owned()
    }
}

/// The rates in its reports (`SET: rps=1234.0 (overall: …`), without the overall ones.
fn rates(said: &str) -> impl Iterator<Item = f64> {
    said.split("rps=").skip(1).filter_map(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
        rest[..digits.unwrap_or(rest.len())].parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_each_report_is_read() {
        let said = "SET: rps=0.0 (overall: 812.5) avg_msec=nan (overall: 1.0)\rGET: rps=1200.8 (overall: 1200.8)\rGET: 99 requests per second\nSET: rps=";
        assert_eq!(rates(said).collect::<Vec<_>>(), [0.0, 1200.8]);
    }
}
