//! What happened and when, from everybody's point of view, printed as it becomes known.
//!
//! Daemons log JSON; a line with an `event` is a notable moment. The lab adds what it does and sees itself.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::{Stamp, wait_for};

/// Fields of a log line that are the same in all lines, or are shown elsewhere.
const NOT_DETAILS: &[&str] = &[
    "event",
    "timestamp",
    "level",
    "target",
    "message",
    "spans",
    "span",
    "vm",
];

/// A notable moment.
#[derive(Clone, Debug)]
pub struct Event {
    /// When.
    pub at: Stamp,
    /// Who says so.
    pub source: String,
    /// What: `attach`, `paired`, `kill`, …
    pub name: String,
    /// The VM that it is about, if a daemon said so.
    pub vm: String,
    /// The rest of the line.
    pub detail: String,
}

#[derive(Debug)]
struct Shared {
    start: Stamp,
    print: bool,
    quiet: Vec<String>,
    events: Mutex<Vec<Event>>,
    stop: AtomicBool,
}

/// The events of a run. Dropping it ends the threads that read logs.
#[derive(Debug)]
pub struct Timeline {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Timeline {
    /// Begins now; with `print`, events are printed as they come, but for the names in `quiet`.
    #[must_use]
    pub fn new(print: bool, quiet: &[&str]) -> Timeline {
        let quiet = quiet.iter().map(|name| (*name).to_owned()).collect();
        let shared = Shared {
            start: Stamp::now(),
            print,
            quiet,
            events: Mutex::default(),
            stop: AtomicBool::new(false),
        };
        Timeline {
            shared: Arc::new(shared),
            threads: Vec::new(),
        }
    }

    /// Follows a daemon's log until the timeline is dropped.
    pub fn follow(&mut self, source: &str, log: &Path) {
        let (shared, source, log) = (Arc::clone(&self.shared), source.to_owned(), log.to_owned());
        self.threads
            .push(std::thread::spawn(move || follow(&shared, &source, log)));
    }

    /// Adds an event.
    pub fn add(&self, at: Stamp, source: &str, name: &str, detail: &str) {
        self.shared.add(Event {
            at,
            source: source.to_owned(),
            name: name.to_owned(),
            vm: String::new(),
            detail: detail.to_owned(),
        });
    }

    /// The earliest event of this name that is not before `from`.
    #[must_use]
    pub fn first(&self, name: &str, from: Stamp) -> Option<Event> {
        let events = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        events
            .iter()
            .filter(|event| event.name == name && event.at >= from)
            .min_by_key(|event| event.at)
            .cloned()
    }

    /// Waits for such an event.
    ///
    /// # Errors
    /// When the time is over.
    pub fn wait(&self, name: &str, from: Stamp, at_most: Duration) -> Result<Event> {
        wait_for(&format!("the event {name:?}"), at_most, || self.first(name, from))
    }

    /// All events, in the order of their times.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.select(|_| true)
    }

    /// The events that are `wanted`, in the order of their times.
    #[must_use]
    pub fn select(&self, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
        let all = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events: Vec<Event> = all.iter().filter(|event| wanted(event)).cloned().collect();
        drop(all);
        events.sort_by_key(|event| event.at);
        events
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A reader that panicked has printed so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn add(&self, event: Event) {
        if self.print && !self.quiet.contains(&event.name) {
            let seconds = event.at.ms_since(self.start) / 1e3;
            println!(
                "  {seconds:+9.3} s  {:<8}  {:<18} {}",
                event.source, event.name, event.detail
            );
        }
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
    }
}

fn follow(shared: &Shared, source: &str, log: PathBuf) {
    let (mut position, mut partial) = (0_u64, Vec::new());
    loop {
        let ending = shared.stop.load(Ordering::Acquire);
        let fresh = read_from(&log, position).unwrap_or_default();
        position += fresh.len() as u64;
        partial.extend_from_slice(&fresh);
        while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = partial.drain(..=end).collect();
            if let Some(event) = event_of(source, &line) {
                shared.add(event);
            }
        }
        if ending {
            return;
        }
        sleep(Duration::from_millis(10));
    }
}

fn read_from(log: &Path, position: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(log)?;
    file.seek(SeekFrom::Start(position))?;
    let mut fresh = Vec::new();
    file.read_to_end(&mut fresh)?;
    Ok(fresh)
}

/// The event that a line of JSON tells of, if it tells of one.
///
/// Fields may stand beside `timestamp`, or together under `fields`, as tracing writes them.
fn event_of(source: &str, line: &[u8]) -> Option<Event> {
    let value: Value = serde_json::from_slice(line).ok()?;
    let at = Stamp::parse_rfc3339(value.get("timestamp")?.as_str()?)?;
    let fields = value.get("fields").unwrap_or(&value).as_object()?;
    let name = fields.get("event")?.as_str()?.to_owned();
    let vm = fields
        .get("vm")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let mut parts: Vec<String> = Vec::new();
    for (key, value) in fields
        .iter()
        .filter(|(key, _)| !NOT_DETAILS.contains(&key.as_str()))
    {
        // The daemons put the details of the protocol's notices into one field, as JSON again.
        let inner = value
            .as_str()
            .and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
        match inner {
            Some(inner) if key == "detail" => parts.extend(inner.iter().map(|(key, value)| part(key, value))),
            _ => parts.push(part(key, value)),
        }
    }
    Some(Event {
        at,
        source: source.to_owned(),
        name,
        vm,
        detail: parts.join(" "),
    })
}

fn part(key: &str, value: &Value) -> String {
    match value {
        Value::String(text) => format!("{key}={text}"),
        other => format!("{key}={other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_shapes_of_a_log_line_are_events_and_other_lines_are_not() {
        let nested = br#"{"timestamp":"2026-01-02T03:04:05.000006Z","level":"INFO","fields":{"message":"x","event":"paired","epoch":7},"target":"t"}"#;
        let event = event_of("primary", nested).unwrap();
        assert_eq!(
            (event.name.as_str(), event.detail.as_str()),
            ("paired", "epoch=7")
        );
        let detailed = br#"{"timestamp":"2026-01-02T03:04:05.000006Z","fields":{"event":"grant","vm":"x","detail":"{\"term\":3}"}}"#;
        assert_eq!(event_of("backup", detailed).unwrap().detail, "term=3");
        let flat = br#"{"timestamp":"2026-01-02T03:04:05.000006Z","event":"grant","term":"3"}"#;
        assert_eq!(event_of("backup", flat).unwrap().detail, "term=3");
        for other in [
            &b"not json"[..],
            b"{}",
            br#"{"timestamp":"2026-01-02T03:04:05Z","fields":{"message":"x"}}"#,
        ] {
            assert!(event_of("x", other).is_none());
        }
    }

    #[test]
    fn a_line_that_is_written_in_two_parts_is_read_once() {
        let log = std::env::temp_dir().join(format!("romulus-timeline-{}", std::process::id()));
        std::fs::write(&log, br#"{"timestamp":"2026-01-02T03:04:05.000006Z","#).unwrap();
        let mut timeline = Timeline::new(false, &[]);
        timeline.follow("primary", &log);
        let whole = br#"{"timestamp":"2026-01-02T03:04:05.000006Z","event":"attach"}"#;
        let mut line = whole.to_vec();
        line.push(b'\n');
        std::fs::write(&log, line).unwrap();
        let found = timeline.wait("attach", Stamp::from_micros(0), Duration::from_secs(10));
        std::fs::remove_file(&log).unwrap();
        found.unwrap();
        drop(timeline.events());
        assert_eq!(timeline.events().len(), 1);
    }
}
