//! Pauses of a QEMU that writes what it is told to, in the order that it is told to.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::thread::JoinHandle;

use serde_json::Value;

use super::*;
use crate::qemu::qmp::{QemuVersion, QmpError};
use crate::qemu::source::lair::Lair;
use crate::qemu::source::purpose::CAPTURE;

fn event(name: &str, at_us: u64) -> QmpEvent {
    QmpEvent {
        name: name.into(),
        data: Value::Null,
        seconds: at_us / 1_000_000,
        microseconds: u32::try_from(at_us % 1_000_000).unwrap(),
    }
}

fn wall_us() -> u64 {
    (monotonic_ns() + wall_clock_offset_ns()) / 1000
}

/// A monitor whose QEMU stops, opens the file that it is told, writes so many bytes and resumes.
struct FakeQemu {
    version: QemuVersion,
    state_bytes: usize,
    /// Whether it opens the file before it stops the guest.
    opens_first: bool,
    saving: Option<JoinHandle<Vec<QmpEvent>>>,
    events: VecDeque<QmpEvent>,
}

impl FakeQemu {
    fn new(state_bytes: usize) -> Self {
        let version = QemuVersion {
            major: 7,
            minor: 2,
            micro: 0,
            package: String::new(),
        };
        Self {
            version,
            state_bytes,
            opens_first: false,
            saving: None,
            events: VecDeque::new(),
        }
    }
}

impl Monitor for FakeQemu {
    fn version(&self) -> &QemuVersion {
        &self.version
    }

    fn command_timeout(&self) -> Duration {
        Duration::from_secs(10)
    }

