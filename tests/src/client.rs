//! The client whose writes must not be lost: one TCP connection, pipelined SETs, every acknowledgement remembered.
//!
//! Write number `i` stores `i` under the key `i mod KEYS`. Redis answers in order, so what has been acknowledged is
//! a number. At the end the client waits for the answers that are due, reads every key back over *the
//! same connection*, and asks redis whether it still is the same. A key must hold the last number that was written to it: less
//! is a lost write, and on the way an answer that is no `+OK` counts as a refusal.

use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::ledger::{key_of, lost_writes, number_of};
use crate::resp::{Reply, connect, push_command, read_reply};
use crate::{Lab, Stamp};

/// How hard to write.
#[derive(Clone, Copy, Debug)]
pub struct ClientConfig {
    /// Different keys; a number goes round.
    pub keys: u64,
    /// Writes sent at once.
    pub batch: u64,
    /// Between batches.
    pub every: Duration,
    /// Writes that may be unanswered. When as many are, the client waits, as a real one does.
    pub window: u64,
    /// Bytes of padding in each value.
    pub padding: usize,
}

impl Default for ClientConfig {
    fn default() -> ClientConfig {
        ClientConfig {
            keys: 4000,
            batch: 4,
            every: Duration::from_millis(5),
            window: 256,
            padding: 100,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct ClientReport {
    /// Writes that were sent.
    pub sent: u64,
    /// Writes that were acknowledged.
    pub acked: u64,
    /// Acknowledged writes that are not there.
    pub lost: u64,
    /// 1 when the connection was reset or closed, 0 when it lives.
    pub resets: u64,
    /// Answers that were errors.
    pub refused: u64,
    /// Why the connection ended or could not be verified.
    pub trouble: Option<String>,
    /// When each acknowledgement came, in order.
    pub ack_times: Vec<Stamp>,
}

impl ClientReport {
    /// The longest wait for an acknowledgement that ended after `from`: when it began and when it ended.
    #[must_use]
    pub fn longest_gap_after(&self, from: Stamp) -> Option<(Stamp, Stamp)> {
        let pairs = self
            .ack_times
            .windows(2)
            .filter_map(|pair| <[Stamp; 2]>::try_from(pair).ok());
        pairs
            .filter(|[_, to]| *to > from)
            .map(|[from, to]| (from, to))
            .max_by_key(|(a, b)| b.micros() - a.micros())
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    acked: AtomicU64,
    refused: AtomicU64,
    ack_times: Mutex<Vec<Stamp>>,
    trouble: Mutex<Option<String>>,
}

impl Shared {
    fn give_up(&self, error: &anyhow::Error) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.get_or_insert_with(|| format!("{error:#}"));
        self.stop.store(true, Ordering::Release);
    }

    fn trouble(&self) -> Option<String> {
        self.trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// The running client.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    shared: Arc<Shared>,
    connection: i64,
    writer: JoinHandle<()>,
    reader: JoinHandle<BufReader<TcpStream>>,
    stream: TcpStream,
}

impl Client {
    /// Connects from the client's host and begins to write.
    ///
    /// # Errors
    /// When redis cannot be reached.
    pub fn start(lab: &Lab, config: ClientConfig) -> Result<Client> {
        let stream = connect(lab, Duration::from_secs(5))?;
        let mut reading = BufReader::new(stream.try_clone().context("cannot duplicate a socket")?);
        let connection = client_id(&stream, &mut reading)?;
        let shared = Arc::new(Shared::default());
        let writing = stream.try_clone().context("cannot duplicate a socket")?;
        let writer = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                if let Err(error) = write_all(writing, config, &shared) {
                    shared.give_up(&error);
                }
            }
        });
        let reader = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                if let Err(error) = read_all(&mut reading, &shared) {
                    shared.give_up(&error);
                }
                reading
            }
        });
        Ok(Client {
            config,
            shared,
            connection,
            writer,
            reader,
            stream,
        })
    }

    /// How many writes have been acknowledged.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::Acquire)
    }

    /// When the last acknowledgement came.
    #[must_use]
    pub fn last_ack(&self) -> Option<Stamp> {
        self.shared
            .ack_times
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last()
            .copied()
    }

    /// Why it has given up, if it has.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble()
    }

    /// Stops writing, waits for the answers that are due, and reads everything back.
    ///
    /// # Errors
    /// When a thread of the client panicked, or redis can be reached on no connection at all.
    pub fn finish(self, lab: &Lab, at_most: Duration) -> Result<ClientReport> {
        self.shared.stop.store(true, Ordering::Release);
        self.writer
            .join()
            .map_err(|_| anyhow!("the client's writer panicked"))?;
        let drained = drain(&self.shared, at_most);
        if !drained {
            // Frees the reader, which otherwise waits for ever.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
        let mut reading = self
            .reader
            .join()
            .map_err(|_| anyhow!("the client's reader panicked"))?;
        let (sent, acked) = (
            self.shared.sent.load(Ordering::Acquire),
            self.shared.acked.load(Ordering::Acquire),
        );
        let mut trouble = self.shared.trouble();
        if !drained {
            trouble.get_or_insert(format!(
                "{} answers did not come within {at_most:?}",
                sent - acked
            ));
        }
        let mut resets = u64::from(trouble.is_some());
        let lost = if trouble.is_none() {
            let read_back = same_connection(&self.stream, &mut reading, self.connection)
                .and_then(|()| held_numbers(&self.stream, &mut reading, self.config.keys.min(sent)));
            match read_back {
                Ok(held) => lost_writes(&held, self.config.keys, acked, sent)?,
                Err(error) => {
                    trouble = Some(format!("{error:#}"));
                    resets = 1;
                    lost_by_another_connection(lab, &self.config, acked, sent)?
                }
            }
        } else {
            lost_by_another_connection(lab, &self.config, acked, sent)?
        };
        let ack_times = std::mem::take(
            &mut *self
                .shared
                .ack_times
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let refused = self.shared.refused.load(Ordering::Acquire);
        Ok(ClientReport {
            sent,
            acked,
            lost,
            resets,
            refused,
            trouble,
            ack_times,
        })
    }
}

fn write_all(mut stream: TcpStream, config: ClientConfig, shared: &Shared) -> Result<()> {
    let padding = vec![b'.'; config.padding];
    let mut next = Instant::now();
    while !shared.stop.load(Ordering::Acquire) {
        let (sent, acked) = (
            shared.sent.load(Ordering::Acquire),
            shared.acked.load(Ordering::Acquire),
        );
        if sent - acked + config.batch <= config.window {
            let mut out = Vec::new();
            for number in sent..sent + config.batch {
                let mut value = format!("{number} ").into_bytes();
                value.extend_from_slice(&padding);
                push_command(
                    &mut out,
                    &[b"SET", key_of(number % config.keys).as_bytes(), &value],
                );
            }
            // Counted before it is written: an answer must never be ahead of its question.
            shared.sent.store(sent + config.batch, Ordering::Release);
            stream.write_all(&out).context("cannot write to redis")?;
        }
        next += config.every;
        match next.checked_duration_since(Instant::now()) {
            Some(wait) => sleep(wait),
            None => next = Instant::now(),
        }
    }
    Ok(())
}

fn read_all(reading: &mut BufReader<TcpStream>, shared: &Shared) -> Result<()> {
    // A short timeout lets the thread notice that it is to stop.
    reading
        .get_ref()
        .set_read_timeout(Some(Duration::from_millis(20)))
        .context("cannot set a timeout")?;
    loop {
        let acked = shared.acked.load(Ordering::Acquire);
        if acked == shared.sent.load(Ordering::Acquire) && shared.stop.load(Ordering::Acquire) {
            break;
        }
        if !readable(reading)? {
            continue;
        }
        // Part of a reply has arrived, and the rest may be behind a takeover.
        reading
            .get_ref()
            .set_read_timeout(None)
            .context("cannot set a timeout")?;
        match read_reply(reading)? {
            Reply::Simple(ok) if ok == "OK" => {
                shared
                    .ack_times
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Stamp::now());
            }
            Reply::Error(_) => {
                shared.refused.fetch_add(1, Ordering::AcqRel);
            }
            other => bail!("redis answered SET with {other:?}"),
        }
        shared.acked.store(acked + 1, Ordering::Release);
        reading
            .get_ref()
            .set_read_timeout(Some(Duration::from_millis(20)))
            .context("cannot set a timeout")?;
    }
    reading
        .get_ref()
        .set_read_timeout(Some(Duration::from_secs(10)))
        .context("cannot set a timeout")
}

