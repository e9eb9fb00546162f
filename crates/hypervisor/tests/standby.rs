//! A guest saved on one QEMU goes on in another, started by the derived command line.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, counters, linux, read_lossy, wait_for};
use romulus_hypervisor::fault;
use romulus_hypervisor::qemu::bootstrap::{Bootstrap, Options, bootstrap};
use romulus_hypervisor::qemu::cmdline;
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::standby::{QemuStandby, StandbyOptions};
use romulus_hypervisor::spec::{Disk, FileUse, Hypervisor, MachineSpec, SPEC_FORMAT};
use romulus_hypervisor::standby::{Committed, Standby};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A guest's last checkpoint on what stands for the backup's disk.
struct Saved {
    dir: TempDir,
    spec: MachineSpec,
    ram: Vec<PathBuf>,
    state: Vec<u8>,
    /// The primary's console up to the checkpoint.
    console: String,
}

impl Saved {
    fn committed(&self) -> Committed<'_> {
        Committed {
            ram: &self.ram,
            device_state: &self.state,
        }
    }

    fn options(&self) -> StandbyOptions {
        let mut options = StandbyOptions::new(self.dir.path().join("run"), "hvt");
        options.log_serial = true;
        options
    }

    fn serial(&self) -> PathBuf {
        self.dir.path().join("run/machine/serial")
    }

    fn main_ram(&self) -> &Path {
        &self.ram[usize::from(self.spec.main.0)]
    }
}

fn describe(guest: &Guest, qmp: &mut Qmp, learnt: &Bootstrap) -> MachineSpec {
    let blocks = qmp.execute("query-block", Value::Null).unwrap();
    let disks = blocks.as_array().unwrap().iter().filter_map(|block| {
        let bytes = block["inserted"]["image"]["virtual-size"].as_u64()?;
        Some(Disk {
            id: block["device"].as_str()?.to_owned(),
            bytes,
        })
    });
    let mut spec = MachineSpec {
        format: SPEC_FORMAT,
        hypervisor: Hypervisor::Qemu,
        version: qmp.version().to_string(),
        accelerator: "tcg".into(),
        cpu_model: String::new(),
        host_cpu: String::new(),
        vcpus: 1,
        layout: learnt.layout.clone(),
        main: learnt.main,
        argv: guest.argv.clone(),
        cwd: "/".into(),
        nics: vec![],
        files: vec![],
        disks: disks.collect(),
        disposable: vec!["user".into()],
        template: learnt.template.clone(),
    };
    let files = cmdline::files_needed(&spec).unwrap().into_iter();
    let uses = files.map(|path| FileUse {
        bytes: fs::metadata(&path).unwrap().len(),
        path,
        digest: None,
    });
    spec.files = uses.collect();
    // As it travels.
    MachineSpec::from_json(&spec.to_json()).unwrap()
}

/// Saves a running guest: `stop`, its memory by `pmemsave` or its blocks, its devices by `xen-save-devices-state`.
fn save(mut guest: Guest, shared: bool) -> Saved {
    guest.wait_for("counter 5");
    let mut qmp = guest.qmp();
    let learnt = bootstrap(&mut qmp, &Options::new(shared), &mut || {}).unwrap();
    let spec = describe(&guest, &mut qmp, &learnt);
    let dir = tempfile::Builder::new()
        .prefix("romulus-hv-")
        .tempdir_in("/dev/shm")
        .unwrap();
    qmp.execute("stop", Value::Null).unwrap();
    let state = dir.path().join("state");
    let arguments = json!({ "filename": state.display().to_string(), "live": false });
    qmp.execute("xen-save-devices-state", arguments).unwrap();
    let blocks = learnt.template.blocks.iter().enumerate();
    let ram: Vec<PathBuf> = blocks
        .map(|(position, block)| {
            let path = dir.path().join(format!("ram-{position}"));
            if position == usize::from(learnt.main.0) {
                copy_block(&guest, block.bytes, &path);
            } else {
                fs::write(&path, learnt.contents[position].as_ref().unwrap()).unwrap();
            }
            path
        })
        .collect();
    let console = guest.serial();
    Saved {
        spec,
        ram,
        state: fs::read(&state).unwrap(),
        console,
        dir,
    }
}

/// Copies the largest mapping of exactly this size out of the stopped QEMU.
fn copy_block(guest: &Guest, bytes: u64, to: &Path) {
    let maps = fs::read_to_string(format!("/proc/{}/maps", guest.process.id())).unwrap();
    let address = maps.lines().find_map(|line| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let (from, to) = (
            u64::from_str_radix(from, 16).ok()?,
            u64::from_str_radix(to, 16).ok()?,
        );
        (to - from == bytes).then_some(from)
    });
    let memory = fs::File::open(format!("/proc/{}/mem", guest.process.id())).unwrap();
    let file = fs::File::create(to).unwrap();
    file.set_len(bytes).unwrap();
    let mut chunk = vec![0u8; 1 << 20];
    for at in (0..bytes).step_by(chunk.len()) {
        memory
            .read_exact_at(&mut chunk, address.expect("the block is mapped whole") + at)
            .unwrap();
        if chunk.iter().any(|b| *b != 0) {
            file.write_all_at(&chunk, at).unwrap();
        }
    }
}

fn file_hash(path: &Path) -> u128 {
    xxhash_rust::xxh3::xxh3_128(&fs::read(path).unwrap())
}

