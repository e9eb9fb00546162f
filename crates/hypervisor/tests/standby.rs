//! A guest saved on one QEMU goes on in another, started by the derived command line.

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::on_kvm::{on_kvm, rounds, wait_for_rounds, word};
use common::saved::{Saved, WORK, save, save_now, went_on};
use common::{Guest, linux};
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::standby::QemuStandby;
use romulus_hypervisor::spec::{MachineSpec, QemuMachine};
use romulus_hypervisor::standby::Standby;
use romulus_testbed::firmware::{self, Payload};
use serde_json::Value;

fn file_hash(path: &Path) -> u128 {
    xxhash_rust::xxh3::xxh3_128(&fs::read(path).unwrap())
}

/// Trial, wait, activate; the guest goes on where it was.
fn goes_on(saved: &Saved) {
    goes_on_as(saved, &|_| went_on(saved));
}

fn goes_on_as(saved: &Saved, went_on: &dyn Fn(&mut Qmp)) {
    let before = file_hash(saved.main_ram());
    let mut standby = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    for difference in standby.differences() {
        println!("  {difference}");
    }
    println!("trial {:?}", standby.trial_load(&saved.committed()).unwrap());
    assert_eq!(
        file_hash(saved.main_ram()),
        before,
        "a trial leaves the image alone"
    );
    assert!(!saved.dir.path().join("run/trial").exists());
    standby.start_waiting(&saved.ram).unwrap();
    assert!(standby.is_waiting() && !standby.is_active());
    assert_eq!(
        file_hash(saved.main_ram()),
        before,
        "a machine that waits leaves the image alone"
    );
    println!(
        "activation {:?}",
        standby.activate(&saved.committed(), &mut || Ok(())).unwrap()
    );
    assert!(standby.is_active() && !standby.is_waiting());
    // The monitor is free for whoever protects the guest next.
    let path = standby.control_path().unwrap();
    let mut qmp = Qmp::connect(path, Instant::now() + Duration::from_secs(5)).unwrap();
    assert_eq!(
        qmp.execute("query-status", Value::Null).unwrap()["status"],
        "running"
    );
    went_on(&mut qmp);
    standby.kill();
    assert!(!standby.is_active());
}

const SHARED: &[&str] = &["-object", "memory-backend-memfd,id=ram0,size=128M,share=on"];

#[test]
fn a_q35_guest_with_shared_memory_goes_on_in_a_standby() {
    let arguments = [
        SHARED,
        &[
            "-nodefaults",
            "-M",
            "q35,accel=tcg,memory-backend=ram0",
            "-m",
            "128",
        ],
    ]
    .concat();
    goes_on(&save(Guest::start(&arguments, &linux(WORK)), true));
}

#[test]
fn a_q35_guest_with_plain_memory_goes_on_in_a_standby() {
    goes_on(&save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    ));
}

#[test]
fn the_default_machine_with_vga_goes_on_in_a_standby() {
    goes_on(&save(
        Guest::start(&["-accel", "tcg", "-m", "128"], &linux(WORK)),
        false,
    ));
}

#[test]
fn a_guest_on_two_vcpus_under_firmware_goes_on_in_a_standby() {
    let vars = tempfile::NamedTempFile::new().unwrap();
    fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", vars.path())
        .expect("ovmf is installed: run cargo xtask setup");
    let vars = format!("if=pflash,format=raw,file={}", vars.path().display());
    let code = "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd";
    let arguments = [
        "-M",
        "q35,accel=tcg",
        "-m",
        "256",
        "-smp",
        "2",
        "-drive",
        code,
        "-drive",
        &vars,
        "-nic",
        "none",
    ];
    goes_on(&save(Guest::start(&arguments, &linux(WORK)), false));
}

