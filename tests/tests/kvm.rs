//! Our own test VMM over KVM: the same promises as for QEMU, and the guest's own check of itself besides.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, anyhow};
use romulus_e2e::crowd::{Crowd, CrowdConfig};
use romulus_e2e::daemons::{AgentConfig, ProtectConfig};
use romulus_e2e::guest::TestbedConfig;
use romulus_e2e::scenario::{ScenarioConfig, survive};
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, Stamp, TEST_LAB, wait_for};
use rustix::process::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
/// Far beyond the limit of a pause.
const PAUSE_ENDS_AT_MOST: Duration = Duration::from_secs(5);
/// How the testbed ends when its guest has found something wrong in itself.
const SELF_CHECK_FAILED: i32 = 10;

fn stage_config(vcpus: u32, tracking: &str) -> StageConfig {
    let guest = TestbedConfig {
        vcpus,
        tracking: tracking.to_owned(),
        ..TestbedConfig::default().dirty_pages(400)
    };
    StageConfig {
        guest: guest.into(),
        agent: AgentConfig {
            verify_activation: true,
            ..AgentConfig::default()
        },
        ..StageConfig::default()
    }
}

#[test]
fn an_unprotected_kvm_guest_loses_nothing_and_is_seen_by_every_instrument() -> Result<()> {
    let config = StageConfig {
        without_daemons: true,
        ..stage_config(2, "")
    };
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
    let (from, ahead) = (Stamp::now(), stage.clock_ahead_us()?);
    sleep(Duration::from_secs(3));
    let (latency, requests) = stage.probe.quantiles(from, Stamp::now());
    assert!(requests > 50, "{requests} requests, {latency:?}");
    let drift = (stage.clock_ahead_us()? - ahead).abs();
    assert!(drift < 1_000_000, "its clock went wrong by {drift} us in 3 s");
    assert!(
        stage.guest.runs(&stage.lab)?,
        "its processors are not seen to run"
    );
    assert!(
        stage.from_primary.count_after(from) > 100,
        "the sniffer missed its frames"
    );
    assert_eq!(stage.from_backup.frames().len(), 0);
    stage.ensure_guest_is_whole()?;
    stage.ensure_nothing_lost()
}

#[test]
fn what_is_spoilt_in_the_guest_is_found_by_its_own_check() -> Result<()> {
    for what in ["byte", "register", "timer", "clock"] {
        let config = StageConfig {
            without_daemons: true,
            ..stage_config(1, "")
        };
        let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
        stage.ensure_guest_is_whole()?;
        stage.tell_guest(&["DAMAGE", what])?;
        let ended = stage.guest.process_mut().wait(SOON)?;
        assert_eq!(ended.code(), Some(SELF_CHECK_FAILED), "{what}: {ended}");
    }
    Ok(())
}

fn survives_its_host(vcpus: u32, tracking: &str) -> Result<()> {
    let config = ScenarioConfig {
        stage: stage_config(vcpus, tracking),
        before: Duration::from_secs(1),
        protected: Duration::from_secs(3),
        after: Duration::from_secs(2),
        ..ScenarioConfig::default()
    };
    let kill = survive(&Paths::here(), TEST_LAB, &config)?;
    println!(
        "survived: {} epochs, pause {:?}, outage {:?} ms, {} writes",
        kill.epochs, kill.pause_ms, kill.outage_ms, kill.acked_writes
    );
    Ok(())
}

#[test]
fn a_host_dies_and_the_clients_of_its_kvm_guest_lose_nothing() -> Result<()> {
    survives_its_host(1, "")
}

#[test]
fn a_guest_with_two_processors_survives_its_host() -> Result<()> {
    survives_its_host(2, "")
}

#[test]
fn a_guest_whose_writes_the_plain_log_tells_survives_its_host() -> Result<()> {
    survives_its_host(1, "log")
}

#[test]
fn a_guest_whose_writes_a_ring_tells_survives_its_host() -> Result<()> {
    survives_its_host(1, "ring")
}

