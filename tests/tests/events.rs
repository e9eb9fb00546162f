//! What somebody else does to the guest while it is protected: pausing, resetting, powering off, crashing, plugging.

use std::process::ExitStatus;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::process::Process;
use romulus_e2e::qmp::Qmp;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{GUEST_IP, Host, Paths, Stamp, TEST_LAB, wait_for};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// Where the guest's kernel takes orders.
const TRIGGER_PORT: u16 = 9;

fn protected(guest: QemuConfig) -> Result<Stage> {
    let guest = QemuConfig {
        workload: format!("redis,dirty:200:25,trigger:{TRIGGER_PORT}"),
        second_monitor: true,
        ..guest
    };
    let config = StageConfig {
        guest: guest.into(),
        ..StageConfig::default()
    };
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
    stage.protect(&ProtectConfig::default())?;
    sleep(Duration::from_secs(1));
    Ok(stage)
}

fn text<'a>(status: &'a Value, key: &str) -> &'a str {
    status.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn wait_status(stage: &Stage, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    wait_for(what, SOON, || {
        last = stage.lab.status(Host::Primary).ok()?;
        is(&last).then(|| last.clone())
    })
    .map_err(|error| anyhow!("{error:#}; the last status: {last}"))
}

fn wait_protected(stage: &Stage) -> Result<Value> {
    wait_status(stage, "protection", |status| text(status, "state") == "protected")
}

fn wait_not_protected(stage: &Stage, reason: &str) -> Result<Value> {
    wait_status(stage, reason, |status| {
        text(status, "state") == "not_protected" && text(status, "reason").contains(reason)
    })
}

fn nobody_took_over(stage: &Stage, since: Stamp) {
    let activated = stage.timeline.first("activated", since);
    assert!(activated.is_none(), "the backup took over: {activated:?}");
    assert_eq!(
        stage.from_backup.count_after(since),
        0,
        "the backup spoke for the guest"
    );
}

/// Has the guest's kernel do what it does for this letter of its sysrq trigger.
fn trigger(stage: &Stage, letter: char) -> Result<()> {
    let script = format!("printf {letter} > /dev/udp/{GUEST_IP}/{TRIGGER_PORT}");
    let argv = ["bash", "-c", &script].map(str::to_owned);
    stage.lab.output(Host::Client, &argv)?;
    Ok(())
}

/// The host dies, and the guest goes on at the backup.
fn survives_its_host(stage: &mut Stage) -> Result<()> {
    let killed = stage.kill_primary()?;
    stage.timeline.wait("activated", killed, SOON)?;
    stage.guest.wait_redis(&stage.lab, SOON)
}

#[test]
fn a_guest_that_somebody_pauses_is_not_protected_until_it_is_resumed_and_stays_where_it_is() -> Result<()> {
    let mut stage = protected(QemuConfig::default())?;
    let at = Stamp::now();
    let mut monitor = Qmp::connect(&stage.lab)?;
    monitor.execute("stop")?;
    let status = wait_not_protected(&stage, "guest not running")?;
    // Longer than any timeout between the two hosts, and than a checkpoint that would wrongly resume it.
    sleep(Duration::from_secs(3));
    assert_eq!(
        monitor.status()?,
        "paused",
        "our checkpoints resumed it: {status}"
    );
    nobody_took_over(&stage, at);
    monitor.execute("cont")?;
    wait_protected(&stage)?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    nobody_took_over(&stage, at);
    let killed = stage.kill_primary()?;
    stage.wait_ack_after(killed.plus(Duration::from_millis(20)), SOON)?;
    stage.ensure_nothing_lost()
}

#[test]
fn a_guest_that_was_paused_when_its_host_died_goes_on_at_the_backup() -> Result<()> {
    let mut stage = protected(QemuConfig::default())?;
    Qmp::connect(&stage.lab)?.execute("stop")?;
    wait_not_protected(&stage, "guest not running")?;
    let killed = stage.kill_primary()?;
    stage.wait_ack_after(killed.plus(Duration::from_millis(20)), SOON)?;
    stage.ensure_nothing_lost()
}

#[test]
fn a_guest_that_is_reset_is_protected_anew_and_survives_its_host() -> Result<()> {
    let mut stage = protected(QemuConfig::default())?;
    let before = wait_protected(&stage)?;
    let at = Stamp::now();
    Qmp::connect(&stage.lab)?.execute("system_reset")?;
    let after = wait_status(&stage, "a new session", |status| {
        text(status, "state") == "protected" && text(status, "session") != text(&before, "session")
    })?;
    // The status may be quicker than the log, which is read from a file.
    let paired = stage.timeline.wait("paired", at, SOON);
    paired.with_context(|| format!("protected without pairing again: {after}"))?;
    nobody_took_over(&stage, at);
    // The guest boots; its old connections went with its memory.
    stage.guest.wait_redis(&stage.lab, SOON)?;
    wait_protected(&stage)?;
    survives_its_host(&mut stage)
}

type PoweredOff = (Stage, Stamp, Process, ExitStatus);

