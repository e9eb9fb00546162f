//! `stress-ng`, writing to memory all the time, with its own check of what stands there. A unit is one of its operations.

use std::error::Error;
use std::process::Command;

use super::{Program, output};

/// Of the memory that it writes to again and again.
const MEMORY: &str = "8m";
/// Of a run, so that its start is the lesser part of it.
const OPERATIONS: u64 = 2000;

pub(super) struct Stress;

impl Program for Stress {
    fn round(&mut self) -> Result<u64, Box<dyn Error>> {
        let operations = OPERATIONS.to_string();
        let mut command = Command::new("stress-ng");
        command
            .args(["--quiet", "--verify", "--temp-path", "/tmp"])
            .args(["--vm", "1", "--vm-keep", "--vm-bytes", MEMORY])
            .args(["--vm-ops", &operations]);
        output(&mut command, "")?;
        Ok(OPERATIONS)
    }
}
