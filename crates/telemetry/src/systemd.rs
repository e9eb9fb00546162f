//! Notes to systemd (`Type=notify`). Outside systemd, and when a note fails, nothing happens: a daemon must not
//! stop protecting because nobody listens.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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

/// Pats the unit's watchdog, as often as is needed and not more, from a loop that comes by more often than that.
#[derive(Debug)]
pub(crate) struct Watchdog {
    every_ms: u64,
    /// When the next one is due, in the time of those who pat.
    next_ms: AtomicU64,
}

impl Watchdog {
    /// As the unit's `WatchdogSec` says; none without one.
    pub(crate) fn from_environment() -> Option<Self> {
        sd_notify::watchdog_enabled().map(Self::new)
    }

    fn new(limit: Duration) -> Self {
        // Early enough that one pat may be late.
        Self {
            every_ms: u64::try_from((limit / 4).as_millis()).unwrap_or(u64::MAX),
            next_ms: AtomicU64::new(0),
        }
    }

    /// The loop has come round, at this time, in milliseconds from any beginning.
    pub(crate) fn pat(&self, now_ms: u64) {
        if self.is_due(now_ms) {
            tell(&[NotifyState::Watchdog]);
        }
    }

    /// Whether a pat is due, which it then is not again for a while.
    fn is_due(&self, now_ms: u64) -> bool {
        let due = now_ms >= self.next_ms.load(Ordering::Relaxed);
        if due {
            self.next_ms.store(now_ms + self.every_ms, Ordering::Relaxed);
        }
        due
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
        let watchdog = Watchdog::new(Duration::from_secs(20));
        assert!(watchdog.is_due(0));
        assert!(!watchdog.is_due(0));
        assert!(!watchdog.is_due(4_999));
        assert!(watchdog.is_due(5_001));
        assert!(!watchdog.is_due(10_000));
        assert!(watchdog.is_due(10_001));
    }
}
