//! Reaching the monitor of a QEMU that was just started.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::process::Process;
use crate::qemu::qmp::{Qmp, QmpError};
use crate::standby::StandbyError;

const POLL: Duration = Duration::from_millis(2);

/// Waits for the process's monitor.
pub(super) fn connect(process: &mut Process, socket: &Path, timeout: Duration) -> Result<Qmp, StandbyError> {
    let deadline = Instant::now() + timeout;
    loop {
        if !process.is_alive() {
            return Err(StandbyError::plain(format!(
                "the standby's QEMU ended at once: {}",
                process.stderr()
            )));
        }
        let error = match Qmp::connect(socket, deadline) {
            Ok(qmp) => return Ok(qmp),
            Err(error) => error,
        };
        let not_yet = matches!(error, QmpError::Connect { .. } | QmpError::Closed);
        if !not_yet || Instant::now() >= deadline {
            return Err(process.error("the standby's monitor cannot be reached", error));
        }
        std::thread::sleep(POLL);
    }
}