    fn send(&mut self, command: &str, arguments: Value, _: &[BorrowedFd<'_>]) -> Result<(), QmpError> {
        assert_eq!(command, "xen-save-devices-state");
        let path = arguments["filename"].as_str().unwrap().to_owned();
        let (state_bytes, opens_first) = (self.state_bytes, self.opens_first);
        self.saving = Some(std::thread::spawn(move || {
            let mut stopped_us = wall_us();
            let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            if opens_first {
                std::thread::sleep(Duration::from_millis(30));
                stopped_us = wall_us();
            }
            file.write_all(&vec![7; state_bytes]).unwrap();
            drop(file);
            vec![
                event("STOP", stopped_us),
                event("RTC_CHANGE", wall_us()),
                event("RESUME", wall_us()),
            ]
        }));
        Ok(())
    }

    fn next_reply(&mut self, deadline: Instant) -> Result<Value, QmpError> {
        let saving = self.saving.take().expect("a command was sent");
        if !saving.is_finished() && deadline <= Instant::now() {
            self.saving = Some(saving);
            let command = String::new();
            return Err(QmpError::Timeout { command });
        }
        self.events.extend(saving.join().unwrap());
        Ok(Value::Null)
    }

    fn abandon_newest(&mut self) {}

    fn next_event(&mut self, _: Instant) -> Result<Option<QmpEvent>, QmpError> {
        Ok(self.events.pop_front())
    }

    fn take_events_lost(&mut self) -> u64 {
        0
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

struct Bench {
    pauser: Pauser,
    others: Vec<QmpEvent>,
    _folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fifo = Lair::enter(folder.path(), std::process::id())
            .unwrap()
            .make_fifo()
            .unwrap();
        Self {
            pauser: Pauser::new(fifo, 60_000_000_000).unwrap(),
            others: Vec::new(),
            _folder: folder,
        }
    }

    fn pause(&mut self, how: Hold, qemu: &mut FakeQemu) -> Result<Ended, CaptureError> {
        let held = self.pauser.hold(CAPTURE, how, qemu)?;
        self.pauser.release(held, qemu, &mut self.others)
    }
}

#[test]
fn a_state_that_fits_into_the_pipe_does_not_count_and_the_careful_pause_after_it_does() {
    let (mut bench, mut qemu) = (Bench::new(), FakeQemu::new(200_000));
    assert_eq!(bench.pause(Hold::Ahead, &mut qemu).unwrap().state_bytes, 200_000);
    // Now the pipe takes 128 KiB.
    qemu.state_bytes = 150_000;
    assert_eq!(bench.pause(Hold::Ahead, &mut qemu).unwrap().state_bytes, 150_000);
    qemu.state_bytes = 131_072;
    let early = bench.pause(Hold::Ahead, &mut qemu).unwrap_err();
    assert!(
        matches!(early, CaptureError::LetGoEarly { state_bytes: 131_072 }),
        "{early}"
    );
    assert_eq!(
        bench.pause(Hold::Careful, &mut qemu).unwrap().state_bytes,
        131_072
    );
    // What it was just now is the measure of the next one.
    assert_eq!(bench.pause(Hold::Ahead, &mut qemu).unwrap().state_bytes, 131_072);
    assert_eq!(
        bench.others.len(),
        5,
        "events of others are kept, failed pauses included"
    );
}

#[test]
fn a_qemu_that_opens_its_file_while_the_guest_runs_is_found_out_once_and_then_waited_for() {
    let (mut bench, mut qemu) = (Bench::new(), FakeQemu::new(100_000));
    qemu.opens_first = true;
    let early = bench.pause(Hold::Ahead, &mut qemu).unwrap_err();
    assert!(matches!(early, CaptureError::LetGoEarly { .. }), "{early}");
    for how in [Hold::Careful, Hold::Ahead, Hold::Ahead] {
        let held = bench.pauser.hold(CAPTURE, how, &mut qemu).unwrap();
        let stopped_ns = held.stopped_ns;
        let ended = bench.pauser.release(held, &mut qemu, &mut bench.others).unwrap();
        assert!(ended.own.unwrap().stop_ns <= stopped_ns, "{how:?}");
    }
}

#[test]
fn a_reader_that_comes_by_is_not_taken_for_qemu() {
    let (mut bench, mut qemu) = (Bench::new(), FakeQemu::new(100_000));
    let path = bench.pauser.fifo.path().to_owned();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = std::sync::Arc::clone(&stop);
    let passer_by = std::thread::spawn(move || {
        while !seen.load(std::sync::atomic::Ordering::Relaxed) {
            drop(open_fifo_reader(&path).unwrap());
        }
    });
    for _ in 0..50 {
        let held = bench.pauser.hold(CAPTURE, Hold::Ahead, &mut qemu).unwrap();
        let stopped_ns = held.stopped_ns;
        let ended = bench.pauser.release(held, &mut qemu, &mut bench.others).unwrap();
        assert!(ended.own.unwrap().stop_ns <= stopped_ns);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    passer_by.join().unwrap();
}

#[test]
fn our_own_pause_is_measured_and_taken_out_of_the_events() {
    let mut events = vec![
        event("RTC_CHANGE", 3_000_001),
        event("STOP", 3_000_010),
        event("RESUME", 3_001_300),
        event("STOP", 3_002_000),
    ];
    let own = OwnPause {
        stop_ns: 2_000_010_000,
        resume_ns: 2_001_300_000,
    };
    assert_eq!(take_own_pause(&mut events, 1_000_000_000), Some(own));
    let left: Vec<&str> = events.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(
        left,
        ["RTC_CHANGE", "STOP"],
        "what somebody else did afterwards stays"
    );
    let mut paused_before = vec![event("RTC_CHANGE", 1)];
    assert_eq!(take_own_pause(&mut paused_before, 0), None);
    let mut paused_just_before = vec![event("STOP", 1)];
    assert_eq!(take_own_pause(&mut paused_just_before, 0), None);
    assert_eq!(paused_just_before.len(), 1, "somebody else's pause must be seen");
}

#[test]
fn a_pipe_is_always_too_small_for_a_state_that_shrank_a_little() {
    for state_bytes in [
        0,
        1,
        4096,
        8192,
        8193,
        8194,
        32_653,
        79_040,
        131_073,
        135_169,
        3 << 20,
    ] {
        let pipe_bytes = pipe_bytes_for(state_bytes);
        assert!(pipe_bytes.is_power_of_two() && pipe_bytes >= 4096, "{pipe_bytes}");
        let shrunk = state_bytes.saturating_sub(STATE_SHRINKS_BYTES);
        assert!(pipe_bytes < shrunk.max(4097), "{pipe_bytes} for {state_bytes}");
    }
    assert_eq!(pipe_bytes_for(79_040), 65_536);
    assert_eq!(pipe_bytes_for(32_653), 16_384);
    assert_eq!(pipe_bytes_for(0), PIPE_BYTES_MIN, "nothing is known yet");
}
