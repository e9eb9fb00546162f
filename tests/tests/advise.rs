//! `bench advise` looks at a running guest that nobody protects, and leaves it as it was, however it ends.

use std::time::Duration;

use anyhow::{Result, ensure};
use romulus_e2e::daemons::{ProtectConfig, VM};
use romulus_e2e::guest::{GuestConfig, QemuConfig, TestbedConfig, attach, qmp};
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, Process, Stamp, TEST_LAB, Vmm, wait_for};
use rustix::process::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

fn serving(guest: GuestConfig) -> Result<Stage> {
    let config = StageConfig {
        guest,
        ..StageConfig::default()
    };
    Stage::raise(&Paths::here(), TEST_LAB, &config)
}

fn of_qemu() -> GuestConfig {
    QemuConfig {
        workload: "redis,dirty:300:25".to_owned(),
        second_monitor: true,
        ..QemuConfig::default()
    }
    .into()
}

/// How it is called for the lab's guest.
fn advise(stage: &Stage, more: &[&str]) -> Result<Vec<String>> {
    let lab = &stage.lab;
    let word = |path: &std::path::Path| path.display().to_string();
    let mut argv = vec![word(&lab.paths.binary("bench")?), "advise".to_owned()];
    let reached_by = match lab.vmm {
        Vmm::Testbed => ["--attach".to_owned(), word(&attach(lab))].to_vec(),
        Vmm::Qemu => [
            "--qmp".to_owned(),
            word(&qmp(lab)),
            "--fifo-dir".to_owned(),
            word(&lab.run),
        ]
        .to_vec(),
    };
    argv.extend(["--vm".to_owned(), VM.to_owned()]);
    argv.extend(reached_by);
    argv.extend(more.iter().map(|word| (*word).to_owned()));
    Ok(argv)
}

/// One that looks for an hour, and has begun to.
fn looking(stage: &Stage) -> Result<Process> {
    let endless = advise(stage, &["--epoch", "20ms", "--time", "1h"])?;
    let process = stage.lab.spawn(Host::Primary, "advise", &endless)?;
    wait_for("the look at the guest", SOON, || {
        process.tail().contains("epochs of 20ms").then_some(())
    })?;
    Ok(process)
}

/// It serves, and can be protected: nothing is left of whoever looked at it.
fn is_as_before(mut stage: Stage) -> Result<()> {
    stage.wait_ack_after(Stamp::now(), SOON)?;
    wait_for("the guest to run", SOON, || {
        stage.guest.runs(&stage.lab).ok()?.then_some(())
    })?;
    stage.protect(&ProtectConfig::default())?;
    stage.wait_ack_after(Stamp::now(), SOON)?;
    if stage.lab.vmm == Vmm::Testbed {
        // The guest of this repository checks itself.
        stage.ensure_guest_is_whole()?;
    }
    stage.ensure_nothing_lost()
}

fn looked_at(guest: GuestConfig) -> Result<()> {
    let stage = serving(guest)?;
    // Interrupted in the middle of it…
    let mut interrupted = looking(&stage)?;
    interrupted.signal(Signal::INT)?;
    let ended = interrupted.wait(SOON)?;
    let said = interrupted.tail();
    ensure!(ended.code() == Some(1), "{ended}: {said}");
    ensure!(said.contains("the guest was let go"), "{said}");
    stage.wait_ack_after(Stamp::now(), SOON)?;
    // …it leaves the guest to the next one, which looks to the end. Whether a goal is in reach is the machine's business.
    let json = stage.lab.run_path("advise.json");
    let file = json.display().to_string();
    let whole = advise(&stage, &["--epoch", "10ms,50ms", "--time", "1s", "--json", &file])?;
    let table = stage.lab.output_or(Host::Primary, &whole, &[3])?;
    for word in ["pause p50", "added latency", "guest slower", "tap0"] {
        ensure!(table.contains(word), "{word}: {table}");
    }
    let answer: Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    ensure!(answer["schema"] == 1, "{answer}");
    let lengths = |key: &str| answer[key].as_array().map_or(0, Vec::len);
    let found = (lengths("observed"), lengths("predicted"), lengths("recommended"));
    ensure!(found == (2, 12, 2), "{answer}");
    for observed in answer["observed"].as_array().into_iter().flatten() {
        ensure!(observed["dirty_pages"]["p50"].as_f64() > Some(0.0), "{observed}");
    }
    is_as_before(stage)
}

#[test]
fn a_kvm_guest_that_bench_advise_looks_at_runs_on_and_the_answer_names_every_length() -> Result<()> {
    looked_at(TestbedConfig::default().dirty_pages(400).into())
}

#[test]
fn a_guest_of_qemu_that_bench_advise_looks_at_runs_on_and_the_answer_names_every_length() -> Result<()> {
    looked_at(of_qemu())
}

#[test]
fn a_guest_of_qemu_is_let_go_when_bench_advise_is_killed() -> Result<()> {
    let stage = serving(of_qemu())?;
    looking(&stage)?.kill();
    is_as_before(stage)
}