/// What it wrote before and what it writes now fit: with the count n the first of its pages have n and the others n - 1.
#[test]
fn a_guest_under_kvm_goes_on_in_a_standby() {
    let folder = tempfile::tempdir().unwrap();
    let payload = Payload::writes(500);
    let (guest, mut other) = on_kvm(payload, folder.path());
    let before = rounds(&mut other);
    let saved = save_now(guest, false);
    assert_eq!(saved.spec.qemu().unwrap().accelerator, "kvm");
    goes_on_as(&saved, &|monitor| {
        let at_the_start = rounds(monitor);
        assert!(at_the_start >= before, "{at_the_start} after {before}");
        wait_for_rounds(monitor, at_the_start + 20);
        monitor.execute("stop", Value::Null).unwrap();
        let count = rounds(monitor);
        let written: Vec<u64> = (0..u64::from(payload.pages))
            .map(|page| word(monitor, firmware::WRITTEN_AT + page * 4096))
            .collect();
        assert!(written.is_sorted_by(|a, b| a >= b), "{written:?}");
        assert!(
            written.iter().all(|word| [count, count - 1].contains(word)),
            "{count}: {written:?}"
        );
    });
}

#[test]
fn a_cold_standby_is_started_at_activation() {
    let saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    let mut standby = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    let report = standby.activate(&saved.committed(), &mut || Ok(())).unwrap();
    println!("{report:?}");
    assert!(!report.warm);
    went_on(&saved);
    standby.kill();
}

#[test]
fn a_damaged_checkpoint_or_another_machine_is_refused_in_the_trial() {
    let mut saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    let mut standby = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    // The name of a device section that this machine does not have.
    let whole = saved.state.clone();
    let at = saved.state.windows(5).position(|w| w == b"timer").unwrap();
    saved.state[at..at + 5].copy_from_slice(b"remit");
    let error = standby.trial_load(&saved.committed()).unwrap_err().to_string();
    assert!(error.contains("remit"), "{error}");
    saved.state = whole[..whole.len() - 100].to_vec();
    let error = standby.trial_load(&saved.committed()).unwrap_err();
    assert!(
        error.to_string().contains("cannot be made into a stream"),
        "{error}"
    );
    saved.state = whole;
    standby.trial_load(&saved.committed()).unwrap();
    // Another device than the primary had.
    let mut other = saved.spec.clone();
    own(&mut other)
        .argv
        .extend(["-device".to_owned(), "virtio-balloon-pci".to_owned()]);
    let mut standby = QemuStandby::prepare(&other, saved.options()).unwrap();
    let error = standby.trial_load(&saved.committed()).unwrap_err().to_string();
    assert!(error.contains("virtio-balloon"), "{error}");
}

fn own(spec: &mut MachineSpec) -> &mut QemuMachine {
    spec.qemu_mut().unwrap()
}

#[test]
fn what_this_host_lacks_is_named_before_anything_starts() {
    let saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    let prepare = |change: &dyn Fn(&mut MachineSpec)| {
        let mut spec = saved.spec.clone();
        change(&mut spec);
        QemuStandby::prepare(&spec, saved.options()).map(drop)
    };
    let error = prepare(&|spec| own(spec).files[0].bytes += 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains("differs from the primary's"), "{error}");
    let error = prepare(&|spec| own(spec).files.clear()).unwrap_err().to_string();
    assert!(error.contains("vmlinuz"), "{error}");
    let error = prepare(&|spec| own(spec).argv.push("-frobnicate".into())).unwrap_err();
    assert!(
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains("frobnicate")
    );
    let start = |change: &dyn Fn(&mut MachineSpec)| {
        let mut spec = saved.spec.clone();
        change(&mut spec);
        let mut standby = QemuStandby::prepare(&spec, saved.options()).unwrap();
        standby.start_waiting(&saved.ram).unwrap_err().to_string()
    };
    let error = start(&|spec| spec.version = "9.1.0".into());
    assert!(error.contains("same series"), "{error}");
    let with_cpu = |spec: &mut MachineSpec, model: &str| {
        let words = ["-cpu".to_owned(), model.to_owned()];
        own(spec).argv.extend(words);
    };
    let error = start(&|spec| with_cpu(spec, "no-such-cpu"));
    assert!(error.contains("no-such-cpu"), "{error}");
    // What a processor lacks is taken from the model as this is.
    let error = start(&|spec| with_cpu(spec, "qemu64,-cx16"));
    assert!(error.contains("other features on this host"), "{error}");
    assert!(error.contains("(CPUID.01H:ECX 0x"), "{error}");
    let error = start(&|spec| with_cpu(spec, "qemu64,+pcid"));
    assert!(error.contains("(lacking here: pcid)"), "{error}");
}

