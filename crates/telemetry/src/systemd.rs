//! Notes to systemd (`Type=notify`). Outside systemd, and when a note fails, nothing happens: a daemon must not
//! stop protecting because nobody listens.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// Whether systemd runs this host (or container).
pub fn is_running() -> bool {
    sd_notify::booted().unwrap_or(false)
}

/// The daemon does its work from now on.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// One line for `systemctl status`.
pub fn status(text: &str) {
    let one_line = text.replace(['\n', '\r'], " ");
    tell(&[NotifyState::Status(&one_line)]);
}

/// The daemon reads its settings again; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// The daemon is ending.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// The daemon makes progress. Call it from the loop that does the work, never from a timer of its own.
pub fn watchdog() {
    tell(&[NotifyState::Watchdog]);
}

/// How often [`watchdog`] should be called: half the unit's `WatchdogSec`. `None` without a watchdog.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}

/// Pats the watchdog, as often as is needed and not more, from a loop that comes by more often than that.
#[derive(Debug)]
pub struct Watchdog {
    every: Option<Duration>,
    last: Option<Instant>,
}

impl Watchdog {
    /// As the unit's `WatchdogSec` says; does nothing without one.
    pub fn from_environment() -> Self {
        Self {
            every: watchdog_interval(),
            last: None,
        }
    }

    /// The loop has come round, at this time.
    pub fn pat(&mut self, now: Instant) {
        if self.is_due(now) {
            self.last = Some(now);
            watchdog();
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        // Early enough that one pat may be late.
        let due = |last: Instant, every: Duration| now.saturating_duration_since(last) >= every / 2;
        self.every
            .is_some_and(|every| self.last.is_none_or(|last| due(last, every)))
    }
}

/// Tells systemd the line that stands in `systemctl status`, when it has changed.
#[derive(Debug, Default)]
pub struct StatusLine(Option<String>);

impl StatusLine {
    /// The line is this from now on.
    pub fn set(&mut self, text: String) {
        if self.0.as_deref() != Some(text.as_str()) {
            status(&text);
            self.0 = Some(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_patted_in_time_and_not_at_every_turn() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut watchdog = Watchdog {
            every: Some(Duration::from_secs(10)),
            last: None,
        };
        assert!(watchdog.is_due(at(0)));
        watchdog.last = Some(at(0));
        assert!(!watchdog.is_due(at(4_999)));
        assert!(watchdog.is_due(at(5_000)));
        watchdog.every = None;
        assert!(!watchdog.is_due(at(60_000)));
    }
}
