//! The main job: a host dies under load, and its clients notice a stall and nothing else.

use std::time::Duration;

use anyhow::{Result, anyhow};
use romulus_e2e::daemons::{AgentConfig, Fault, ProtectConfig};
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::scenario::{ScenarioConfig, survive};
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, TEST_LAB, wait_for};
use rustix::process::{Pid, Signal, kill_process};

const SOON: Duration = Duration::from_secs(60);

fn loaded() -> QemuConfig {
    QemuConfig {
        workload: "redis,dirty:400:25".to_owned(),
        ..QemuConfig::default()
    }
}

#[test]
fn a_host_dies_and_its_clients_lose_nothing() -> Result<()> {
    let config = ScenarioConfig {
        stage: StageConfig {
            guest: loaded().into(),
            ..StageConfig::default()
        },
        before: Duration::from_secs(1),
        protected: Duration::from_secs(3),
        after: Duration::from_secs(2),
        ..ScenarioConfig::default()
    };
    survive(&Paths::here(), TEST_LAB, &config).map(drop)
}

#[test]
fn a_standby_that_dies_at_the_moment_of_its_activation_is_replaced() -> Result<()> {
    let mut stage = Stage::raise(
        &Paths::here(),
        TEST_LAB,
        &StageConfig {
            guest: loaded().into(),
            without_daemons: true,
            ..StageConfig::default()
        },
    )?;
    let from = stage.lab.run_path("fault-from");
    stage.lab.init_pki()?;
    stage.witness = Some(stage.lab.start_witness()?);
    let agent = stage.lab.start_agent_with(&AgentConfig {
        fault: Some(Fault {
            place: "standby.in_stream:sigstop".to_owned(),
            from: Some(from.clone()),
        }),
        ..AgentConfig::default()
    })?;
    stage.timeline.follow("backup", agent.log());
    stage.agent = Some(agent);
    stage.protect(&ProtectConfig::default())?;
    let status = stage.lab.status(Host::Backup)?;
    let standby = status["vms"][0]["standby_pid"].as_i64();
    let standby = standby.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let standby = standby.ok_or_else(|| anyhow!("no standby waits: {status}"))?;

    // From now on the trial is over: the next stream is the activation's.
    std::fs::write(&from, "")?;
    let killed = stage.kill_primary()?;
    let agent = stage.agent.as_ref().ok_or_else(|| anyhow!("no agent"))?;
    wait_for("the agent to stop in the activation", SOON, || {
        let log = std::fs::read_to_string(agent.log()).ok()?;
        log.contains("struck at standby.in_stream").then_some(())
    })?;
    kill_process(standby, Signal::KILL)?;
    agent.signal(Signal::CONT)?;

    stage.timeline.wait("activation_retry", killed, SOON)?;
    let activated = stage.timeline.wait("activated", killed, SOON)?;
    stage.wait_ack_after(activated.at, SOON)?;
    stage.ensure_nothing_lost()?;
    Ok(())
}