/// Whether there is something to read, waiting for as long as the socket's timeout.
fn readable(reading: &mut BufReader<TcpStream>) -> Result<bool> {
    use std::io::{BufRead as _, ErrorKind};
    match reading.fill_buf() {
        Ok([]) => bail!("redis closed the connection"),
        Ok(_) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error).context("the connection to redis broke"),
    }
}

fn drain(shared: &Shared, at_most: Duration) -> bool {
    let start = Instant::now();
    while shared.acked.load(Ordering::Acquire) < shared.sent.load(Ordering::Acquire) {
        if start.elapsed() > at_most || shared.trouble().is_some() {
            return false;
        }
        sleep(Duration::from_millis(5));
    }
    true
}

fn ask(mut stream: &TcpStream, reading: &mut BufReader<TcpStream>, words: &[&[u8]]) -> Result<Reply> {
    let mut out = Vec::new();
    push_command(&mut out, words);
    stream.write_all(&out).context("cannot write to redis")?;
    read_reply(reading)
}

fn client_id(stream: &TcpStream, reading: &mut BufReader<TcpStream>) -> Result<i64> {
    match ask(stream, reading, &[b"CLIENT", b"ID"])? {
        Reply::Number(id) => Ok(id),
        other => bail!("redis answered CLIENT ID with {other:?}"),
    }
}

