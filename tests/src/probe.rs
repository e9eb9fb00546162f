//! Latency as a stranger sees it: requests at random moments, whether or not earlier ones have been answered.
//!
//! A closed loop would wait during a stall and so measure it once; arrivals that do not wait meet it as real ones do.

use std::collections::VecDeque;
use std::io::{BufReader, ErrorKind, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use hdrhistogram::Histogram;

use crate::netns::GUEST_IP;
use crate::resp::{connect_to, read_reply};
use crate::{Lab, Stamp};

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When it was due.
    pub at: Stamp,
    /// From then to its answer.
    pub latency: Duration,
}

/// The median and the 99th percentile.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Quantiles {
    /// The median, in milliseconds.
    pub p50: f64,
    /// The 99th percentile, in milliseconds.
    pub p99: f64,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    due: Mutex<VecDeque<(Stamp, Instant)>>,
    samples: Mutex<Vec<Sample>>,
}

/// The running probe.
#[derive(Debug)]
pub struct Probe {
    shared: Arc<Shared>,
    stream: TcpStream,
    threads: [JoinHandle<()>; 2],
}

impl Probe {
    /// Connects from the client's host and begins, with `every` between two requests on average.
    ///
    /// # Errors
    /// When redis cannot be reached.
    pub fn start(lab: &Lab, every: Duration, seed: u64) -> Result<Probe> {
        Probe::start_to(lab, GUEST_IP, every, seed)
    }

    /// The same, with another guest.
    ///
    /// # Errors
    /// As [`Probe::start`].
    pub fn start_to(lab: &Lab, ip: Ipv4Addr, every: Duration, seed: u64) -> Result<Probe> {
        let stream = connect_to(lab, ip, Duration::from_secs(5))?;
        let shared = Arc::new(Shared::default());
        let (writing, reading) = (clone(&stream)?, BufReader::new(clone(&stream)?));
        let threads = [
            std::thread::spawn({
                let shared = Arc::clone(&shared);
                move || send_all(writing, &shared, every, seed)
            }),
            std::thread::spawn({
                let shared = Arc::clone(&shared);
                move || read_all(reading, &shared)
            }),
        ];
        Ok(Probe {
            shared,
            stream,
            threads,
        })
    }

    /// The quantiles of the requests that were due in `from..to`, and how many there were.
    #[must_use]
    pub fn quantiles(&self, from: Stamp, to: Stamp) -> (Quantiles, usize) {
        let samples = self.shared.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen: Vec<Duration> = samples
            .iter()
            .filter(|sample| from <= sample.at && sample.at < to)
            .map(|sample| sample.latency)
            .collect();
        (quantiles(&chosen), chosen.len())
    }

    /// Ends the probe.
    ///
    /// # Errors
    /// When one of its threads panicked.
    pub fn finish(self) -> Result<Vec<Sample>> {
        self.shared.stop.store(true, Ordering::Release);
        // A connection that is gone already needs no shutting down.
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads {
            thread
                .join()
                .map_err(|_| anyhow!("a thread of the probe panicked"))?;
        }
        Ok(std::mem::take(
            &mut *self.shared.samples.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }
}

/// The quantiles of some latencies; zero when there are none.
#[must_use]
pub fn quantiles(latencies: &[Duration]) -> Quantiles {
    // Three digits from a microsecond to ten minutes; the constructor does not refuse these numbers.
    let Ok(mut histogram) = Histogram::<u64>::new_with_bounds(1, 600_000_000, 3) else {
        return Quantiles::default();
    };
    for latency in latencies {
        histogram.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
    }
    let ms = |quantile: f64| Duration::from_micros(histogram.value_at_quantile(quantile)).as_secs_f64() * 1e3;
    Quantiles {
        p50: ms(0.5),
        p99: ms(0.99),
    }
}

fn clone(stream: &TcpStream) -> Result<TcpStream> {
    stream.try_clone().context("cannot duplicate a socket")
}

fn send_all(mut stream: TcpStream, shared: &Shared, every: Duration, seed: u64) {
    let mut random = Random::new(seed);
    let mut due = Instant::now();
    while !shared.stop.load(Ordering::Acquire) {
        due += every.mul_f64(random.exponential());
        if let Some(wait) = due.checked_duration_since(Instant::now()) {
            sleep(wait);
        }
        // The moment it was due, not the moment that this thread woke: a late sender must not flatter.
        let late = due.elapsed();
        shared
            .due
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back((Stamp::now().minus(late), due));
        if stream.write_all(b"*1\r\n$4\r\nPING\r\n").is_err() {
            return;
        }
    }
}

fn read_all(mut reading: BufReader<TcpStream>, shared: &Shared) {
    loop {
        if let Err(error) = read_reply(&mut reading) {
            let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            if kind == Some(ErrorKind::Interrupted) {
                continue;
            }
            return;
        }
        let due = shared
            .due
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        if let Some((at, due)) = due {
            let sample = Sample {
                at,
                latency: due.elapsed(),
            };
            shared
                .samples
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(sample);
        }
    }
}

/// Random numbers that a seed reproduces (splitmix64; Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in 0..1.
    pub fn fraction(&mut self) -> f64 {
        let bits = u32::try_from(self.next_u64() >> 32).unwrap_or(u32::MAX);
        f64::from(bits) / (f64::from(u32::MAX) + 1.0)
    }

    /// Exponential with mean 1: the gaps of arrivals at random times.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.fraction()).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_mean_that_was_asked_for() {
        let mut random = Random::new(7);
        let mean = (0..20_000).map(|_| random.exponential()).sum::<f64>() / 20_000.0;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
    }

    #[test]
    fn quantiles_are_of_what_was_recorded() {
        let latencies: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        let found = quantiles(&latencies);
        assert!(
            (found.p50 - 50.0).abs() < 0.5 && (found.p99 - 99.0).abs() < 0.5,
            "{found:?}"
        );
        assert_eq!(quantiles(&[]), Quantiles::default());
    }
}
