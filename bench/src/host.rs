//! What the figures were taken on.

use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// The machine, as far as it matters for a figure. What is not to be had is `"unknown"` or 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Host {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) memory_bytes: u64,
    /// Whether there is a /dev/kvm.
    pub(crate) kvm: bool,
    /// The load average of the last minute, before the first measure and after the last. What else the machine does shows
    /// in every figure.
    pub(crate) load_before: f64,
    pub(crate) load_after: f64,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Versions {
    pub(crate) romulus: String,
    /// The commit of the source tree that this was built in, with `-dirty` for what was not committed; null elsewhere.
    pub(crate) commit: Option<String>,
    /// `release`, or `debug`, whose figures mean nothing.
    pub(crate) build: String,
}

impl Host {
    pub(crate) fn this() -> Self {
        let uname = rustix::system::uname();
        Self {
            cpu: line_of("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: uname.release().to_string_lossy().into_owned(),
            memory_bytes: line_of("/proc/meminfo", "MemTotal")
                .and_then(|text| text.strip_suffix(" kB")?.trim().parse().ok())
                .map_or(0, |kib: u64| kib << 10),
            kvm: Path::new("/dev/kvm").exists(),
            load_before: load(),
            load_after: 0.0,
        }
    }
}

impl Versions {
    pub(crate) fn this() -> Self {
        let described = Command::new("git")
            .args([
                "-C",
                env!("CARGO_MANIFEST_DIR"),
                "describe",
                "--always",
                "--dirty",
            ])
            .output();
        let commit = described.ok().filter(|output| output.status.success());
        Self {
            romulus: env!("CARGO_PKG_VERSION").to_owned(),
            commit: commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            }
            .to_owned(),
        }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_s() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// The load average of the last minute; 0 where the kernel does not say.
pub(crate) fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or(0.0)
}

/// What follows `key` and a colon in a file of the kernel's.
fn line_of(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().to_owned())
}