/// Trial, wait, activate; the guest goes on where it was.
fn goes_on(saved: &Saved) {
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
    println!("activation {:?}", standby.activate(&saved.committed()).unwrap());
    assert!(standby.is_active() && !standby.is_waiting());
    went_on(saved);
    // The monitor is free for whoever protects the guest next.
    let path = standby.control_path().unwrap();
    let mut qmp = Qmp::connect(path, Instant::now() + Duration::from_secs(5)).unwrap();
    assert_eq!(
        qmp.execute("query-status", Value::Null).unwrap()["status"],
        "running"
    );
    standby.kill();
    assert!(!standby.is_active());
}

fn went_on(saved: &Saved) {
    let last = *counters(&saved.console).last().unwrap();
    wait_for(&saved.serial(), &format!("counter {}", last + 20));
    let console = read_lossy(&saved.serial());
    let after = counters(&console);
    let expected: Vec<u64> = (after[0]..).take(after.len()).collect();
    assert_eq!(after, expected, "the counter has no gap");
    // A line that was half written at the checkpoint belongs to neither console as a whole.
    assert!(
        after[0] == last + 1 || after[0] == last + 2,
        "{last} then {}",
        after[0]
    );
    assert!(!console.contains("check BAD"), "{console}");
}

const SHARED: &[&str] = &["-object", "memory-backend-memfd,id=ram0,size=128M,share=on"];
const WORK: &str = "counter:50,check:500";

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

#[test]
fn a_cold_standby_is_started_at_activation() {
    let saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    let mut standby = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    let report = standby.activate(&saved.committed()).unwrap();
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
    other
        .argv
        .extend(["-device".to_owned(), "virtio-balloon-pci".to_owned()]);
    let mut standby = QemuStandby::prepare(&other, saved.options()).unwrap();
    let error = standby.trial_load(&saved.committed()).unwrap_err().to_string();
    assert!(error.contains("virtio-balloon"), "{error}");
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
    let error = prepare(&|spec| spec.files[0].bytes += 1).unwrap_err().to_string();
    assert!(error.contains("differs from the primary's"), "{error}");
    let error = prepare(&|spec| spec.files.clear()).unwrap_err().to_string();
    assert!(error.contains("vmlinuz"), "{error}");
    let error = prepare(&|spec| spec.argv.push("-frobnicate".into())).unwrap_err();
    assert!(
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains("frobnicate")
    );
    let mut newer = saved.spec.clone();
    newer.version = "9.1.0".into();
    let error = QemuStandby::prepare(&newer, saved.options())
        .unwrap()
        .start_waiting(&saved.ram)
        .unwrap_err();
    assert!(error.to_string().contains("same series"), "{error}");
    let mut bad = saved.spec.clone();
    bad.argv.extend(["-cpu".to_owned(), "no-such-cpu".to_owned()]);
    let error = QemuStandby::prepare(&bad, saved.options())
        .unwrap()
        .start_waiting(&saved.ram)
        .unwrap_err();
    assert!(error.to_string().contains("no-such-cpu"), "{error}");
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
    second.activate(&saved.committed()).unwrap();
    let active = second.pid().unwrap();
    assert_ne!(active, pid);
    drop(second);
    let mut third = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    assert!(third.is_active() && third.pid() == Some(active));
    assert!(third.start_waiting(&saved.ram).is_err());
    third.dismiss();
    assert!(third.is_active());
    went_on(&saved);
    third.kill();
    assert!(!third.is_active());
}

const HELPER_DIR: &str = "ROMULUS_TEST_HELPER_DIR";

/// Not a test of its own: the agent that the test below starts and that dies at a named point of an activation.
#[test]
fn helper_that_activates() {
    let Some(dir) = std::env::var_os(HELPER_DIR).map(PathBuf::from) else {
        return;
    };
    let spec = MachineSpec::from_json(&fs::read(dir.join("spec")).unwrap()).unwrap();
    let ram: Vec<PathBuf> = (0..spec.layout.blocks().len())
        .map(|n| dir.join(format!("ram-{n}")))
        .collect();
    let mut options = StandbyOptions::new(dir.join("run"), "hvt");
    options.log_serial = true;
    let mut standby = QemuStandby::prepare(&spec, options).unwrap();
    let device_state = fs::read(dir.join("state")).unwrap();
    standby
        .activate(&Committed {
            ram: &ram,
            device_state: &device_state,
        })
        .unwrap();
}

#[test]
fn an_agent_that_dies_during_an_activation_leaves_a_guest_that_waits_or_runs() {
    let saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    fs::write(saved.dir.path().join("spec"), saved.spec.to_json()).unwrap();
    for (point, runs) in [
        ("standby.before_stream", false),
        ("standby.in_stream", false),
        ("standby.after_stream", true),
    ] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["helper_that_activates", "--exact"])
            .env(HELPER_DIR, saved.dir.path())
            .env(fault::VARIABLE, format!("{point}:sigkill"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "the helper did not die at {point}");
        let deadline = Instant::now() + Duration::from_secs(10);
        let socket = saved.dir.path().join("run/machine/qmp");
        loop {
            let mut qmp = Qmp::connect(&socket, deadline).unwrap();
            let state = qmp.execute("query-status", Value::Null).unwrap()["status"]
                .as_str()
                .unwrap()
                .to_owned();
            if (state == "running") == runs {
                break;
            }
            assert!(
                state == "inmigrate" && Instant::now() < deadline,
                "{point}: {state}"
            );
        }
    }
    went_on(&saved);
    QemuStandby::prepare(&saved.spec, saved.options()).unwrap().kill();
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
    println!("{:?}", standby.activate(&saved.committed()).unwrap());
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
