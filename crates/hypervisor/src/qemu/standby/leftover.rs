//! Machines that an earlier agent has left in a folder.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::qemu::cmdline::monitor_value;
use crate::qemu::qmp::{Qmp, QmpError};
use crate::standby::StandbyError;

const LIMIT: Duration = Duration::from_secs(2);

/// What is there.
pub(super) enum Found {
    /// No process.
    Nothing,
    /// A machine that can be asked.
    Monitor(Qmp),
    /// The process of one whose monitor somebody else holds, or that hangs.
    Taken(u32),
}

/// Looks for the machine with this monitor.
///
/// # Errors
/// When it can't be told.
pub(super) fn find(socket: &Path) -> Result<Found, StandbyError> {
    if !socket.exists() {
        return Ok(Found::Nothing);
    }
    let error = match Qmp::connect(socket, Instant::now() + LIMIT) {
        Ok(qmp) => return Ok(Found::Monitor(qmp)),
        Err(error) if is_gone(&error) => return Ok(Found::Nothing),
        Err(error) => error,
    };
    match process_with(&monitor_value(socket)) {
        Some(pid) => Ok(Found::Taken(pid)),
        None => {
            let what = format!(
                "a machine has its monitor at {} and does not answer",
                socket.display()
            );
            Err(StandbyError::new(what, error))
        }
    }
}

/// Nobody listens, or not any more. A queue that is full of others is somebody.
fn is_gone(error: &QmpError) -> bool {
    match error {
        QmpError::Connect { source, .. } => {
            matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
        }
        QmpError::Closed => true,
        _ => false,
    }
}

/// The process that was started with this word. Its socket does not name it: each try to connect would stay in QEMU's short queue for as
/// long as another client holds the monitor.
fn process_with(word: &str) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command
            .split(|byte| *byte == 0)
            .any(|argument| argument == word.as_bytes())
    })
}
