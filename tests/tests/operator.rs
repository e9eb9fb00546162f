//! What an operator does on purpose, and what is refused.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, anyhow};
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::guest::{Guest, QemuConfig};
use romulus_e2e::qmp::Qmp;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, Stamp, TEST_LAB, wait_for};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

fn stage() -> Result<Stage> {
    let guest = QemuConfig {
        workload: "redis,dirty:300:25".to_owned(),
        ..QemuConfig::default()
    };
    Stage::raise(
        &Paths::here(),
        TEST_LAB,
        &StageConfig {
            guest: guest.into(),
            ..StageConfig::default()
        },
    )
}

#[test]
fn a_planned_failover_moves_the_guest_and_loses_nothing() -> Result<()> {
    let mut stage = stage()?;
    stage.protect(&ProtectConfig::default())?;
    sleep(Duration::from_secs(1));
    let at = Stamp::now();
    stage.lab.romulus(Host::Primary, &["failover"])?;
    let activated = stage.timeline.wait("activated", at, SOON)?;
    stage.wait_ack_after(activated.at, SOON)?;
    sleep(Duration::from_secs(2));
    assert_eq!(
        stage.from_primary.count_after(activated.at),
        0,
        "the old primary spoke after the failover"
    );
    stage.ensure_nothing_lost()
}

#[test]
fn an_operator_forces_the_backup_when_the_witness_is_gone_and_may_run_says_who_runs_the_vm() -> Result<()> {
    let mut stage = stage()?;
    stage.protect(&ProtectConfig::default())?;
    for host in [Host::Primary, Host::Backup] {
        assert_eq!(
            stage.lab.may_run(host)?,
            "must_not_run",
            "{host:?}: they are a pair"
        );
    }
    stage.witness.take().ok_or_else(|| anyhow!("no witness"))?.kill();
    assert_eq!(stage.lab.may_run(Host::Primary)?, "unknown");
    let killed = stage.kill_primary()?;
    sleep(Duration::from_secs(2));
    assert!(
        stage.timeline.first("activated", killed).is_none(),
        "nobody had allowed it"
    );
    // It answers when the guest runs.
    stage
        .lab
        .romulus(Host::Backup, &["failover", "--force", "--fenced"])?;
    let activated = stage.timeline.wait("activated", killed, SOON)?;
    stage.wait_ack_after(activated.at, SOON)?;
    stage.witness = Some(stage.lab.start_witness()?);
    wait_for("the witness to learn of it", SOON, || {
        (stage.lab.may_run(Host::Backup).ok()? == "may_run").then_some(())
    })?;
    assert_eq!(stage.lab.may_run(Host::Primary)?, "must_not_run");
    stage.ensure_nothing_lost()
}

#[test]
fn a_failover_that_an_agent_refuses_says_why() -> Result<()> {
    let mut stage = stage()?;
    stage.protect(&ProtectConfig::default())?;
    let at = Stamp::now();
    let refused = stage
        .lab
        .romulus(Host::Backup, &["failover", "--force", "--fenced"])
        .expect_err("a protected VM has nothing to force");
    assert!(format!("{refused:#}").contains("protected"), "{refused:#}");
    assert!(stage.timeline.first("activated", at).is_none(), "it took over");
    stage.wait_ack_after(Stamp::now(), SOON)?;
    stage.ensure_nothing_lost()
}

#[test]
fn a_vm_that_another_host_protects_is_refused() -> Result<()> {
    let mut stage = stage()?;
    stage.protect(&ProtectConfig::default())?;
    let at = Stamp::now();
    stage.kill_primary()?;
    stage.timeline.wait("activated", at, SOON)?;
    let status: Value = stage.lab.status(Host::Backup)?;
    assert!(status.to_string().contains("demo"), "{status}");
    // The dead host comes back, boots the guest from its disk, and is told that it must not.
    let mut guest = Guest::start(
        &stage.lab,
        &QemuConfig {
            second_monitor: true,
            ..QemuConfig::default()
        }
        .into(),
    )?;
    guest.wait_ready(SOON)?;
    let mut replicator = stage.lab.start_replicator(&ProtectConfig::default())?;
    let ended = replicator.wait(SOON)?;
    let (at, said) = (Stamp::now(), replicator.tail());
    assert_ne!(
        Qmp::connect(&stage.lab)?.status()?,
        "running",
        "two hosts run the guest: {said}"
    );
    sleep(Duration::from_secs(1));
    assert_eq!(
        stage.from_primary.count_after(at),
        0,
        "two hosts speak for the guest: {said}"
    );
    // That it ended for want of a monitor would prove nothing.
    assert!(said.contains("another host speaks"), "{said}");
    assert!(!ended.success(), "it ended as if all were well ({ended}): {said}");
    Ok(())
}
