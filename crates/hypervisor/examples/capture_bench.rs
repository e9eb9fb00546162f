//! Measures what checkpoints cost a running guest.
//!
//! `capture_bench --qmp SOCKET [--epochs N] [--interval-ms N] [--fifo-dir DIR] [--disposable ID,ID]
//!  [--tap TAP]`
//!
//! Attaches, copies all memory once, takes a checkpoint each interval and prints the pause as QEMU's own timestamps give it,
//! its phases, and beside it the same copy made alone while the guest runs and a pause with next to nothing to copy, as a
//! ratio.

use std::time::{Duration, Instant};

use romulus_hypervisor::qemu::source::{AttachOptions, GuardianProgram, QemuSource, guardian};
use romulus_hypervisor::source::{CaptureReport, Checkpoint, GuestSource};
use romulus_types::{PAGE_BYTES, PageIndex};

struct Settings {
    options: AttachOptions,
    epochs: usize,
    interval: Duration,
}

fn settings() -> Result<Settings, String> {
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    let guardian = GuardianProgram {
        exe,
        args: vec!["guardian".to_owned()],
    };
    let mut options = AttachOptions::new("", guardian);
    options.fifo_dir = std::env::temp_dir().join("romulus-capture-bench");
    let (mut epochs, mut interval_ms) = (400, 25);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{word} {value}: {e}"));
        match word.as_str() {
            "--qmp" => options.qmp = value.into(),
            "--epochs" => epochs = number()?,
            "--interval-ms" => interval_ms = number()?,
            "--fifo-dir" => options.fifo_dir = value.into(),
            "--disposable" => options.allow.disposable = value.split(',').map(str::to_owned).collect(),
            "--tap" => options.taps.push(value),
            _ => return Err(format!("unknown option {word}")),
        }
    }
    let epochs = usize::try_from(epochs).map_err(|e| e.to_string())?;
    Ok(Settings {
        options,
        epochs,
        interval: Duration::from_millis(interval_ms),
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|word| word == "guardian") {
        return Ok(guardian::run(&arguments[2..])?);
    }
    let Settings {
        options,
        epochs,
        interval,
    } = settings()?;
    let begun = Instant::now();
    let mut source = QemuSource::attach(options)?;
    println!("attached in {:.1} ms", ms(begun.elapsed()));
    for block in source.layout().blocks() {
        println!("  block {:40} {:>12} bytes", block.name, block.bytes);
    }
    source.bootstrap()?;
    let begun = Instant::now();
    source.arm()?;
    println!("armed in {:.1} ms", ms(begun.elapsed()));
    let begun = Instant::now();
    let mut chunk = vec![0; 256 * PAGE_BYTES];
    let pages = source.layout().page_count();
    for first in (0..pages).step_by(256) {
        let count = usize::try_from(256.min(pages - first))?;
        source.read_pages(PageIndex(first), &mut chunk[..count * PAGE_BYTES])?;
    }
    let megabytes = pages * 4096 / 1_000_000;
    println!("first copy of {megabytes} MB in {:.1} ms", ms(begun.elapsed()));

    let mut checkpoint = Checkpoint {
        data: vec![1; 64 << 20],
        ..Checkpoint::default()
    };
    for _ in 0..4 {
        source.precopy(&mut checkpoint)?;
    }
    let mut reports = Vec::with_capacity(epochs);
    let (mut alone_ns, mut next) = (Vec::new(), Instant::now());
    for _ in 0..epochs {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next = Instant::now() + interval;
        let report = source.capture(&mut || Ok(()), false, &mut checkpoint)?;
        alone_ns.push(copy_alone(&mut source, &checkpoint, &mut chunk)? + report.scan_ns);
        reports.push(report);
    }
    let mut save_ns = Vec::new();
    for _ in 0..50 {
        let report = source.capture(&mut || Ok(()), false, &mut checkpoint)?;
        save_ns.push(report.pause_ns.saturating_sub(report.scan_ns + report.copy_ns));
    }
    let state_bytes = checkpoint.device_state.len();
    println!("events: {:?}", source.poll_events());
    Box::new(source).detach()?;
    print_table(&reports, &mut alone_ns, &mut save_ns, state_bytes);
    Ok(())
}

/// Copies the pages of a checkpoint once more, from the guest while it runs.
fn copy_alone(
    source: &mut QemuSource,
    checkpoint: &Checkpoint,
    scratch: &mut Vec<u8>,
) -> Result<u64, Box<dyn std::error::Error>> {
    let bytes = checkpoint.pages.len() * PAGE_BYTES;
    if scratch.len() < bytes {
        scratch.resize(bytes, 1);
    }
    let begun = Instant::now();
    let mut rest = &mut scratch[..bytes];
    for run in checkpoint.pages.chunk_by(|a, b| a.0 + 1 == b.0) {
        let (now, later) = rest.split_at_mut(run.len() * PAGE_BYTES);
        source.read_pages(run[0], now)?;
        rest = later;
    }
    Ok(u64::try_from(begun.elapsed().as_nanos())?)
}

fn print_table(reports: &[CaptureReport], alone_ns: &mut [u64], save_ns: &mut [u64], state_bytes: usize) {
    println!("device state {state_bytes} bytes");
    println!("{:24} {:>9} {:>9} {:>9} {:>9}", "ms", "p50", "p95", "p99", "max");
    let column = |name: &str, value: &dyn Fn(&CaptureReport) -> u64| {
        let mut values: Vec<u64> = reports.iter().map(value).collect();
        print_line(name, &mut values, 1e6);
    };
    column("pause (STOP to RESUME)", &|r| r.pause_ns);
    column("command (guest runs)", &|r| r.command_ns);
    column("stop", &|r| r.stop_ns);
    column("barrier", &|r| r.barrier_ns);
    column("scan", &|r| r.scan_ns);
    column("copy", &|r| r.copy_ns);
    column("resume", &|r| r.resume_ns);
    let mut pages: Vec<u64> = reports.iter().map(|r| r.dirty_pages).collect();
    print_line("pages", &mut pages, 1.0);
    print_line("scan + copy alone", alone_ns, 1e6);
    print_line("stop, save, go on alone", save_ns, 1e6);
    let mut pauses: Vec<u64> = reports.iter().map(|r| r.pause_ns).collect();
    let parts = Duration::from_nanos(quantile(alone_ns, 50) + quantile(save_ns, 50));
    let ratio = ms(Duration::from_nanos(quantile(&mut pauses, 50))) / ms(parts);
    println!("pause p50 / (scan + copy alone + stop, save, go on alone) p50 = {ratio:.2}");
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn print_line(name: &str, values: &mut [u64], unit: f64) {
    let at = |values: &mut [u64], percent| quantile(values, percent) as f64 / unit;
    let row = [50, 95, 99, 100].map(|percent| at(values, percent));
    println!(
        "{name:24} {:9.3} {:9.3} {:9.3} {:9.3}",
        row[0], row[1], row[2], row[3]
    );
}

fn quantile(values: &mut [u64], percent: usize) -> u64 {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    values
        .get((values.len() * percent / 100).min(last))
        .copied()
        .unwrap_or(0)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
