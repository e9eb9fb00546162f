//! Learning real machines, and letting them go whatever happens.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, counters, linux};
use romulus_hypervisor::fault;
use romulus_hypervisor::qemu::bootstrap::{
    Bootstrap, BootstrapError, MigrationSettings, Options, Rescued, bootstrap, rescue,
};
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use serde_json::{Value, json};

const SHARED: &[&str] = &["-object", "memory-backend-memfd,id=ram0,size=128M,share=on"];

fn learn(guest: &mut Guest, options: &Options) -> Bootstrap {
    guest.wait_for("counter 3");
    let mut qmp = guest.qmp();
    let before = MigrationSettings::read(&mut qmp).unwrap();
    let learnt = bootstrap(&mut qmp, options, &mut || {}).unwrap();
    assert_eq!(
        MigrationSettings::read(&mut qmp).unwrap(),
        before,
        "the settings are as they were"
    );
    assert_eq!(
        qmp.execute("query-status", Value::Null).unwrap()["status"],
        "running"
    );
    let at = *counters(&guest.serial()).last().unwrap();
    guest.wait_for(&format!("counter {}", at + 3));
    println!("{}: pause {:?} us", learnt.template.machine, learnt.pause_us);
    for (block, content) in learnt.template.blocks.iter().zip(&learnt.contents) {
        println!(
            "  {} {} {:?} kept {}",
            block.name,
            block.bytes,
            block.gpa,
            content.is_some()
        );
    }
    assert!(learnt.pause_us.is_some());
    assert!(learnt.events.is_empty(), "{:?}", learnt.events);
    learnt
}

fn names(learnt: &Bootstrap) -> Vec<&str> {
    learnt.template.blocks.iter().map(|b| b.name.as_str()).collect()
}

#[test]
fn a_q35_machine_with_shared_memory_is_learnt_without_its_memory() {
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
    let mut guest = Guest::start(&arguments, &linux("counter:50"));
    let learnt = learn(&mut guest, &Options::new(true));
    assert_eq!(learnt.template.machine, "pc-q35-7.2");
    assert_eq!(names(&learnt)[usize::from(learnt.main.0)], "ram0");
    assert!(learnt.contents[usize::from(learnt.main.0)].is_none());
    let bios = names(&learnt).iter().position(|n| *n == "pc.bios").unwrap();
    let bios = learnt.contents[bios].as_ref().unwrap();
    // The reset vector jumps; an empty ROM would not.
    assert_eq!(bios[bios.len() - 16], 0xea);
    assert!(learnt.template.blocks.iter().all(|b| b.gpa.is_some()));
}

#[test]
fn a_q35_machine_with_plain_memory_is_learnt_too() {
    let mut guest = Guest::start(
        &["-nodefaults", "-M", "q35,accel=tcg", "-m", "128"],
        &linux("counter:50,dirty:800:25"),
    );
    let learnt = learn(&mut guest, &Options::new(false));
    assert_eq!(names(&learnt)[usize::from(learnt.main.0)], "pc.ram");
    assert!(learnt.contents[usize::from(learnt.main.0)].is_none());
}

#[test]
fn the_default_machine_with_vga_and_its_nic_is_learnt() {
    let mut guest = Guest::start(&["-accel", "tcg", "-m", "128"], &linux("counter:50"));
    let learnt = learn(&mut guest, &Options::new(false));
    assert_eq!(learnt.template.machine, "pc-i440fx-7.2");
    for name in ["0000:00:02.0/vga.vram", "0000:00:03.0/e1000.rom", "pc.bios"] {
        let at = names(&learnt).iter().position(|n| *n == name).unwrap();
        assert!(learnt.contents[at].is_some(), "{name} was not kept");
    }
    // And once more: a second bootstrap follows every reset and every new session.
    learn(&mut guest, &Options::new(false));
}

#[test]
fn a_paused_guest_is_refused_and_stays_paused() {
    let mut guest = Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "64"], &[]);
    let mut qmp = guest.qmp();
    qmp.execute("stop", Value::Null).unwrap();
    let error = bootstrap(&mut qmp, &Options::new(false), &mut || {}).unwrap_err();
    assert!(matches!(error, BootstrapError::NotRunning(state) if state == "paused"));
    assert_eq!(
        qmp.execute("query-status", Value::Null).unwrap()["status"],
        "paused"
    );
}

