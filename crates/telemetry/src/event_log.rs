//! The events that a daemon keeps for `romulus events`: the last few hundred, oldest first.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Events kept; past that the oldest goes.
pub const EVENTS_MAX: usize = 512;

/// A bounded list of events.
#[derive(Debug, Default)]
pub struct EventLog(VecDeque<Value>);

impl EventLog {
    /// Adds an event that happened now.
    pub fn add(&mut self, name: &str, detail: &Value) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        if self.0.len() == EVENTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(
            json!({"event": name, "unix_ms": unix_us / 1000, "unix_us": unix_us, "detail": detail}),
        );
    }

    /// The events, oldest first.
    pub fn events(&self) -> Vec<Value> {
        self.0.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_event_makes_room_for_the_newest() {
        let mut log = EventLog::default();
        for number in 0..=EVENTS_MAX {
            log.add("n", &json!(number));
        }
        let events = log.events();
        assert_eq!(events.len(), EVENTS_MAX);
        assert_eq!(events[0]["detail"], 1);
        assert_eq!(events[EVENTS_MAX - 1]["detail"], EVENTS_MAX);
    }
}
