//! Attaching to the guests of these tests, with the test program itself as the guardian.

use std::path::Path;
use std::time::{Duration, Instant};

use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::source::{AttachOptions, GuardianProgram, guardian};
use serde_json::Value;

use super::{Guest, counters, linux};

pub(crate) const Q35: &[&str] = &["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"];
pub(crate) const Q35_SHARED: &[&str] = &[
    "-object",
    "memory-backend-memfd,id=ram0,size=128M,share=on",
    "-nodefaults",
    "-M",
    "q35,accel=tcg,memory-backend=ram0",
    "-m",
    "128",
];
pub(crate) const DISPOSABLE: &[&str] = &["serial0", "user", "n0", "n1"];

/// What the test `helper_guardian` of each file is: the guardian process of the others.
pub(crate) fn be_the_guardian_if_asked() {
    let last = std::env::args().next_back().unwrap();
    if last.starts_with('{') {
        guardian::run(&[last]).unwrap();
    }
}

pub(crate) fn options(guest: &Guest, folder: &Path) -> AttachOptions {
    let args = ["helper_guardian", "--exact", "--nocapture"]
        .map(str::to_owned)
        .to_vec();
    let program = GuardianProgram {
        exe: std::env::current_exe().unwrap(),
        args,
    };
    let mut options = AttachOptions::new(guest.qmp_path(), program);
    options.fifo_dir = folder.join("fifos");
    options.allow.disposable = DISPOSABLE.iter().map(|id| (*id).to_owned()).collect();
    // The machine that runs the tests may be busy with other things.
    options.pause_limit_ns = 10_000_000_000;
    options
}

/// A guest with a second monitor, which is not ours.
pub(crate) fn start(arguments: &[&str], workloads: &str) -> (Guest, Qmp) {
    let mut more = linux(workloads);
    let folder = tempfile::Builder::new()
        .prefix("romulus-src-")
        .tempdir()
        .unwrap()
        .keep();
    let other = folder.join("other");
    more.extend([
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", other.display()),
    ]);
    let guest = Guest::start(arguments, &more);
    guest.wait_for("counter 3");
    let monitor = Qmp::connect(&other, Instant::now() + Duration::from_secs(10)).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    (guest, monitor)
}

pub(crate) fn goes_on(guest: &Guest) {
    let at = *counters(&guest.serial()).last().unwrap();
    guest.wait_for(&format!("counter {}", at + 3));
}

pub(crate) fn status(monitor: &mut Qmp) -> String {
    monitor.execute("query-status", Value::Null).unwrap()["status"]
        .as_str()
        .unwrap()
        .to_owned()
}
