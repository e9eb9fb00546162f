//! Backup and witness are both gone: the primary is mute, suspends its guest after `mute_limit`, and goes on by the record.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::qmp::Qmp;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, Stamp, TEST_LAB, wait_for};
use rustix::process::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// A protected guest whose replicator suspends it after two seconds of silence.
fn protected() -> Result<(Stage, ProtectConfig)> {
    let guest = QemuConfig {
        workload: "redis,dirty:200:25".to_owned(),
        second_monitor: true,
        ..QemuConfig::default()
    };
    let config = StageConfig {
        guest: guest.into(),
        ..StageConfig::default()
    };
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
    let settings = stage.lab.run_path("replicator.toml");
    fs::write(&settings, "[failover]\nmute_limit = \"2s\"\n").context("cannot write the settings")?;
    let protect = ProtectConfig {
        extra: vec!["--config".to_owned(), settings.display().to_string()],
        ..ProtectConfig::default()
    };
    stage.protect(&protect)?;
    sleep(Duration::from_secs(1));
    Ok((stage, protect))
}

fn wait_guest(monitor: &mut Qmp, state: &str) -> Result<()> {
    wait_for(&format!("the guest to be {state}"), SOON, || {
        (monitor.status().ok()? == state).then_some(())
    })
}

fn wait_protected(stage: &Stage) -> Result<()> {
    wait_for("protection", SOON, || {
        let status = stage.lab.status(Host::Primary).ok()?;
        (status.get("state").and_then(Value::as_str) == Some("protected")).then_some(())
    })
}

/// Agent and witness die at once; returns when nothing of the guest can be on its way any more.
fn silence(stage: &mut Stage) -> Result<Stamp> {
    let mut agent = stage.agent.take().ok_or_else(|| anyhow!("no agent"))?;
    let mut witness = stage.witness.take().ok_or_else(|| anyhow!("no witness"))?;
    agent.kill();
    witness.kill();
    sleep(Duration::from_millis(500));
    Ok(Stamp::now())
}

fn nothing_lost(stage: &mut Stage, since: Stamp) -> Result<()> {
    assert_eq!(
        stage.from_backup.count_after(since),
        0,
        "the backup spoke for the guest"
    );
    stage.ensure_nothing_lost()
}

#[test]
fn a_guest_that_is_mute_for_too_long_is_suspended_and_goes_on_when_the_witness_is_back() -> Result<()> {
    let (mut stage, _) = protected()?;
    let mut monitor = Qmp::connect(&stage.lab)?;
    let mute = silence(&mut stage)?;
    wait_guest(&mut monitor, "paused")?;
    let status = stage.lab.status(Host::Primary)?;
    assert_eq!(
        status.get("reason").and_then(Value::as_str),
        Some("witness unreachable"),
        "{status}"
    );
    // Longer than the limit of a pause: whoever suspended it lives, and that is enough.
    sleep(Duration::from_secs(3));
    assert_eq!(monitor.status()?, "paused");
    assert_eq!(stage.from_primary.count_after(mute), 0, "it spoke without leave");
    stage.witness = Some(stage.lab.start_witness()?);
    wait_guest(&mut monitor, "running")?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    stage.agent = Some(stage.lab.start_agent()?);
    wait_protected(&stage)?;
    nothing_lost(&mut stage, mute)
}

/// The suspended guest's replicator is gone, too: the guest runs on, mute, and the next replicator asks.
fn suspended_and_left(signal: Signal) -> Result<()> {
    let (mut stage, protect) = protected()?;
    let mut monitor = Qmp::connect(&stage.lab)?;
    let mute = silence(&mut stage)?;
    wait_guest(&mut monitor, "paused")?;
    let mut replicator = stage.replicator.take().ok_or_else(|| anyhow!("no replicator"))?;
    replicator.signal(signal)?;
    wait_guest(&mut monitor, "running")?;
    // One that was stopped was killed for it.
    replicator.wait(SOON)?;
    sleep(Duration::from_secs(1));
    assert_eq!(monitor.status()?, "running");
    assert_eq!(stage.from_primary.count_after(mute), 0, "it spoke without leave");
    stage.witness = Some(stage.lab.start_witness()?);
    let again = ProtectConfig {
        register: false,
        ..protect
    };
    stage.replicator = Some(stage.lab.start_replicator(&again)?);
    stage.wait_ack_after(Stamp::now(), SOON)?;
    stage.agent = Some(stage.lab.start_agent()?);
    wait_protected(&stage)?;
    nothing_lost(&mut stage, mute)
}

#[test]
fn a_suspended_guest_runs_on_mute_when_its_replicator_is_killed_and_speaks_by_the_record() -> Result<()> {
    suspended_and_left(Signal::KILL)
}

#[test]
fn a_suspended_guest_runs_on_mute_when_its_replicator_is_stopped_and_speaks_by_the_record() -> Result<()> {
    suspended_and_left(Signal::STOP)
}
