//! Measures what checkpoints cost a running guest, as ratios to the same work done alone in the same run.
//!
//! ```text
//!   capture_bench [--assets DIR] [--dirty-pages N] [--memory-mib N]     boots a guest for each kind of memory, and measures it
//!   capture_bench --qmp SOCKET [--disposable ID,ID] [--tap TAP]         measures a guest that runs
//!   either:       [--epochs N] [--interval-ms N] [--fifo-dir DIR]
//! ```
//!
//! Attaches, copies all memory once, takes a checkpoint each interval. After each it finds and copies the same pages alone, in a
//! buffer of this process that is as large as the guest. At the end QEMU stops the guest, saves its device state and goes on
//! alone, without us. The verdict is `pause / (1.5 x (scan + memcpy) + save)`, of the medians.

mod guest;
mod reference;
mod report;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use romulus_host_sys::priority;
use romulus_hypervisor::qemu::source::{AttachOptions, GuardianProgram, QemuSource, guardian};
use romulus_hypervisor::source::{Checkpoint, GuestSource};
use romulus_types::{PAGE_BYTES, PageIndex};

use guest::{Guest, Memory};
use reference::{Alone, ReferenceMemory, saves_alone};
use report::Measured;

struct Settings {
    qmp: Option<PathBuf>,
    assets: PathBuf,
    memory_mib: u64,
    dirty_pages: u64,
    epochs: u64,
    interval: Duration,
    fifo_dir: PathBuf,
    disposable: Vec<String>,
    taps: Vec<String>,
}

fn settings() -> Result<Settings, String> {
    let mut settings = Settings {
        qmp: None,
        assets: Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/assets"),
        memory_mib: 256,
        dirty_pages: 800,
        epochs: 400,
        interval: Duration::from_millis(25),
        fifo_dir: std::env::temp_dir().join(format!("romulus-capture-bench-{}", std::process::id())),
        disposable: Vec::new(),
        taps: Vec::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{word} {value}: {e}"));
        match word.as_str() {
            "--qmp" => settings.qmp = Some(value.into()),
            "--assets" => settings.assets = value.into(),
            "--memory-mib" => settings.memory_mib = number()?,
            "--dirty-pages" => settings.dirty_pages = number()?,
            "--epochs" => settings.epochs = number()?,
            "--interval-ms" => settings.interval = Duration::from_millis(number()?),
            "--fifo-dir" => settings.fifo_dir = value.into(),
            "--disposable" => settings.disposable = value.split(',').map(str::to_owned).collect(),
            "--tap" => settings.taps.push(value),
            _ => return Err(format!("unknown option {word}")),
        }
    }
    Ok(settings)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|word| word == "guardian") {
        return Ok(guardian::run(&arguments[2..])?);
    }
    let settings = settings()?;
    std::fs::create_dir_all(&settings.fifo_dir)?;
    let outcome = match &settings.qmp {
        Some(qmp) => measure(&settings, qmp, "a guest that ran already"),
        None => [Memory::Plain, Memory::Memfd].into_iter().try_for_each(|memory| {
            // Not inside of `measure`: QEMU must not inherit our priority.
            let guest = Guest::boot(
                &settings.assets,
                &settings.fifo_dir,
                memory,
                settings.memory_mib,
                settings.dirty_pages,
            )?;
            measure(&settings, &guest.qmp, memory.words())
        }),
    };
    let _ = std::fs::remove_dir_all(&settings.fifo_dir);
    outcome
}

fn measure(settings: &Settings, qmp: &Path, what: &str) -> Result<(), Box<dyn Error>> {
    let guardian = GuardianProgram {
        exe: std::env::current_exe()?,
        args: vec!["guardian".to_owned()],
    };
    let mut options = AttachOptions::new(qmp, guardian);
    options.fifo_dir.clone_from(&settings.fifo_dir);
    options.allow.disposable = settings.disposable.iter().cloned().collect();
    options.allow.disposable.insert("serial0".to_owned());
    options.taps.clone_from(&settings.taps);
    // What is measured must not be killed for it.
    options.pause_limit_ns = 10_000_000_000;
    println!("\n{what}; load before: {}", report::load());
    let begun = Instant::now();
    let mut source = QemuSource::attach(options)?;
    println!("attached in {:.1} ms", report::ms(begun.elapsed()));
    // As the replicator's capture thread is.
    priority::raise();
    let measured = epochs(settings, source_ready(&mut source)?);
    priority::lower();
    let (mut measured, state_bytes) = measured?;
    let mib = source.layout().bytes() >> 20;
    Box::new(source).detach()?;
    measured.save_ns = saves_alone(qmp, &settings.fifo_dir.join("alone"))?;
    println!("{mib} MiB of RAM and ROM, device state of {state_bytes} bytes");
    report::print(&measured);
    println!("load after: {}", report::load());
    Ok(())
}

/// Arms the tracking and copies all memory.
fn source_ready(source: &mut QemuSource) -> Result<&mut QemuSource, Box<dyn Error>> {
    source.bootstrap()?;
    let begun = Instant::now();
    source.arm()?;
    let armed = begun.elapsed();
    let mut chunk = vec![0; 256 * PAGE_BYTES];
    let pages = source.layout().page_count();
    for first in (0..pages).step_by(256) {
        let count = usize::try_from(256.min(pages - first))?;
        source.read_pages(PageIndex(first), &mut chunk[..count * PAGE_BYTES])?;
    }
    let copied = begun.elapsed() - armed;
    println!(
        "armed in {:.1} ms, first copy in {:.1} ms",
        report::ms(armed),
        report::ms(copied)
    );
    Ok(source)
}

fn epochs(settings: &Settings, source: &mut QemuSource) -> Result<(Measured, usize), Box<dyn Error>> {
    let mut alone = ReferenceMemory::new(usize::try_from(source.layout().page_count())?)?;
    let mut checkpoint = Checkpoint::default();
    for _ in 0..4 {
        source.precopy(&mut checkpoint)?;
    }
    let mut measured = Measured::default();
    let mut next = Instant::now();
    for _ in 0..settings.epochs {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next = Instant::now() + settings.interval;
        let report = source.capture(&mut || Ok(()), false, &mut checkpoint)?;
        let Alone { scan_ns, copy_ns } = alone.repeat(&checkpoint.pages)?;
        measured.reports.push(report);
        measured.scan_ns.push(scan_ns);
        measured.copy_ns.push(copy_ns);
    }
    // What was not our own pause would spoil the figures.
    let events = source.poll_events();
    if !events.is_empty() {
        println!("somebody else did something to the guest: {events:?}");
    }
    Ok((measured, checkpoint.device_state.len()))
}
