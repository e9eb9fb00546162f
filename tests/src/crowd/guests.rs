//! What the guests of a crowd are asked.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{ANSWER_AT_MOST, Crowd};
use crate::Stamp;
use crate::probe::Probe;
use crate::resp::{Redis, Reply};

impl<A: Sync> Crowd<A> {
    /// Tells the testbed's guest of a VM something in its service's words, and waits for the answer.
    ///
    /// # Errors
    /// When it does not answer, or with an error.
    pub fn tell(&self, name: &str, words: &[&str]) -> Result<()> {
        let ip = self.members[self.number(name)?].ip;
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        match Redis::connect_to(&self.lab, ip, ANSWER_AT_MOST)?.ask(&words)? {
            Reply::Error(error) => bail!("the guest of {name} says {error}"),
            _ => Ok(()),
        }
    }

    /// How many SET and GET commands the Linux guest of a VM has served so far, and when it was asked: it counts right then, however long its
    /// answer is held.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn commands_served(&self, name: &str) -> Result<(Instant, u64)> {
        let ip = self.members[self.number(name)?].ip;
        let mut redis = Redis::connect_to(&self.lab, ip, ANSWER_AT_MOST)?;
        let asked = Instant::now();
        match redis.ask(&[b"INFO", b"commandstats"])? {
            Reply::Bulk(Some(text)) => Ok((asked, calls(&String::from_utf8_lossy(&text)))),
            other => bail!("the guest of {name} answers {other:?}"),
        }
    }

    /// Begins to ask the service of a VM from the client's host, as [`Probe`] does, with `every` between two requests on average.
    ///
    /// # Errors
    /// When it can't be reached.
    pub fn probe(&self, name: &str, every: Duration, seed: u64) -> Result<Probe> {
        Probe::start_to(&self.lab, self.members[self.number(name)?].ip, every, seed)
    }

    /// When each of these VMs serves for the first time from now on, in milliseconds after `from`; all are looked at all the
    /// time.
    ///
    /// # Errors
    /// When one does not come back.
    pub fn first_answers_ms(&self, names: &[&str], from: Stamp) -> Result<Vec<u64>> {
        let answers: Vec<Result<u64>> = std::thread::scope(|scope| {
            let asking: Vec<_> = names
                .iter()
                .map(|name| {
                    scope.spawn(move || {
                        Ok(self.wait_serves(name)?.micros().saturating_sub(from.micros()) / 1000)
                    })
                })
                .collect();
            let answer =
                |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().expect("it does not panic");
            asking.into_iter().map(answer).collect()
        });
        answers.into_iter().collect()
    }

    /// The guest must have found nothing wrong in itself.
    ///
    /// # Errors
    /// What it found, or that it does not answer.
    pub fn ensure_whole(&self, name: &str) -> Result<()> {
        let ip = self.members[self.number(name)?].ip;
        Redis::connect_to(&self.lab, ip, ANSWER_AT_MOST)?.self_check()
    }
}

/// Of SET and GET together, in what redis says of its commands; none of a command that was never called.
fn calls(commandstats: &str) -> u64 {
    ["cmdstat_set:calls=", "cmdstat_get:calls="]
        .into_iter()
        .filter_map(|head| commandstats.lines().find_map(|line| line.strip_prefix(head)))
        .filter_map(|rest| rest.split(',').next()?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_calls_of_what_the_benchmark_asks_are_counted() {
        let said = "# Commandstats\r\ncmdstat_ping:calls=900,usec=1\r\ncmdstat_set:calls=120,usec=366,failed_calls=0\r\ncmdstat_get:calls=80,usec=1\r\n";
        assert_eq!(calls(said), 200);
        assert_eq!(calls("# Commandstats\r\n"), 0);
    }
}
