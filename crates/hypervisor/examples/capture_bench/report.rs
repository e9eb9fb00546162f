//! The figures as a table, and the verdict.

use std::time::Duration;

use romulus_hypervisor::source::CaptureReport;

/// Everything that one guest was measured with, in nanoseconds.
#[derive(Default)]
pub(crate) struct Measured {
    pub(crate) reports: Vec<CaptureReport>,
    /// Finding the same pages alone.
    pub(crate) scan_ns: Vec<u64>,
    /// Copying the same pages alone.
    pub(crate) copy_ns: Vec<u64>,
    /// QEMU's stop, save and resume alone.
    pub(crate) save_ns: Vec<u64>,
}

const NS_A_MS: f64 = 1e6;

pub(crate) fn print(measured: &Measured) {
    println!("{:26} {:>9} {:>9} {:>9} {:>9}", "ms", "p50", "p95", "p99", "max");
    let column = |name: &str, value: fn(&CaptureReport) -> u64| {
        let values: Vec<u64> = measured.reports.iter().map(value).collect();
        line(name, &values, NS_A_MS);
    };
    column("command (guest runs)", |r| r.command_ns);
    column("pause (STOP to RESUME)", |r| r.pause_ns);
    column("  stop", |r| r.stop_ns);
    column("  barrier", |r| r.barrier_ns);
    column("  scan", |r| r.scan_ns);
    column("  copy", |r| r.copy_ns);
    column("  resume", |r| r.resume_ns);
    line("scan alone", &measured.scan_ns, NS_A_MS);
    line("memcpy alone", &measured.copy_ns, NS_A_MS);
    line("QEMU's save alone", &measured.save_ns, NS_A_MS);
    let pages: Vec<u64> = measured.reports.iter().map(|r| r.dirty_pages).collect();
    line("pages", &pages, 1.0);
    let pauses: Vec<u64> = measured.reports.iter().map(|r| r.pause_ns).collect();
    let [pause, scan, copy, save] = [&pauses, &measured.scan_ns, &measured.copy_ns, &measured.save_ns]
        .map(|values| at(values, 50) / NS_A_MS);
    let ratio = pause / (1.5 * (scan + copy) + save);
    println!(
        "pause / (1.5 x (scan + memcpy) + save) = {pause:.3} / (1.5 x ({scan:.3} + {copy:.3}) + {save:.3}) = {ratio:.2}"
    );
}

fn line(name: &str, values: &[u64], unit: f64) {
    let row = [50, 95, 99, 100].map(|percent| at(values, percent) / unit);
    println!(
        "{name:26} {:9.3} {:9.3} {:9.3} {:9.3}",
        row[0], row[1], row[2], row[3]
    );
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn at(values: &[u64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().saturating_sub(1);
    let position = (sorted.len() * percent / 100).min(last);
    sorted.get(position).copied().unwrap_or(0) as f64
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// What else the machine does: figures taken on a busy one say little.
pub(crate) fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}
