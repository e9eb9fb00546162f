//! A real QEMU on real KVM, with a guest that needs no kernel.

use std::path::Path;
use std::time::{Duration, Instant};

use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_testbed::firmware::{self, Payload};
use serde_json::json;

use super::Guest;

/// A guest at work, with its image in this folder, and a second monitor, which is not ours.
pub(crate) fn on_kvm(payload: Payload, folder: &Path) -> (Guest, Qmp) {
    let (image, other) = (folder.join("firmware"), folder.join("other"));
    std::fs::write(&image, firmware::image(payload)).unwrap();
    let memory = firmware::MEMORY_MIB.to_string();
    let arguments = [
        "-nodefaults",
        "-M",
        "pc,accel=kvm",
        "-cpu",
        "qemu64",
        "-m",
        &memory,
    ];
    let more = [
        "-bios".to_owned(),
        image.display().to_string(),
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", other.display()),
    ];
    let mut guest = Guest::start(&arguments, &more);
    let mut monitor = guest.connect(&other);
    wait_for_rounds(&mut monitor, 8);
    (guest, monitor)
}

/// How many rounds the guest has done.
pub(crate) fn rounds(monitor: &mut Qmp) -> u64 {
    word(monitor, firmware::COUNT_AT)
}

/// 64 bits of the guest's memory.
pub(crate) fn word(monitor: &mut Qmp, address: u64) -> u64 {
    let arguments = json!({ "command-line": format!("xp /1gx {address:#x}") });
    let answer = monitor.execute("human-monitor-command", arguments).unwrap();
    let text = answer.as_str().unwrap().trim();
    u64::from_str_radix(text.rsplit("0x").next().unwrap(), 16).unwrap()
}

pub(crate) fn wait_for_rounds(monitor: &mut Qmp, least: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while rounds(monitor) < least {
        assert!(
            Instant::now() < deadline,
            "the guest does not do its {least} rounds"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
