//! The guest is never left paused: a replicator is killed, and another one stopped, at every step by name.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, counters, linux};
use romulus_hypervisor::fault;
use romulus_hypervisor::qemu::bootstrap::MigrationSettings;
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::source::{AttachOptions, GuardianProgram, QemuSource, guardian};
use romulus_hypervisor::source::{Checkpoint, GuestSource};
use serde_json::json;

const HELPER: &str = "ROMULUS_TEST_SOURCE_QMP";
/// How long the guest may be held before the holder is killed.
const PAUSE_LIMIT_NS: u64 = 1_000_000_000;

/// Not a test of its own: the guardian process.
#[test]
fn helper_guardian() {
    let last = std::env::args().next_back().unwrap();
    if last.starts_with('{') {
        guardian::run(&[last]).unwrap();
    }
}

/// Not a test of its own: the replicator that dies.
#[test]
fn helper_replicator() {
    let Some(qmp) = std::env::var_os(HELPER) else {
        return;
    };
    let qmp = PathBuf::from(qmp);
    let mut source = QemuSource::attach(options(&qmp)).unwrap();
    source.bootstrap().unwrap();
    source.arm().unwrap();
    let mut checkpoint = Checkpoint::default();
    source.precopy(&mut checkpoint).unwrap();
    std::fs::write(captures_begin(&qmp), "").unwrap();
    for _ in 0..3 {
        source.capture(&mut || Ok(()), false, &mut checkpoint).unwrap();
    }
    source.capture(&mut || Ok(()), true, &mut checkpoint).unwrap();
    source.resume().unwrap();
    Box::new(source).detach().unwrap();
}

fn options(qmp: &Path) -> AttachOptions {
    let args = ["helper_guardian", "--exact", "--nocapture"]
        .map(str::to_owned)
        .to_vec();
    let program = GuardianProgram {
        exe: std::env::current_exe().unwrap(),
        args,
    };
    let mut options = AttachOptions::new(qmp, program);
    options.fifo_dir = qmp.parent().unwrap().join("fifos");
    options.allow.disposable = ["serial0", "user"].map(str::to_owned).into();
    options.pause_limit_ns = PAUSE_LIMIT_NS;
    options
}

/// A file that says that the replicator takes checkpoints.
fn captures_begin(qmp: &Path) -> PathBuf {
    qmp.with_file_name("captures")
}

/// QEMU's migration settings, asked while nobody is attached.
fn settings(guest: &Guest) -> MigrationSettings {
    let deadline = Instant::now() + Duration::from_secs(10);
    MigrationSettings::read(&mut Qmp::connect(guest.qmp_path(), deadline).unwrap()).unwrap()
}

/// Settings that are not QEMU's own.
fn odd_settings(guest: &Guest) -> MigrationSettings {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut monitor = Qmp::connect(guest.qmp_path(), deadline).unwrap();
    let odd = json!({ "max-bandwidth": 12_345_678, "downtime-limit": 777 });
    monitor.execute("migrate-set-parameters", odd).unwrap();
    drop(monitor);
    settings(guest)
}

