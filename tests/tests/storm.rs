//! Strangers that beset the agent and the witness from another host, while a guest is protected by both.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use romulus_e2e::daemons::{AgentConfig, ProtectConfig};
use romulus_e2e::guest::TestbedConfig;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::strangers::Storm;
use romulus_e2e::{Host, Paths, Process, TEST_LAB, wait_for};
use serde_json::Value;

/// For a daemon to answer in, on a busy machine.
const BETWEEN_BATCHES: Duration = Duration::from_millis(50);
/// To both daemons together.
const CONNECTIONS: u32 = 10_000;
/// What strangers may cost a daemon, as docs/src/limits.md has it for the default of `network.handshakes_max`.
const STRANGERS_BYTES_MAX: u64 = 16 << 20;
/// No takeover because this machine has no time for a daemon.
const PATIENT: [&str; 2] = ["--suspicion-timeout", "50s"];
const SOON: Duration = Duration::from_secs(60);

/// What it takes now, from where its peak is counted anew.
fn forget_peak(process: &Process) -> Result<u64> {
    let pid = process.pid()?.as_raw_nonzero();
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
    peak_bytes(process)
}

fn peak_bytes(process: &Process) -> Result<u64> {
    let pid = process.pid()?.as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib.context("no peak")?.trim().parse::<u64>()? << 10)
}

fn daemons(stage: &Stage) -> Result<[&Process; 2]> {
    let there = (stage.agent.as_ref(), stage.witness.as_ref());
    let (Some(agent), Some(witness)) = there else {
        anyhow::bail!("a daemon is missing")
    };
    Ok([agent, witness])
}

fn storm(stage: &Stage) -> Result<usize> {
    let mut begun = 0;
    for (daemon, service) in [
        ((Host::Backup, 7700), b"romulus-pair/1".as_slice()),
        ((Host::Witness, 7701), b"romulus-witness/1".as_slice()),
    ] {
        let storm = Storm::gather(&stage.lab, daemon, service, CONNECTIONS / 2)?;
        let blown = storm.blow(&stage.lab, BETWEEN_BATCHES)?;
        blown.ensure_arrived()?;
        begun += blown.begun;
    }
    Ok(begun)
}

fn committed(status: &Value) -> u64 {
    status["committed"].as_u64().unwrap_or(0)
}

#[test]
fn ten_thousand_strangers_end_no_protection_and_cost_the_daemons_no_memory() -> Result<()> {
    let extra: Vec<String> = PATIENT.map(str::to_owned).to_vec();
    let guest = TestbedConfig::default().dirty_pages(200);
    let config = StageConfig {
        guest: guest.into(),
        agent: AgentConfig {
            extra: extra.clone(),
            ..AgentConfig::default()
        },
        ..StageConfig::default()
    };
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
    stage.protect(&ProtectConfig {
        extra,
        ..ProtectConfig::default()
    })?;
    // So many that the figures below say something.
    let before = wait_for("a hundred commits", SOON, || {
        let status = stage.lab.status(Host::Primary).ok()?;
        (committed(&status) > 100).then_some(status)
    })?;
    let agent_before = stage.lab.status(Host::Backup)?;
    let [agent, witness] = daemons(&stage)?;
    let memory = [forget_peak(agent)?, forget_peak(witness)?];

    let begun = storm(&stage)?;
    ensure!(begun == CONNECTIONS as usize, "{begun}");

    // It commits on, in the very session that it had.
    let at = committed(&stage.lab.status(Host::Primary)?);
    let after = wait_for("further commits", SOON, || {
        let status = stage.lab.status(Host::Primary).ok()?;
        (committed(&status) > at + 10).then_some(status)
    })?;
    ensure!(
        after["session"] == before["session"],
        "the session ended: {before} {after}"
    );
    ensure!(after["state"] == "protected", "{after}");
    let agent = stage.lab.status(Host::Backup)?;
    ensure!(
        agent["handshakes"]["accepted"] == agent_before["handshakes"]["accepted"],
        "a stranger got in: {agent}"
    );
    ensure!(agent["vms"][0]["refused_input"] == 0, "{agent}");
    let mut grown = Vec::new();
    for (daemon, before) in daemons(&stage)?.into_iter().zip(memory) {
        let growth = peak_bytes(daemon)?.saturating_sub(before);
        ensure!(
            growth < STRANGERS_BYTES_MAX,
            "{} grew by {growth} bytes",
            daemon.name()
        );
        grown.push(format!("{} by {} KiB", daemon.name(), growth >> 10));
    }
    println!(
        "{begun} strangers: {}; epochs on time {} before, {} after; {}",
        grown.join(", "),
        before["epoch_on_time_ratio"],
        after["epoch_on_time_ratio"],
        agent["handshakes"]
    );
    stage.ensure_guest_is_whole()?;
    stage.ensure_nothing_lost()
}
