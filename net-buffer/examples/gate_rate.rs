//! How fast frames go through the gate, against a bare loop of read and write over the same kind of taps, measured in the
//! same run. Also what the two calls in the guest's pause take. Needs root; works in a network namespace of its own.
//!
//! ```text
//!   bare:  write ► tap ► bridge ► tap ► read, write ► tap (the other end nobody reads)
//!   gate:  write ► guest's tap ► relay ► queue, barrier, release ► relay ► guest's tap ► bridge ► tap (not read)
//! ```

use std::process::Command;
use std::time::{Duration, Instant};

use net_buffer::{Gate, GateError, GateOptions};
use romulus_host_sys::netns;
use romulus_host_sys::tap::{Tap, VNET_HEADER_BYTES};
use romulus_types::Epoch;

const ROUNDS: usize = 7;
const EPOCHS: u64 = 100;
const FRAMES_PER_EPOCH: usize = 400;
const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x99, 0, 2];

fn run(command: &str) {
    let words: Vec<_> = command.split_whitespace().collect();
    let status = Command::new(words[0]).args(&words[1..]).status().expect(command);
    assert!(status.success(), "{command}");
}

fn tap(name: &str, bridged: bool) -> std::io::Result<Tap> {
    let tap = Tap::create(name, true)?;
    let bridge = if bridged { "master nbbr0" } else { "" };
    run(&format!("ip link set {name} {bridge} up"));
    Ok(tap)
}

/// Reads what there is of the guest, and writes it to `to`. The bridge has a frame of its own to send now and then.
fn pass(from: &Tap, to: Option<&Tap>, scratch: &mut [u8]) -> usize {
    let mut frames = 0;
    while let Ok(bytes) = rustix::io::read(from, &mut *scratch) {
        if scratch[VNET_HEADER_BYTES + 6..][..6] != GUEST {
            continue;
        }
        if let Some(to) = to {
            let _ = rustix::io::write(to, &scratch[..bytes]);
        }
        frames += 1;
    }
    frames
}

fn guest_sends(guest: &Tap, frame: &[u8]) {
    for _ in 0..FRAMES_PER_EPOCH {
        let _ = rustix::io::write(guest, frame);
    }
}

fn bare(guest: &Tap, client: &Tap, sink: &Tap, frame: &[u8]) -> Duration {
    let mut scratch = vec![0; 128 * 1024];
    let start = Instant::now();
    for _ in 0..EPOCHS {
        guest_sends(guest, frame);
        assert_eq!(pass(client, Some(sink), &mut scratch), FRAMES_PER_EPOCH);
    }
    start.elapsed()
}

struct Gated {
    total: Duration,
    close: Duration,
    /// Right after a burst, with all of it left to read.
    barriers: Vec<Duration>,
    /// When the relay thread has had time to read.
    calm_barriers: Vec<Duration>,
}

fn gated(guest: &Tap, client: &Tap, frame: &[u8]) -> Result<Gated, GateError> {
    let mut scratch = vec![0; 128 * 1024];
    let gate = Gate::prepare(&GateOptions::new("nbg0"))?;
    let start = Instant::now();
    gate.close()?;
    let close = start.elapsed();
    let (mut barriers, mut calm_barriers) = (Vec::new(), Vec::new());
    let mut emptying = Duration::ZERO;
    let start = Instant::now();
    for epoch in 1..=EPOCHS {
        guest_sends(guest, frame);
        let before = Instant::now();
        gate.barrier(Epoch(epoch))?;
        barriers.push(before.elapsed());
        gate.release(Epoch(epoch))?;
        let before = Instant::now();
        assert_eq!(pass(client, None, &mut scratch), FRAMES_PER_EPOCH);
        emptying += before.elapsed();
    }
    let total = start.elapsed() - emptying;
    for epoch in EPOCHS + 1..=2 * EPOCHS {
        guest_sends(guest, frame);
        std::thread::sleep(Duration::from_millis(2));
        let before = Instant::now();
        gate.barrier(Epoch(epoch))?;
        calm_barriers.push(before.elapsed());
        gate.release(Epoch(epoch))?;
        pass(client, None, &mut scratch);
    }
    gate.open_and_remove()?;
    Ok(Gated {
        total,
        close,
        barriers,
        calm_barriers,
    })
}

fn median<T: PartialOrd + Copy>(values: &mut [T]) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).expect("times are numbers"));
    values[values.len() / 2]
}

fn frames_per_second(time: Duration) -> f64 {
    let frames = u32::try_from(FRAMES_PER_EPOCH).expect("small") * u32::try_from(EPOCHS).expect("small");
    f64::from(frames) / time.as_secs_f64()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    netns::enter_new()?;
    // The host's own frames would be counted as the guest's.
    for which in ["all", "default"] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1")?;
    }
    run("ip link add nbbr0 type bridge mcast_snooping 0");
    run("ip link set nbbr0 up");
    let (guest, client) = (tap("nbg0", true)?, tap("nbc0", true)?);
    let sink = tap("nbs0", false)?;
    for bytes in [64, 1514] {
        let mut frame = vec![0; VNET_HEADER_BYTES + bytes];
        let ends = [[0xff; 6], GUEST].concat();
        frame[VNET_HEADER_BYTES..][..12].copy_from_slice(&ends);
        frame[VNET_HEADER_BYTES + 12..][..2].copy_from_slice(&[0x88, 0xb5]);
        let (mut ratios, mut closes) = (Vec::new(), Vec::new());
        let (mut barriers, mut calm_barriers) = (Vec::new(), Vec::new());
        let (mut bare_rates, mut gate_rates) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let reference = bare(&guest, &client, &sink, &frame);
            let measured = gated(&guest, &client, &frame)?;
            ratios.push(reference.as_secs_f64() / measured.total.as_secs_f64());
            bare_rates.push(frames_per_second(reference));
            gate_rates.push(frames_per_second(measured.total));
            closes.push(measured.close);
            barriers.extend(measured.barriers);
            calm_barriers.extend(measured.calm_barriers);
        }
        let ratio = median(&mut ratios);
        println!(
            "{bytes:>5} B: gate {:.0} frames/s, bare loop {:.0} frames/s, ratio {ratio:.2}; close p50 {:?}",
            median(&mut gate_rates),
            median(&mut bare_rates),
            median(&mut closes),
        );
        for (when, times) in [("right after", &mut barriers), ("2 ms after", &mut calm_barriers)] {
            let p50 = median(times);
            let p99 = times[times.len() * 99 / 100];
            println!("         barrier p50 {p50:?}, p99 {p99:?}, {when} {FRAMES_PER_EPOCH} frames");
        }
    }
    Ok(())
}