fn start_replicator(guest: &Guest, point: &str, action: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["helper_replicator", "--exact"])
        .env(HELPER, guest.qmp_path())
        .env(fault::VARIABLE, format!("{point}:{action}"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until it is dead, or stopped without a deadline over it.
fn wait_struck(replicator: &mut Child, point: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let grace = Duration::from_nanos(PAUSE_LIMIT_NS * 7);
    let mut stopped_at = None;
    loop {
        if let Some(status) = replicator.try_wait().unwrap() {
            assert_eq!(
                status.signal(),
                Some(9),
                "the replicator was not struck at {point}"
            );
            return;
        }
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", replicator.id())).unwrap_or_default();
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
            stopped_at.get_or_insert_with(Instant::now);
        }
        if stopped_at.is_some_and(|at| at.elapsed() > grace) {
            return;
        }
        assert!(Instant::now() < deadline, "nothing happened at {point}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn goes_on(guest: &Guest) {
    let at = *counters(&guest.serial()).last().unwrap();
    guest.wait_for(&format!("counter {}", at + 3));
}

/// An attachment that works proves that nothing of the dead one is in its way.
fn next_one_works(guest: &Guest, point: &str) {
    let mut source =
        QemuSource::attach(options(&guest.qmp_path())).unwrap_or_else(|e| panic!("{point}: {e}"));
    source.bootstrap().unwrap();
    source.arm().unwrap();
    let mut checkpoint = Checkpoint::default();
    source.capture(&mut || Ok(()), false, &mut checkpoint).unwrap();
    assert!(checkpoint.device_state.len() > 4096);
    Box::new(source).detach().unwrap();
    let left = std::fs::read_dir(guest.qmp_path().parent().unwrap().join("fifos"))
        .unwrap()
        .count();
    assert_eq!(left, 0, "{point}: something is left in the FIFO folder");
    goes_on(guest);
}

fn points() -> impl Iterator<Item = &'static str> {
    fault::REPLICATOR_POINTS.iter().copied().filter(|point| {
        ["attach.", "bootstrap.", "arm.", "precopy.", "capture.", "detach."]
            .iter()
            .any(|p| point.starts_with(p))
    })
}

fn struck_at_every_point(arguments: &[&str], action: &str) {
    let guest = Guest::start(arguments, &linux("counter:50,dirty:200:25"));
    guest.wait_for("counter 3");
    let before = odd_settings(&guest);
    for point in points() {
        let _ = std::fs::remove_file(captures_begin(&guest.qmp_path()));
        let begun = Instant::now();
        let mut replicator = start_replicator(&guest, point, action);
        wait_struck(&mut replicator, point);
        // Stopped outside of a pause, it may stay so: the guest runs all the same.
        goes_on(&guest);
        let _ = replicator.kill();
        replicator.wait().unwrap();
        goes_on(&guest);
        let in_captures = ["capture.", "detach."].iter().any(|p| point.starts_with(p));
        // A stop takes the thread that called for it a little later than a kill: it may be further by then.
        if action == "sigkill" {
            assert_eq!(captures_begin(&guest.qmp_path()).exists(), in_captures, "{point}");
        }
        next_one_works(&guest, point);
        assert_eq!(settings(&guest), before, "{point}");
        println!("{point}:{action} in {:.1} s", begun.elapsed().as_secs_f64());
    }
}

const SHARED: &[&str] = &[
    "-object",
    "memory-backend-memfd,id=ram0,size=128M,share=on",
    "-nodefaults",
    "-M",
    "q35,accel=tcg,memory-backend=ram0",
    "-m",
    "128",
];
const PLAIN: &[&str] = &["-nodefaults", "-M", "pc,accel=tcg", "-m", "128"];

#[test]
fn a_replicator_killed_at_any_point_leaves_the_guest_running() {
    struck_at_every_point(SHARED, "sigkill");
}

#[test]
fn a_replicator_killed_at_any_point_leaves_a_guest_with_plain_memory_running() {
    struck_at_every_point(PLAIN, "sigkill");
}

#[test]
fn a_replicator_stopped_at_any_point_does_not_stop_the_guest() {
    struck_at_every_point(SHARED, "sigstop");
}

/// Between the command and QEMU's opening of the FIFO it is a race who comes first; both outcomes have to be survived.
#[test]
fn a_replicator_killed_right_after_its_command_never_leaves_qemu_waiting_for_a_reader() {
    let guest = Guest::start(PLAIN, &linux("counter:50,dirty:200:25"));
    guest.wait_for("counter 3");
    for _ in 0..25 {
        let mut replicator = start_replicator(&guest, "capture.after_command", "sigkill");
        wait_struck(&mut replicator, "capture.after_command");
        goes_on(&guest);
    }
    next_one_works(&guest, "capture.after_command");
}

/// When the guardian dies as well, the next attach does its work.
#[test]
fn leftovers_are_freed_by_the_next_attach_when_the_guardian_died_too() {
    let guest = Guest::start(SHARED, &linux("counter:50,dirty:200:25"));
    guest.wait_for("counter 3");
    let before = odd_settings(&guest);
    let held = [
        "capture.after_command",
        "capture.holding",
        "bootstrap.before_release",
        "bootstrap.in_restore",
    ];
    for point in held {
        let mut replicator = start_replicator(&guest, point, "sigstop");
        let stopped = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", replicator.id())).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        while !stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
        for child in children(replicator.id()) {
            let pid = rustix::process::Pid::from_raw(child).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        replicator.kill().unwrap();
        replicator.wait().unwrap();
        next_one_works(&guest, point);
        assert_eq!(settings(&guest), before, "{point}");
    }
}

fn children(pid: u32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(path).unwrap().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .collect::<Vec<_>>()
        })
        .collect()
}
