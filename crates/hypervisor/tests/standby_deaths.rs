//! An agent dies at every step of an activation, by name; and a guest runs only from memory that is what was committed.

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::saved::{WORK, save, went_on};
use common::{Guest, linux};
use romulus_hypervisor::fault;
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::standby::{QemuStandby, StandbyOptions};
use romulus_hypervisor::spec::MachineSpec;
use romulus_hypervisor::standby::{Committed, Standby, StandbyError};
use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{BlockId, Digest, PAGE_BYTES, PageIndex};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const HELPER_DIR: &str = "ROMULUS_TEST_HELPER_DIR";
const HELPER_VERIFIES: &str = "ROMULUS_TEST_HELPER_VERIFIES";

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
        .activate(
            &Committed {
                ram: &ram,
                device_state: &device_state,
                memory: std::env::var_os(HELPER_VERIFIES).map(|_| digest_of(&spec, &ram)),
            },
            &mut || Ok(()),
        )
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

#[test]
fn a_machine_that_dies_before_it_has_read_everything_leaves_the_image_for_another() {
    let saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    let digest = digest_of(&saved.spec, &saved.ram);
    let mut standby = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
    standby.trial_load(&saved.committed()).unwrap();
    standby.start_waiting(&saved.ram).unwrap();
    let pid = Pid::from_raw(i32::try_from(standby.pid().unwrap()).unwrap()).unwrap();
    // Dead before it is told to read, and right when it may.
    let error = standby
        .activate(&saved.committed(), &mut || {
            kill_process(pid, Signal::KILL).unwrap();
            Ok(())
        })
        .unwrap_err();
    assert!(error.untouched, "{error}");
    let error = standby
        .activate(&saved.committed(), &mut || {
            Err(StandbyError::plain("the disk is full"))
        })
        .unwrap_err();
    assert!(error.untouched && error.to_string().contains("disk"), "{error}");
    assert!(!standby.is_waiting() && !standby.is_active());
    assert_eq!(
        digest_of(&saved.spec, &saved.ram),
        digest,
        "the image was written to"
    );

    let report = standby.activate(&saved.committed(), &mut || Ok(())).unwrap();
    assert!(!report.warm);
    went_on(&saved);
    standby.kill();
}

/// The digest of all memory as a commit would name it.
fn digest_of(spec: &MachineSpec, ram: &[PathBuf]) -> Digest {
    let mut image = ImageDigest::ZERO;
    for (position, path) in ram.iter().enumerate() {
        let first = spec
            .layout
            .first_page(BlockId(u16::try_from(position).unwrap()))
            .0;
        let bytes = fs::read(path).unwrap();
        for (index, page) in (first..).zip(bytes.as_chunks::<PAGE_BYTES>().0) {
            image.replace(Digest(0), page_digest(PageIndex(index), page));
        }
    }
    image.digest()
}

#[test]
fn a_guest_runs_only_when_the_memory_of_its_standby_is_what_was_committed() {
    let arguments: &[&[&str]] = &[
        &["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"],
        // Video memory, boot ROMs of cards and tables: blocks that come with the stream.
        &[
            "-M",
            "pc,accel=tcg",
            "-m",
            "128",
            "-nic",
            "user,model=virtio-net-pci",
        ],
    ];
    for arguments in arguments {
        let saved = save(Guest::start(arguments, &linux(WORK)), false);
        let digest = digest_of(&saved.spec, &saved.ram);
        let mut standby = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
        let with = |memory| Committed {
            memory: Some(memory),
            ..saved.committed()
        };
        let error = standby
            .activate(&with(Digest(digest.0 ^ 1)), &mut || Ok(()))
            .unwrap_err();
        assert!(!error.untouched, "it had read everything");
        assert!(error.to_string().contains("not what was committed"), "{error}");
        assert!(!standby.is_active() && !standby.is_waiting() && standby.pid().is_none());
        assert!(Qmp::connect(saved.dir.path().join("run/machine/qmp"), Instant::now()).is_err());
        let report = standby.activate(&with(digest), &mut || Ok(())).unwrap();
        println!("{report:?}");
        assert!(report.verify_us.is_some());
        went_on(&saved);
        standby.kill();
    }
}

#[test]
fn a_machine_that_was_not_verified_is_ended_by_the_next_agent() {
    let saved = save(
        Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"], &linux(WORK)),
        false,
    );
    fs::write(saved.dir.path().join("spec"), saved.spec.to_json()).unwrap();
    for (point, runs) in [
        ("standby.loaded", false),
        ("standby.verified", false),
        ("standby.running", true),
    ] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["helper_that_activates", "--exact"])
            .env(HELPER_DIR, saved.dir.path())
            .env(HELPER_VERIFIES, "1")
            .env(fault::VARIABLE, format!("{point}:sigkill"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "the helper did not die at {point}");
        let mut next = QemuStandby::prepare(&saved.spec, saved.options()).unwrap();
        assert_eq!(next.is_active(), runs, "{point}");
        if runs {
            went_on(&saved);
            next.kill();
        }
    }
}