#[test]
fn settings_that_somebody_made_survive_a_bootstrap() {
    let mut guest = Guest::start(&["-nodefaults", "-M", "q35,accel=tcg", "-m", "64"], &[]);
    let mut qmp = guest.qmp();
    let capability = |name: &str| json!({ "capability": name, "state": true });
    let set =
        json!({ "capabilities": [capability("xbzrle"), capability("auto-converge"), capability("events")] });
    qmp.execute("migrate-set-capabilities", set).unwrap();
    qmp.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 123_456, "downtime-limit": 77 }),
    )
    .unwrap();
    let before = MigrationSettings::read(&mut qmp).unwrap();
    bootstrap(&mut qmp, &Options::new(false), &mut || {}).unwrap();
    assert_eq!(MigrationSettings::read(&mut qmp).unwrap(), before);
}

#[test]
fn a_machine_that_cannot_migrate_is_refused_with_the_reason() {
    let device = "ivshmem-plain,memdev=m1,master=off";
    let arguments = [
        "-nodefaults",
        "-M",
        "q35,accel=tcg",
        "-m",
        "64",
        "-device",
        device,
    ];
    let backend = [
        "-object".to_owned(),
        "memory-backend-ram,id=m1,size=32M".to_owned(),
    ];
    let mut guest = Guest::start(&arguments, &backend);
    let mut qmp = guest.qmp();
    let error = bootstrap(&mut qmp, &Options::new(false), &mut || {}).unwrap_err();
    assert!(
        matches!(&error, BootstrapError::NotMigratable(why) if why.contains("ivshmem")),
        "{error:?}"
    );
    assert_eq!(rescue(&mut qmp, None).unwrap(), Rescued::Nothing);
    assert_eq!(
        qmp.execute("query-status", Value::Null).unwrap()["status"],
        "running"
    );
}

const HELPER_QMP: &str = "ROMULUS_TEST_HELPER_QMP";

/// Not a test of its own: the process that the kill tests below start and that dies at a named point.
#[test]
fn helper_that_bootstraps() {
    let Some(path) = std::env::var_os(HELPER_QMP) else {
        return;
    };
    let mut qmp = Qmp::connect(path, Instant::now() + Duration::from_secs(10)).unwrap();
    bootstrap(
        &mut qmp,
        &Options::new(std::env::var_os("SHARED").is_some()),
        &mut || {},
    )
    .unwrap();
}

/// Starts a bootstrap that dies at `point`; returns when it is dead.
fn die_at(guest: &Guest, point: &str, shared: bool) {
    let mut helper = Command::new(std::env::current_exe().unwrap());
    helper
        .args(["helper_that_bootstraps", "--exact"])
        .env(HELPER_QMP, guest.qmp_path());
    if shared {
        helper.env("SHARED", "1");
    }
    let status = helper
        .env(fault::VARIABLE, format!("{point}:sigkill"))
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9), "the helper did not die at {point}");
}

fn killed_at_every_step(mut guest: Guest, shared: bool) {
    guest.wait_for("counter 3");
    let before = MigrationSettings::read(&mut guest.qmp()).unwrap();
    for point in fault::REPLICATOR_POINTS
        .iter()
        .filter(|p| p.starts_with("bootstrap."))
    {
        die_at(&guest, point, shared);
        let mut qmp = guest.qmp();
        let rescued = rescue(&mut qmp, Some(&before)).unwrap_or_else(|error| panic!("{point}: {error:?}"));
        println!("{point}: {rescued:?}");
        assert_eq!(MigrationSettings::read(&mut qmp).unwrap(), before, "{point}");
        assert_eq!(
            qmp.execute("query-status", Value::Null).unwrap()["status"],
            "running",
            "{point}"
        );
        let at = *counters(&guest.serial()).last().unwrap();
        guest.wait_for(&format!("counter {}", at + 2));
        // The next attempt must not stick at what the dead one left.
        bootstrap(&mut qmp, &Options::new(shared), &mut || {})
            .unwrap_or_else(|error| panic!("{point}: {error:?}"));
        assert_eq!(
            qmp.execute("query-status", Value::Null).unwrap()["status"],
            "running",
            "{point}"
        );
    }
}

#[test]
fn a_guest_whose_bootstrap_is_killed_at_any_step_is_freed() {
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
    killed_at_every_step(Guest::start(&arguments, &linux("counter:50")), true);
}

#[test]
fn a_guest_with_plain_memory_whose_bootstrap_is_killed_at_any_step_is_freed() {
    killed_at_every_step(
        Guest::start(&["-accel", "tcg", "-m", "128"], &linux("counter:50")),
        false,
    );
}
