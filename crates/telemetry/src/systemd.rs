//! Notes to systemd (`Type=notify`). Outside systemd, and when a note fails, nothing happens: a daemon must not
//! stop protecting because nobody listens.

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

/// The daemon makes progress. Call it from the loop that does the work, never from a timer of its own.
pub fn watchdog() {
    tell(&[NotifyState::Watchdog]);
}

/// How often [`watchdog`] should be called: half the unit's `WatchdogSec`. `None` without a watchdog.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}
