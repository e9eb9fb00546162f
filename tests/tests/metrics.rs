//! What the daemons show to those who watch them, while they protect a guest and when its host is lost.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::dashboard::Dashboard;
use romulus_e2e::guest::TestbedConfig;
use romulus_e2e::prometheus::Prometheus;
use romulus_e2e::scrape::Scrape;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, Stamp, TEST_LAB, wait_for};
use romulus_telemetry::catalogue::{BACKUP_AGENT, Definition, Kind, REPLICATOR, WITNESS};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
const AGENT: (Host, u16) = (Host::Backup, 7700);
const WITNESS_AT: (Host, u16) = (Host::Witness, 7701);
const REPLICATOR_AT: (Host, u16) = (Host::Primary, 7702);
const VM: &str = "vm=\"demo\"";

fn promtool(arguments: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("promtool is missing: `cargo xtask setup` installs it")?;
    let mut stdin = child.stdin.take().context("it has an input")?;
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let done = child.wait_with_output()?;
    let said = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    ensure!(
        done.status.success(),
        "promtool {arguments:?}: {} {}\n{input}",
        said[0],
        said[1]
    );
    Ok(())
}

/// Nothing of the catalogue is missing in what the daemon really shows, and Prometheus' own tool finds no fault with it.
fn ensure_complete(scrape: &Scrape, catalogue: &[&Definition]) -> Result<()> {
    for definition in catalogue {
        let mut name = definition.full_name();
        if definition.kind == Kind::Histogram {
            name.push_str("_count");
        }
        let shown = scrape.samples.iter().any(|sample| sample.name == name);
        ensure!(shown, "{name} is not in\n{}", scrape.text);
    }
    promtool(&["check", "metrics"], &scrape.text)
}

fn number(status: &Value, path: &str) -> Result<f64> {
    let found = status.pointer(path).and_then(Value::as_f64);
    found.with_context(|| format!("no {path} in {status}"))
}

/// What grows lies between the status before and the one after.
fn ensure_between(scraped: f64, before: f64, after: f64, what: &str) -> Result<()> {
    ensure!(
        before <= scraped && scraped <= after,
        "{what}: {scraped} in the metrics, {before} to {after} in the status"
    );
    Ok(())
}

fn status_of(stage: &Stage, host: Host) -> Result<Value> {
    let status = stage.lab.status(host)?;
    Ok(match host {
        Host::Backup => status["vms"][0].clone(),
        _ => status,
    })
}

fn ensure_replicator(stage: &Stage) -> Result<()> {
    let before = status_of(stage, Host::Primary)?;
    let scrape = stage.lab.scrape(REPLICATOR_AT.0, REPLICATOR_AT.1)?;
    let after = status_of(stage, Host::Primary)?;
    ensure_complete(&scrape, REPLICATOR)?;
    for (name, path) in [
        ("romulus_epochs_total", "/epochs"),
        ("romulus_page_bytes_total", "/page_bytes"),
        ("romulus_committed_epoch", "/committed"),
        ("romulus_term", "/term"),
    ] {
        let value = scrape.value(name, &[VM])?;
        ensure_between(value, number(&before, path)?, number(&after, path)?, name)?;
    }
    let wire = scrape.value("romulus_wire_bytes_total", &["phase=\"checkpoint\""])?;
    ensure_between(
        wire,
        number(&before, "/wire_bytes")?,
        number(&after, "/wire_bytes")?,
        "wire_bytes",
    )?;
    // The gates of earlier sessions count as well.
    let released = scrape.value("romulus_released_frames_total", &[VM])?;
    ensure!(released > 0.0 && released >= number(&before, "/gates/0/released_frames")?);
    ensure!(scrape.value("romulus_protected", &[VM])? == 1.0);
    ensure!(scrape.sum("romulus_not_protected") == 0.0);
    // A histogram has each pause since the start, the status those since the VM is protected.
    let pauses = scrape.value("romulus_pause_seconds_count", &[VM])?;
    ensure!(pauses >= number(&before, "/pause_ms/count")? && pauses > 0.0);
    ensure!(pauses <= scrape.value("romulus_epochs_total", &[VM])?);
    ensure!(scrape.value("romulus_hold_seconds_count", &[VM])? > 0.0);
    ensure!(scrape.value("romulus_resync_done_ratio", &[VM])? == 1.0);
    Ok(())
}

fn ensure_agent(stage: &Stage) -> Result<()> {
    let before = status_of(stage, Host::Backup)?;
    let scrape = stage.lab.scrape(AGENT.0, AGENT.1)?;
    let after = status_of(stage, Host::Backup)?;
    ensure_complete(&scrape, BACKUP_AGENT)?;
    for (name, path) in [
        ("romulus_commits_total", "/commits"),
        ("romulus_committed_epoch", "/committed"),
        ("romulus_apply_seconds_count", "/commits"),
    ] {
        let value = scrape.value(name, &[VM])?;
        ensure_between(value, number(&before, path)?, number(&after, path)?, name)?;
    }
    ensure!(scrape.value("romulus_receive_to_ack_seconds_count", &[VM])? > 0.0);
    ensure!(scrape.value("romulus_standby", &[VM, "state=\"waiting\""])? == 1.0);
    ensure!(scrape.value("romulus_memory_bytes", &[VM, "kind=\"image\""])? > 0.0);
    ensure!(scrape.value("romulus_memory_bytes", &[VM, "kind=\"staging\""])? > 0.0);
    ensure!(scrape.value("romulus_role", &[VM, "role=\"backup\""])? == 1.0);
    Ok(())
}

