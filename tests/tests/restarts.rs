//! The backup's agent in its unit under a real systemd that restarts it, or finds it dead, while guests depend on it.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::guest::{GuestConfig, QemuConfig, TestbedConfig};
use romulus_e2e::restarts::{Outcome, Restarts, RestartsConfig, Strike, ensure_let_out, number};
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::systemd::AgentUnit;
use romulus_e2e::{Host, Paths, Stamp, TEST_LAB, Vmm, wait_for};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(120);
/// Sent again, as a part of a guest's memory, at most.
const SENT_MAX: f64 = 0.05;

/// A protected guest whose backup's agent is a unit of systemd. The container goes before the lab that it is in.
struct Hosted {
    agent: AgentUnit,
    stage: Stage,
}

impl Hosted {
    fn raise(guest: GuestConfig) -> Result<Hosted> {
        let config = StageConfig {
            guest,
            without_daemons: true,
            ..StageConfig::default()
        };
        let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
        stage.lab.init_pki()?;
        stage.witness = Some(stage.lab.start_witness()?);
        let agent = AgentUnit::start(&stage.lab, "", "")?;
        stage.timeline.follow("backup", agent.log());
        stage.protect(&ProtectConfig::default())?;
        Ok(Hosted { agent, stage })
    }

    /// Waits until the agent's status is as wanted.
    fn wait_agent(&self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = String::new();
        let waited = wait_for("the agent's status", SOON, || {
            match self.stage.lab.status(Host::Backup) {
                Ok(status) if wanted(&status["vms"][0]) => return Some(status["vms"][0].clone()),
                Ok(status) => last = status.to_string(),
                Err(error) => last = format!("{error:#}"),
            }
            None
        });
        waited.map_err(|error| anyhow!("{error}; it is {last}"))
    }

    fn strike(&self, strike: Strike) -> Result<Stamp> {
        let at = Stamp::now();
        match strike {
            Strike::Restart => self.agent.restart()?,
            Strike::Kill => self.agent.kill()?,
        }
        self.stage.timeline.wait("ready", at, SOON)?;
        Ok(at)
    }

    /// Waits until the guest is protected again, after a first copy to an agent that found its images.
    fn wait_protected_again(&self, at: Stamp) -> Result<()> {
        let timeline = &self.stage.timeline;
        let found = timeline.wait("fd_store", at, SOON)?;
        ensure!(number(&found, "found")? > 0, "{}", found.detail);
        let sent = timeline.wait("first_copy_sent", found.at, SOON)?;
        let paired = timeline.wait("paired", sent.at, SOON)?;
        println!(
            "protected again after {:.0} ms, {}",
            paired.at.ms_since(at),
            sent.detail
        );
        let held = number(&sent, "held_pages")?;
        ensure!(held > number(&sent, "sent_pages")?, "{}", sent.detail);
        wait_for("protection", SOON, || {
            let status = self.stage.lab.status(Host::Primary).ok()?;
            (status["state"] == "protected").then_some(())
        })?;
        self.stage.wait_ack_after(paired.at, SOON).map(drop)
    }

    /// Kills primary and agent at once: only what the dead agent acknowledged can save the guest.
    fn take_over(&mut self) -> Result<Value> {
        kill_process(self.agent.pid()?, Signal::KILL).context("cannot kill the agent")?;
        let killed = self.stage.kill_primary()?;
        let activated = self.stage.timeline.wait("activated", killed, SOON)?;
        self.stage.wait_ack_after(activated.at, SOON)?;
        self.wait_agent(|status| status["standby"] == "active")
    }

    fn ensure_whole(&mut self) -> Result<()> {
        if self.stage.lab.vmm == Vmm::Testbed {
            self.stage.ensure_guest_is_whole()?;
        }
        self.stage.ensure_nothing_lost()
    }
}

fn small_testbed() -> GuestConfig {
    let guest = TestbedConfig {
        memory_mib: 64,
        ..TestbedConfig::default()
    };
    guest.into()
}

fn print_and_check(what: &str, outcome: &Outcome) -> Result<()> {
    println!(
        "{what}: the agent was back after {:.0} ms, the VMs protected after {:.0} to {:.0} ms, {:.2} % of their memory sent again \
         (at most {:.2} % of one), longest pause {:.2} ms",
        outcome.agent_ms,
        outcome.first_protected_ms,
        outcome.protected_ms,
        outcome.sent_ratio() * 100.0,
        outcome.worst_sent_ratio() * 100.0,
        outcome.pause_ms()
    );
    ensure!(outcome.worst_sent_ratio() < SENT_MAX, "{what}: {outcome:?}");
    Ok(())
}

#[test]
fn an_agent_that_is_restarted_or_killed_finds_its_eight_images_and_few_pages_are_sent_again() -> Result<()> {
    let mut restarts = Restarts::raise(&Paths::here(), TEST_LAB, &RestartsConfig::default())?;
    let files = restarts.kept_files()?;
    ensure!(files > 8 * 4, "{files} files are kept");
    print_and_check("restart", &restarts.strike(Strike::Restart)?)?;
    for kill in 1..=2 {
        print_and_check(&format!("kill {kill}"), &restarts.strike(Strike::Kill)?)?;
    }
    // Nothing is left behind by earlier lives.
    assert_eq!(restarts.kept_files()?, files);
    restarts.ensure_nothing_left()?;
    restarts.kill_host()
}

#[test]
fn a_commit_outlives_the_agent_and_the_guest_that_is_taken_over_from_it_outlives_the_next_ones() -> Result<()>
{
    outlives_its_agents(Hosted::raise(small_testbed())?)
}

#[test]
fn so_do_a_commit_and_a_guest_of_qemu() -> Result<()> {
    let hosted = Hosted::raise(QemuConfig::default().into())?;
    let at = hosted.strike(Strike::Kill)?;
    hosted.wait_protected_again(at)?;
    outlives_its_agents(hosted)
}

fn outlives_its_agents(mut hosted: Hosted) -> Result<()> {
    let at = hosted.strike(Strike::Restart)?;
    hosted.wait_protected_again(at)?;
    let units = hosted.agent.standby_units()?;
    assert_eq!(units.len(), 1, "{units:?}");
    sleep(Duration::from_secs(1));
    let pid = hosted.take_over()?["standby_pid"].clone();
    let units = hosted.agent.standby_units()?;
    assert_eq!(units.len(), 1, "{units:?}");
    for strike in [Strike::Restart, Strike::Kill] {
        hosted.strike(strike)?;
        let status = hosted.wait_agent(|status| status["standby"] == "active")?;
        assert_eq!(status["standby_pid"], pid, "{strike:?}: {status}");
        hosted.stage.wait_ack_after(Stamp::now(), SOON)?;
    }
    assert_eq!(hosted.agent.standby_units()?, units);
    ensure_let_out(&hosted.stage.timeline)?;
    hosted.ensure_whole()
}