#[test]
fn an_agent_that_starts_again_ends_what_waits_and_adopts_what_runs() {
    let saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    let mut first = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    first.start_waiting(&saved.ram).unwrap();
    let pid = first.pid().unwrap();
    // As if its agent had died: nobody ends the process and the monitor is free.
    first.abandon();
    let mut second = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    second.activate(&saved.committed(), &mut || Ok(())).unwrap();
    let active = second.pid().unwrap();
    assert_ne!(active, pid);
    drop(second);
    // A replicator that protects the guest from here holds its monitor, at more restarts than QEMU's queue of clients is long; and by now
    // this host lacks a file.
    let socket = saved.dir.path().join("run/machine/qmp");
    let replicator = Qmp::connect(&socket, Instant::now() + Duration::from_secs(10)).unwrap();
    let mut lacking = saved.spec.clone();
    own(&mut lacking).files[0].bytes += 1;
    for _ in 0..4 {
        let found = QemuStandby::adopt(&lacking, saved.options()).unwrap();
        let mut found = found.expect("the guest is found");
        assert!(found.is_active() && found.pid() == Some(active));
    }
    drop(replicator);
    let mut third = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    assert!(third.is_active() && third.pid() == Some(active));
    assert!(third.start_waiting(&saved.ram).is_err());
    third.dismiss();
    assert!(third.is_active());
    went_on(&saved);
    third.kill();
    assert!(!third.is_active());
    // That none runs is known, whatever this host lacks.
    assert!(QemuStandby::adopt(&lacking, saved.options()).unwrap().is_none());
}

/// A tap of the test's own, removed by the kernel with the QEMU that made it.
#[test]
fn a_guest_with_a_network_goes_on_with_the_standbys_taps() {
    let tap = "tap,id=n0,ifname=hvnsource,script=no,downscript=no";
    let arguments = [
        "-nodefaults",
        "-M",
        "q35,accel=tcg",
        "-m",
        "128",
        "-netdev",
        tap,
        "-device",
        "virtio-net-pci,netdev=n0,mac=52:54:00:68:76:01",
    ];
    let saved = save(Guest::start(&arguments, &linux(WORK)), false);
    let mut options = saved.options();
    options.tap_prefix = "hvn".into();
    let mut standby = QemuStandby::prepare(&saved.spec, options).unwrap();
    assert_eq!(standby.taps(), ["hvnw0"]);
    standby.trial_load(&saved.committed()).unwrap();
    standby.start_waiting(&saved.ram).unwrap();
    assert!(Path::new("/sys/class/net/hvnw0").exists() && !Path::new("/sys/class/net/hvnt0").exists());
    println!(
        "{:?}",
        standby.activate(&saved.committed(), &mut || Ok(())).unwrap()
    );
    went_on(&saved);
    standby.kill();
    assert!(!Path::new("/sys/class/net/hvnw0").exists());
}

#[test]
fn a_guest_of_four_gib_goes_on_in_a_standby() {
    let arguments = [
        "-object",
        "memory-backend-memfd,id=ram0,size=4G,share=on",
        "-nodefaults",
        "-M",
        "q35,accel=tcg,memory-backend=ram0",
        "-m",
        "4G",
    ];
    goes_on(&save(Guest::start(&arguments, &linux(WORK)), true));
}