fn ensure_witness(stage: &Stage) -> Result<()> {
    let scrape = stage.lab.scrape(WITNESS_AT.0, WITNESS_AT.1)?;
    ensure_complete(&scrape, WITNESS)?;
    ensure!(scrape.value("romulus_vms", &[])? == 1.0);
    // Registered, and paired.
    ensure!(scrape.value("romulus_witness_requests_total", &["answer=\"granted\""])? >= 2.0);
    ensure!(scrape.value("romulus_connections", &[])? >= 2.0);
    Ok(())
}

/// Tries until it holds: on a busy machine a session may end while it is looked at, and the next one begins afresh.
fn holds(what: &str, check: impl Fn() -> Result<()>) -> Result<()> {
    let mut last = String::new();
    let held = wait_for(what, SOON, || {
        check().map_err(|error| last = format!("{error:#}")).ok()
    });
    held.with_context(|| last)
}

fn ready(stage: &Stage, (host, port): (Host, u16)) -> Result<(u16, String)> {
    stage.lab.page(host, port, "/readyz")
}

fn stage() -> Result<Stage> {
    let guest = TestbedConfig::default().dirty_pages(200);
    let config = StageConfig {
        guest: guest.into(),
        ..StageConfig::default()
    };
    Stage::raise(&Paths::here(), TEST_LAB, &config)
}

#[test]
fn what_the_daemons_show_is_what_their_status_says_also_after_a_takeover() -> Result<()> {
    let mut stage = stage()?;
    ensure!(ready(&stage, AGENT)?.0 == 200, "an agent without a VM is ready");
    let (began, prometheus) = (Stamp::now(), Prometheus::start(&stage.lab)?);
    stage.protect(&ProtectConfig::default())?;
    holds("the replicator's metrics", || ensure_replicator(&stage))?;
    holds("the agent's metrics", || ensure_agent(&stage))?;
    holds("the witness's metrics", || ensure_witness(&stage))?;
    for at in [AGENT, WITNESS_AT, REPLICATOR_AT] {
        let alive = || -> Result<()> {
            ensure!(ready(&stage, at)?.0 == 200, "{at:?} is ready");
            ensure!(
                stage.lab.page(at.0, at.1, "/healthz")?.0 == 200,
                "{at:?} is alive"
            );
            Ok(())
        };
        holds("health", alive)?;
    }
    holds("the dashboard", || ensure_dashboard(&stage, &prometheus, began))?;

    stage.kill_primary()?;
    let after = wait_for("the agent to count its takeover", SOON, || {
        let scrape = stage.lab.scrape(AGENT.0, AGENT.1).ok()?;
        (scrape.value("romulus_takeovers_total", &[VM]).ok()? == 1.0).then_some(scrape)
    })?;
    ensure_complete(&after, BACKUP_AGENT)?;
    ensure!(
        after.value("romulus_suspicions_total", &[VM])? + after.value("romulus_grants_total", &[VM])? >= 1.0
    );
    wait_for("the guest to be active", SOON, || {
        let scrape = stage.lab.scrape(AGENT.0, AGENT.1).ok()?;
        scrape.value("romulus_role", &[VM, "role=\"active\""]).ok()
    })?;
    let (code, said) = ready(&stage, AGENT)?;
    ensure!(code == 200, "it has taken over: {said}");
    wait_for("the alert of a takeover", SOON, || {
        let firing = prometheus.firing(&stage.lab).ok()?;
        firing
            .iter()
            .any(|alert| alert == "RomulusTookOver")
            .then_some(())
    })
}

/// Each of its panels has something to say while a VM is protected, but for the one that says why one is not.
fn ensure_dashboard(stage: &Stage, prometheus: &Prometheus, began: Stamp) -> Result<()> {
    let dashboard = Dashboard::shipped()?;
    let run = dashboard.ask(prometheus, &stage.lab, (began, Stamp::now()), &[])?;
    let empty = run.empty_panels(&dashboard);
    ensure!(empty == ["Why not"], "the panels that show nothing: {empty:?}");
    Ok(())
}

#[test]
fn a_replicator_whose_agent_is_gone_says_that_it_does_not_protect() -> Result<()> {
    let mut stage = stage()?;
    stage.protect(&ProtectConfig::default())?;
    drop(stage.agent.take());
    let (_, why) = wait_for("the replicator to say that it does not protect", SOON, || {
        ready(&stage, REPLICATOR_AT).ok().filter(|(code, _)| *code == 503)
    })?;
    ensure!(why.contains("demo is not protected: "), "{why}");
    let scrape = stage.lab.scrape(REPLICATOR_AT.0, REPLICATOR_AT.1)?;
    ensure!(scrape.value("romulus_protected", &[VM])? == 0.0);
    ensure!(scrape.sum("romulus_not_protected") == 1.0, "one reason holds");
    Ok(())
}
