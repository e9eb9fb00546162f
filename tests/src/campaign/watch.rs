//! Noticing that a daemon was struck, and killing QEMU in the same moment.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use romulus_hypervisor::fault::STRUCK;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::Blow;
use crate::{Process, wait_for};

/// Kills `victim` as soon as `watched` has ended.
pub(super) fn kill_with(watched: &Process, victim: Pid) -> Result<JoinHandle<()>> {
    let watched = pidfd_open(watched.pid()?, PidfdFlags::empty()).context("cannot watch the replicator")?;
    Ok(std::thread::spawn(move || {
        let mut fds = [PollFd::new(&watched, PollFlags::IN)];
        while poll(&mut fds, None).is_err() {}
        // Gone already is what was wanted.
        let _ = kill_process(victim, Signal::KILL);
    }))
}

/// Waits until the process was struck at `point`, and has died or stands still.
pub(super) fn wait_struck(process: &mut Process, point: &str, blow: Blow, at_most: Duration) -> Result<()> {
    let log = process.log().to_owned();
    let waited = wait_for(&format!("the point {point}"), at_most, || {
        let struck = was_struck(&log, point);
        if let Some(status) = process.ended() {
            let told = struck && std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
            return Some(if told {
                Ok(())
            } else {
                Err(anyhow!(
                    "it ended by itself ({status}) and was not struck at {point}"
                ))
            });
        }
        (struck && (blow != Blow::Stop || is_stopped(process))).then_some(Ok(()))
    });
    waited
        .and_then(|struck| struck)
        .map_err(|error| anyhow!("{error:#}; the end of its log:\n{}", process.tail()))?;
    if blow != Blow::Stop {
        process.wait(Duration::from_secs(5))?;
    }
    Ok(())
}

/// Whether it stands still, or a timer of its own has killed it since.
fn is_stopped(process: &Process) -> bool {
    let Ok(pid) = process.pid() else { return false };
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
}

fn was_struck(log: &Path, point: &str) -> bool {
    let bytes = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&bytes).contains(&format!("{STRUCK}{point}@"))
}

/// Lets a stopped process go on, or says that it has been killed meanwhile.
pub(super) fn go_on(process: &mut Process) -> Result<bool> {
    if process.ended().is_some() {
        return Ok(false);
    }
    process.signal(Signal::CONT)?;
    Ok(true)
}

/// Waits for the end of a process that is to fail by itself; `false` when a timer of its own has killed it instead.
pub(super) fn wait_fails(process: &mut Process, at_most: Duration) -> Result<bool> {
    let status = process.wait(at_most)?;
    if status.success() {
        bail!("{} ended as if all were well", process.name());
    }
    Ok(std::os::unix::process::ExitStatusExt::signal(&status) != Some(9))
}