/// A protected guest that was told to power itself off; `None` when it did not.
fn powered_off(extra: &[String]) -> Result<Option<PoweredOff>> {
    let mut stage = protected(QemuConfig {
        extra: extra.to_vec(),
        ..QemuConfig::default()
    })?;
    let at = Stamp::now();
    trigger(&stage, 'o')?;
    let mut replicator = stage.replicator.take().ok_or_else(|| anyhow!("no replicator"))?;
    match replicator.wait(Duration::from_secs(20)) {
        Ok(ended) => Ok(Some((stage, at, replicator, ended))),
        Err(error) if Qmp::connect(&stage.lab)?.status()? == "running" => {
            println!("the guest did not power itself off: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[test]
fn a_guest_that_powers_off_ends_its_protection_and_is_never_taken_over() -> Result<()> {
    for extra in [vec![], vec!["-no-shutdown".to_owned()]] {
        // Debian's kernel sometimes spins in its own power-off under emulation: then there was none, and another guest is tried.
        let (stage, at, replicator, ended) = (0..3)
            .find_map(|_| powered_off(&extra).transpose())
            .ok_or_else(|| anyhow!("no guest powered itself off"))??;
        assert!(ended.success(), "{ended}: {}", replicator.tail());
        sleep(Duration::from_secs(2));
        nobody_took_over(&stage, at);
        let records = stage.lab.records()?;
        assert!(records.contains("Ended"), "the witness has: {records}");
    }
    Ok(())
}

/// What the agent says of its guest.
fn at_backup(stage: &Stage) -> Result<Value> {
    let status = stage.lab.status(Host::Backup)?;
    let vm = status.pointer("/vms/0").cloned();
    vm.ok_or_else(|| anyhow!("the agent knows no VM: {status}"))
}

/// A guest whose kernel panicked on the primary and which answers at the backup; `None` when the panic had begun before the
/// last checkpoint, and came back with it.
fn panicked() -> Result<Option<Stage>> {
    let stage = protected(QemuConfig {
        extra: ["-device", "pvpanic"].map(str::to_owned).to_vec(),
        // Without a word to the slow console, the panic is over in a part of an epoch.
        kernel_args: " unknown_nmi_panic loglevel=0".to_owned(),
        ..QemuConfig::default()
    })?;
    let at = Stamp::now();
    Qmp::connect(&stage.lab)?.execute("inject-nmi")?;
    let activated = stage.timeline.wait("activated", at, SOON)?;
    let answers = wait_for("an answer, or the guest's end", SOON, || {
        let answers = stage.client().ok()?.last_ack()? > activated.at;
        let ended = at_backup(&stage).is_ok_and(|vm| text(&vm, "standby") == "ended");
        (answers || ended).then_some(answers)
    })?;
    Ok(answers.then_some(stage))
}

#[test]
fn a_guest_whose_kernel_panics_goes_on_at_the_backup_from_before_the_panic() -> Result<()> {
    let mut stage = (0..5)
        .find_map(|_| panicked().transpose())
        .ok_or_else(|| anyhow!("every guest panicked again"))??;
    stage.ensure_nothing_lost()?;
    let vm = at_backup(&stage)?;
    let pid = vm.get("standby_pid").and_then(Value::as_i64);
    let pid = pid.ok_or_else(|| anyhow!("no guest runs: {vm}"))?;
    stage.lab.output(
        Host::Backup,
        &["kill".to_owned(), "-KILL".to_owned(), pid.to_string()],
    )?;
    wait_for("the guest's end to be told", SOON, || {
        let vm = at_backup(&stage).ok()?;
        (text(&vm, "standby") == "ended" && text(&vm, "detail").contains("signal: 9")).then_some(())
    })
}

#[test]
fn a_device_that_is_plugged_in_ends_the_protection_until_it_is_plugged_out() -> Result<()> {
    // The i440fx has slots for hot-plugging on its first bus.
    let mut stage = protected(QemuConfig {
        machine: "pc".to_owned(),
        ..QemuConfig::default()
    })?;
    let at = Stamp::now();
    let mut monitor = Qmp::connect(&stage.lab)?;
    monitor.execute_with("device_add", &json!({"driver": "virtio-rng-pci", "id": "second"}))?;
    wait_not_protected(&stage, "the standby has not loaded a checkpoint")?;
    let agent = wait_for("the agent's reason", SOON, || {
        let status = stage.lab.status(Host::Backup).ok()?.to_string();
        status.contains("virtio-rng").then_some(status)
    })?;
    assert!(agent.contains("could not load"), "{agent}");
    // The guest goes on meanwhile, as one without a backup does.
    stage.wait_ack_after(Stamp::now(), SOON)?;
    monitor.execute_with("device_del", &json!({"id": "second"}))?;
    wait_protected(&stage)?;
    nobody_took_over(&stage, at);
    let killed = stage.kill_primary()?;
    stage.wait_ack_after(killed.plus(Duration::from_millis(20)), SOON)?;
    stage.ensure_nothing_lost()
}