/// Of the checkpoints of a while, the part that was put off because the guest was idle.
fn put_off(crowd: &Crowd) -> Result<f64> {
    let counts = || -> Result<(f64, f64)> {
        let status = crowd.status("web")?;
        let count = |field: &str| {
            status[field]
                .as_f64()
                .ok_or_else(|| anyhow!("no {field}: {status}"))
        };
        Ok((count("epochs")?, count("idle_epochs")?))
    };
    let before = counts()?;
    sleep(Duration::from_secs(3));
    let after = counts()?;
    let epochs = after.0 - before.0;
    anyhow::ensure!(epochs > 10.0, "{epochs} checkpoints in 3 s");
    Ok((after.1 - before.1) / epochs)
}

#[test]
fn an_idle_guest_is_left_alone_until_it_speaks() -> Result<()> {
    let config = CrowdConfig {
        dirty: "off".to_owned(),
        words: "check=off log=off".to_owned(),
        ..CrowdConfig::default()
    };
    let mut crowd = Crowd::raise(&Paths::here(), TEST_LAB, &["left"], config)?;
    crowd.add("left", "web", None)?;
    crowd.protect_all()?;
    sleep(Duration::from_secs(1));
    let idle = put_off(&crowd)?;
    // It answers more often than an epoch takes, so that each ends with output held.
    let probe = crowd.probe("web", Duration::from_millis(5), 1)?;
    sleep(Duration::from_secs(1));
    let from = Stamp::now();
    let busy = put_off(&crowd)?;
    let (latency, requests) = probe.quantiles(from, Stamp::now());
    println!("put off: {idle:.2} idle, {busy:.2} with {requests} requests, {latency:?}");
    assert!(requests > 10, "{requests} requests");
    assert!(idle > 0.5, "an idle guest is hardly left alone: {idle:.2}");
    assert!(busy < idle / 2.0, "one that speaks is: {busy:.2} of {idle:.2}");
    Ok(())
}

fn protected() -> Result<Stage> {
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &stage_config(1, ""))?;
    stage.protect(&ProtectConfig::default())?;
    sleep(Duration::from_secs(1));
    Ok(stage)
}

fn wait_state(stage: &Stage, state: &str) -> Result<()> {
    wait_for(&format!("the state {state}"), SOON, || {
        let status = stage.lab.status(Host::Primary).ok()?;
        (status.get("state").and_then(Value::as_str) == Some(state)).then_some(())
    })
}

/// Whatever happened, nothing that was acknowledged is lost, the connection lives, and the guest finds nothing wrong in itself.
fn all_is_well(stage: &mut Stage) -> Result<()> {
    stage.ensure_guest_is_whole()?;
    stage.ensure_nothing_lost()?;
    let audit = stage.audit();
    assert_eq!(audit.uncommitted_frames, 0, "{audit:?}");
    assert!(
        audit.gated_frames > 0,
        "nothing was seen to leave through the gate"
    );
    Ok(())
}

fn replicator_gone(signal: Signal) -> Result<()> {
    let mut stage = protected()?;
    let at = Stamp::now();
    replicator_of(&stage)?.signal(signal)?;
    let activated = stage.timeline.wait("activated", at, SOON)?;
    // A checkpoint may have been under way: its pause ends at its limit, whatever became of the replicator.
    wait_for("the old guest to run", PAUSE_ENDS_AT_MOST, || {
        stage.guest.runs(&stage.lab).ok()?.then_some(())
    })?;
    stage.wait_ack_after(activated.at, SOON)?;
    if signal == Signal::STOP {
        // It wakes up in a world that has moved on, and must not speak.
        replicator_of(&stage)?.signal(Signal::CONT).ok();
    }
    sleep(Duration::from_secs(3));
    assert_eq!(
        stage.from_primary.count_after(activated.at),
        0,
        "the old primary spoke after the takeover"
    );
    all_is_well(&mut stage)
}

fn replicator_of(stage: &Stage) -> Result<&romulus_e2e::Process> {
    stage.replicator.as_ref().ok_or_else(|| anyhow!("no replicator"))
}