fn same_connection(stream: &TcpStream, reading: &mut BufReader<TcpStream>, before: i64) -> Result<()> {
    let now = client_id(stream, reading)?;
    if now != before {
        bail!("redis calls this connection {now}, and it called it {before}");
    }
    Ok(())
}

/// What the first `keys` keys hold, asked for in pipelined batches: a gate makes each round trip an epoch long.
fn held_numbers(
    mut stream: &TcpStream,
    reading: &mut BufReader<TcpStream>,
    keys: u64,
) -> Result<Vec<Option<u64>>> {
    let all: Vec<u64> = (0..keys).collect();
    let mut held = Vec::with_capacity(all.len());
    for batch in all.chunks(500) {
        let mut out = Vec::new();
        for key in batch {
            push_command(&mut out, &[b"GET", key_of(*key).as_bytes()]);
        }
        stream.write_all(&out).context("cannot write to redis")?;
        for _ in batch {
            held.push(number_of(read_reply(reading)?)?);
        }
    }
    Ok(held)
}

fn lost_by_another_connection(lab: &Lab, config: &ClientConfig, acked: u64, sent: u64) -> Result<u64> {
    let at_most = Duration::from_secs(10);
    let stream = connect(lab, at_most).context("no connection to redis at the end")?;
    stream
        .set_read_timeout(Some(at_most))
        .context("cannot set a timeout")?;
    let mut reading = BufReader::new(stream.try_clone().context("cannot duplicate a socket")?);
    let held = held_numbers(&stream, &mut reading, config.keys.min(sent))?;
    lost_writes(&held, config.keys, acked, sent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_found_even_when_it_began_before() {
        let ack_times: Vec<Stamp> = [10, 20, 120, 130].into_iter().map(Stamp::from_micros).collect();
        let report = ClientReport {
            sent: 4,
            acked: 4,
            lost: 0,
            resets: 0,
            refused: 0,
            trouble: None,
            ack_times,
        };
        let gap = report.longest_gap_after(Stamp::from_micros(30)).unwrap();
        assert_eq!((gap.0.micros(), gap.1.micros()), (20, 120));
    }
}
