//! What an operator does on purpose, and what is refused.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, anyhow};
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::guest::{Guest, GuestConfig};
use romulus_e2e::qmp::Qmp;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Lab, Paths, Stamp, TAP, TEST_LAB};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

fn stage() -> Result<Stage> {
    let guest = GuestConfig {
        workload: "redis,dirty:300:25".to_owned(),
        ..GuestConfig::default()
    };
    Stage::raise(
        &Paths::here(),
        TEST_LAB,
        &StageConfig {
            guest,
            ..StageConfig::default()
        },
    )
}

fn nothing_lost(stage: &mut Stage) -> Result<()> {
    let report = stage.finish_client()?;
    assert_eq!(
        (report.lost, report.resets, report.refused),
        (0, 0, 0),
        "{:?}",
        report.trouble
    );
    Ok(())
}

fn argv(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn unprotecting_leaves_no_trace_and_the_guest_can_be_protected_again() -> Result<()> {
    let mut stage = stage()?;
    let filters = |stage: &Stage| {
        let words = argv(&["tc", "filter", "show", "dev", TAP, "ingress"]);
        stage.lab.output(Host::Primary, &words)
    };
    for register in [true, false] {
        stage.protect(&ProtectConfig {
            register,
            ..ProtectConfig::default()
        })?;
        assert!(!filters(&stage)?.trim().is_empty(), "protected without a gate");
        sleep(Duration::from_secs(1));
        stage.lab.romulus(Host::Primary, &["unprotect"])?;
        let mut replicator = stage.replicator.take().ok_or_else(|| anyhow!("no replicator"))?;
        assert!(replicator.wait(SOON)?.success(), "{}", replicator.tail());
        assert!(
            filters(&stage)?.trim().is_empty(),
            "a filter was left: {}",
            filters(&stage)?
        );
        stage.wait_ack_after(Stamp::now(), SOON)?;
    }
    nothing_lost(&mut stage)
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
    nothing_lost(&mut stage)
}

/// Tries to protect a guest that cannot be, and returns what the replicator says before it ends.
fn refusal(guest: &GuestConfig, protect: &ProtectConfig) -> Result<String> {
    let lab = Lab::new(Paths::here(), TEST_LAB)?;
    let mut running = Guest::start(&lab, guest)?;
    lab.init_pki()?;
    let _witness = lab.start_witness()?;
    let _agent = lab.start_agent()?;
    running.wait_redis(&lab, SOON)?;
    let mut replicator = lab.start_replicator(protect)?;
    let status = replicator.wait(SOON)?;
    assert!(!status.success(), "it was not refused");
    // Whoever is refused must not have hurt the guest.
    running.wait_redis(&lab, Duration::from_secs(5))?;
    Ok(replicator.tail())
}

#[test]
fn a_channel_without_a_gate_is_refused_by_name() -> Result<()> {
    let said = refusal(
        &GuestConfig::default(),
        &ProtectConfig {
            disposable: Vec::new(),
            ..ProtectConfig::default()
        },
    )?;
    assert!(
        said.contains("\"console\"") && said.contains("disposable"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_slirp_network_is_refused_by_name() -> Result<()> {
    let extra = argv(&[
        "-netdev",
        "user,id=slirp0",
        "-device",
        "virtio-net-pci,netdev=slirp0",
    ]);
    let said = refusal(
        &GuestConfig {
            extra,
            ..GuestConfig::default()
        },
        &ProtectConfig::default(),
    )?;
    assert!(said.contains("slirp0"), "{said}");
    Ok(())
}

#[test]
fn a_writable_disk_is_refused_by_name() -> Result<()> {
    let extra = argv(&[
        "-drive",
        "driver=null-co,size=1M,if=none,id=disk0",
        "-device",
        "virtio-blk-pci,drive=disk0",
    ]);
    let said = refusal(
        &GuestConfig {
            extra,
            ..GuestConfig::default()
        },
        &ProtectConfig::default(),
    )?;
    assert!(said.contains("disk0"), "{said}");
    Ok(())
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
        &GuestConfig {
            second_monitor: true,
            ..GuestConfig::default()
        },
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