#[test]
fn when_the_replicator_dies_the_old_kvm_guest_is_mute_but_not_paused() -> Result<()> {
    replicator_gone(Signal::KILL)
}

#[test]
fn when_the_replicator_is_stopped_the_old_kvm_guest_is_mute_but_not_paused() -> Result<()> {
    replicator_gone(Signal::STOP)
}

#[test]
fn when_the_agent_dies_the_kvm_guest_stays_and_is_protected_again_once_there_is_an_agent() -> Result<()> {
    let mut stage = protected()?;
    let at = Stamp::now();
    stage.agent.take().ok_or_else(|| anyhow!("no agent"))?.kill();
    wait_state(&stage, "not_protected")?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    assert!(stage.guest.runs(&stage.lab)?, "the guest is left paused");
    stage.start_agent(&AgentConfig::default())?;
    wait_state(&stage, "protected")?;
    assert_eq!(
        stage.from_backup.count_after(at),
        0,
        "a dead agent's host spoke for the guest"
    );
    all_is_well(&mut stage)
}

#[test]
fn epochs_of_a_kvm_guest_are_steered_to_a_goal_while_it_is_protected() -> Result<()> {
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &stage_config(1, ""))?;
    stage.protect(&ProtectConfig {
        extra: ["--epoch", "auto"].map(str::to_owned).to_vec(),
        ..ProtectConfig::default()
    })?;
    wait_for("the goal to be judged", SOON, || {
        let status = stage.lab.status(Host::Primary).ok()?;
        status["epoch_goal_reached"].as_bool()
    })?;
    let status = stage.lab.status(Host::Primary)?;
    let length_ms = status["epoch_ms"].as_f64().unwrap_or(0.0);
    assert!((5.0..=100.0).contains(&length_ms), "{status}");
    wait_state(&stage, "protected")?;
    all_is_well(&mut stage)
}

#[test]
fn a_kvm_guest_that_powers_off_ends_its_protection_and_is_never_taken_over() -> Result<()> {
    let mut stage = protected()?;
    let at = Stamp::now();
    stage.tell_guest(&["SHUTDOWN"])?;
    let mut replicator = stage.replicator.take().ok_or_else(|| anyhow!("no replicator"))?;
    let ended = replicator.wait(SOON)?;
    assert!(ended.success(), "{ended}: {}", replicator.tail());
    sleep(Duration::from_secs(2));
    assert!(
        stage.timeline.first("activated", at).is_none(),
        "the backup took over"
    );
    let records = stage.lab.records()?;
    assert!(records.contains("Ended"), "the witness has: {records}");
    Ok(())
}

#[test]
fn a_kvm_guest_that_is_reset_is_protected_anew_and_survives_its_host() -> Result<()> {
    let mut stage = protected()?;
    let at = Stamp::now();
    stage.tell_guest(&["REBOOT"])?;
    stage.timeline.wait("paired", at, SOON)?;
    wait_state(&stage, "protected")?;
    assert!(
        stage.timeline.first("activated", at).is_none(),
        "the backup took over"
    );
    let killed = stage.kill_primary()?;
    stage.timeline.wait("activated", killed, SOON)?;
    stage.guest.wait_redis(&stage.lab, SOON)?;
    stage.ensure_guest_is_whole()
}

#[test]
fn a_kvm_guest_that_panics_goes_on_at_the_backup_from_before_the_panic() -> Result<()> {
    let mut stage = protected()?;
    let at = Stamp::now();
    stage.tell_guest(&["CRASH"])?;
    let activated = stage.timeline.wait("activated", at, SOON)?;
    // What made it panic was never acknowledged, so it comes once more; what became of the client is the guest's business.
    assert!(
        stage
            .guest
            .process_mut()
            .wait(SOON)?
            .code()
            .is_some_and(|code| code != 0)
    );
    assert!(activated.at > at);
    Ok(())
}

#[test]
fn a_planned_failover_moves_the_kvm_guest_and_loses_nothing() -> Result<()> {
    let mut stage = protected()?;
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
    all_is_well(&mut stage)
}
