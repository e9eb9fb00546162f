//! What every daemon shows of its own process, read from /proc when somebody asks.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Samples;
use crate::catalogue::{BUILD_INFO, CPU_SECONDS, RESIDENT_MEMORY_BYTES, START_TIME_SECONDS};

/// Hertz of the processor times in /proc, which the kernel promises to user space on this architecture.
const TICKS_PER_SECOND: f64 = 100.0;

/// When metrics were first thought of: at the start of the daemon.
static START: LazyLock<Duration> =
    LazyLock::new(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());

/// Sets the start time.
pub(crate) fn note_start() {
    LazyLock::force(&START);
}

pub(crate) fn sample(samples: &mut Samples, daemon: &str, version: &str) {
    samples.flag(&BUILD_INFO, &[daemon, version], true);
    samples.real(&START_TIME_SECONDS, &[], START.as_secs_f64());
    if let Some(bytes) = resident_bytes() {
        samples.number(&RESIDENT_MEMORY_BYTES, &[], bytes);
    }
    if let Some(seconds) = cpu_seconds() {
        samples.real(&CPU_SECONDS, &[], seconds);
    }
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything; user and system time are the 12th and 13th fields after it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS_PER_SECOND)
}
