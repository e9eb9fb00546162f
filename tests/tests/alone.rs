//! One process dies or hangs, and the others go on.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, anyhow};
use romulus_e2e::daemons::{AgentConfig, ProtectConfig};
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::qmp::Qmp;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::timeline::Event;
use romulus_e2e::{Host, Paths, Stamp, TEST_LAB, wait_for};
use rustix::process::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

fn protected_stage() -> Result<Stage> {
    let guest = QemuConfig {
        workload: "redis,dirty:300:25".to_owned(),
        second_monitor: true,
        ..QemuConfig::default()
    };
    let mut stage = Stage::raise(
        &Paths::here(),
        TEST_LAB,
        &StageConfig {
            guest: guest.into(),
            ..StageConfig::default()
        },
    )?;
    stage.protect(&ProtectConfig::default())?;
    sleep(Duration::from_secs(1));
    Ok(stage)
}

/// Whatever happened, nothing that was acknowledged is lost and the connection lives.
fn nothing_lost(stage: &mut Stage) -> Result<()> {
    stage.ensure_nothing_lost()?;
    let audit = stage.audit();
    assert_eq!(audit.uncommitted_frames, 0, "{audit:?}");
    assert!(
        audit.gated_frames > 0,
        "nothing was seen to leave through the gate"
    );
    Ok(())
}

fn detail(event: &Event, name: &str) -> Result<u64> {
    let value = event
        .detail
        .split(' ')
        .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
        .ok_or_else(|| anyhow!("no {name} in {}", event.detail))?;
    Ok(value.parse()?)
}

fn wait_state(stage: &Stage, state: &str) -> Result<Value> {
    let mut last = Value::Null;
    wait_for(&format!("the state {state}"), SOON, || {
        last = stage.lab.status(Host::Primary).ok()?;
        (last.get("state").and_then(Value::as_str) == Some(state)).then(|| last.clone())
    })
}

fn wait_guest_runs(stage: &Stage) -> Result<()> {
    let mut monitor = Qmp::connect(&stage.lab)?;
    // A checkpoint may be under way; one that nobody ends must not stay.
    wait_for("the guest to run", Duration::from_secs(5), || {
        (monitor.status().ok()? == "running").then_some(())
    })
}

#[test]
fn when_the_replicator_dies_the_backup_takes_over_and_the_old_guest_is_mute_but_not_paused() -> Result<()> {
    replicator_gone(Signal::KILL)
}

#[test]
fn when_the_replicator_is_stopped_the_backup_takes_over_and_the_old_guest_is_mute_but_not_paused()
-> Result<()> {
    replicator_gone(Signal::STOP)
}

fn replicator_gone(signal: Signal) -> Result<()> {
    let mut stage = protected_stage()?;
    let replicator = stage
        .replicator
        .as_ref()
        .ok_or_else(|| anyhow!("no replicator"))?;
    let at = Stamp::now();
    replicator.signal(signal)?;
    let activated = stage.timeline.wait("activated", at, SOON)?;
    wait_guest_runs(&stage)?;
    stage.wait_ack_after(activated.at, SOON)?;
    if signal == Signal::STOP {
        // It wakes up in a world that has moved on, and must not speak.
        stage
            .replicator
            .as_ref()
            .ok_or_else(|| anyhow!("no replicator"))?
            .signal(Signal::CONT)
            .ok();
    }
    sleep(Duration::from_secs(3));
    assert_eq!(
        stage.from_primary.count_after(activated.at),
        0,
        "the old primary spoke after the takeover"
    );
    nothing_lost(&mut stage)
}

#[test]
fn when_the_agent_dies_the_guest_stays_and_is_protected_again_once_there_is_an_agent() -> Result<()> {
    let mut stage = protected_stage()?;
    let at = Stamp::now();
    stage.agent.take().ok_or_else(|| anyhow!("no agent"))?.kill();
    wait_state(&stage, "not_protected")?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    wait_guest_runs(&stage)?;
    assert_eq!(
        stage.from_backup.count_after(at),
        0,
        "a dead agent's host spoke for the guest"
    );
    stage.start_agent(&AgentConfig::default())?;
    wait_state(&stage, "protected")?;
    let copied = stage.timeline.wait("first_copy_sent", at, SOON)?;
    println!("the second first copy: {}", copied.detail);
    let (sent, held) = (detail(&copied, "sent_pages")?, detail(&copied, "held_pages")?);
    assert!(
        held > 1000 && sent < held / 2,
        "sent {sent} pages to an agent that held {held}"
    );
    nothing_lost(&mut stage)
}

#[test]
fn when_the_agent_is_stopped_the_guest_stays_and_is_protected_again_once_it_goes_on() -> Result<()> {
    let mut stage = protected_stage()?;
    let at = Stamp::now();
    let agent = stage.agent.as_ref().ok_or_else(|| anyhow!("no agent"))?;
    agent.signal(Signal::STOP)?;
    wait_state(&stage, "not_protected")?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    agent.signal(Signal::CONT)?;
    wait_state(&stage, "protected")?;
    assert_eq!(
        stage.from_backup.count_after(at),
        0,
        "two hosts spoke for the guest"
    );
    nothing_lost(&mut stage)
}

#[test]
fn when_the_witness_dies_or_is_stopped_nothing_changes() -> Result<()> {
    let mut stage = protected_stage()?;
    let at = Stamp::now();
    let witness = stage.witness.as_ref().ok_or_else(|| anyhow!("no witness"))?;
    witness.signal(Signal::STOP)?;
    sleep(Duration::from_secs(2));
    witness.signal(Signal::CONT)?;
    stage.witness.take().ok_or_else(|| anyhow!("no witness"))?.kill();
    sleep(Duration::from_secs(2));
    let status = stage.lab.status(Host::Primary)?;
    assert_eq!(
        status.get("state").and_then(Value::as_str),
        Some("protected"),
        "{status}"
    );
    stage.witness = Some(stage.lab.start_witness()?);
    stage.wait_ack_after(Stamp::now(), SOON)?;
    assert!(
        stage.timeline.first("activated", at).is_none(),
        "the backup took over"
    );
    assert_eq!(
        stage.from_backup.count_after(at),
        0,
        "two hosts spoke for the guest"
    );
    nothing_lost(&mut stage)
}

#[test]
fn a_cut_link_of_the_backup_leaves_the_guest_where_it_is() -> Result<()> {
    let mut stage = protected_stage()?;
    let at = Stamp::now();
    stage.lab.net.set_cable(Host::Backup, false)?;
    wait_state(&stage, "not_protected")?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    stage.lab.net.set_cable(Host::Backup, true)?;
    wait_state(&stage, "protected")?;
    assert_eq!(
        stage.from_backup.count_after(at),
        0,
        "two hosts spoke for the guest"
    );
    nothing_lost(&mut stage)
}

#[test]
fn a_cut_link_of_the_primary_moves_the_guest_and_the_old_one_stays_mute_when_it_heals() -> Result<()> {
    let mut stage = protected_stage()?;
    let at = Stamp::now();
    stage.lab.net.set_cable(Host::Primary, false)?;
    let activated = stage.timeline.wait("activated", at, SOON)?;
    stage.wait_ack_after(activated.at, SOON)?;
    let healed = Stamp::now();
    stage.lab.net.set_cable(Host::Primary, true)?;
    sleep(Duration::from_secs(5));
    assert_eq!(
        stage.from_primary.count_after(healed),
        0,
        "the old primary spoke after the link healed"
    );
    nothing_lost(&mut stage)
}
