//! The agent towards its service manager: signals, the status line, the watchdog.
//!
//! All drivers and sessions are tasks of the thread that this loop runs on: as long as it comes round, none of them blocks the
//! others. So its pulse is the service's, which pats the watchdog.

use std::time::Duration;

use romulus_config::BackupAgent;
use romulus_daemon::Reload;
use romulus_telemetry::{Pulse, systemd};
use tokio::signal::unix::{SignalKind, signal};

use crate::registry::Registry;

/// How often the loop comes round.
const TURN: Duration = Duration::from_secs(1);

/// Tells the service manager that the agent works, and returns when it is told to end.
///
/// # Errors
/// When signals can't be waited for.
pub async fn serve(
    registry: &Registry,
    pulse: &Pulse,
    mut reload: Reload<BackupAgent>,
) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let mut turn = tokio::time::interval(TURN);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut line = systemd::StatusLine::default();
    systemd::ready();
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload = reload.run().await,
            _ = turn.tick() => {
                pulse.beat();
                line.set(status_line(registry));
            }
        }
    }
    systemd::stopping();
    Ok(())
}

/// As an operator reads it in `systemctl status`.
fn status_line(registry: &Registry) -> String {
    let (mut active, mut protected, mut others) = (0, 0, 0);
    for status in registry.statuses() {
        match status.summary() {
            (true, _) => active += 1,
            (false, true) => protected += 1,
            (false, false) => others += 1,
        }
    }
    words(active, protected, others)
}

fn words(active: usize, protected: usize, others: usize) -> String {
    let mut parts = vec![format!("{protected} VMs protected")];
    if active > 0 {
        parts.push(format!("{active} running here after a takeover"));
    }
    if others > 0 {
        parts.push(format!("{others} not protected"));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_line_names_what_runs_here_and_what_is_not_protected() {
        assert_eq!(words(0, 0, 0), "0 VMs protected");
        assert_eq!(
            words(1, 12, 2),
            "12 VMs protected, 1 running here after a takeover, 2 not protected"
        );
    }
}
