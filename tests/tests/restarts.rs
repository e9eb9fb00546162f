//! The backup's agent under a real systemd that restarts it, or finds it dead, while guests depend on it.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use romulus_e2e::daemons::{AgentConfig, ProtectConfig};
use romulus_e2e::guest::TestbedConfig;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::systemd::Container;
use romulus_e2e::{Host, Paths, Stamp, TEST_LAB, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const UNIT: &str = "agent.service";
const SOON: Duration = Duration::from_secs(90);
const MEMORY_MIB: u32 = 64;
const PAGES: u64 = MEMORY_MIB as u64 * 256;
/// Deaths of the agent in one test.
const KILLS: u32 = 3;

/// A protected guest whose backup's agent is a unit of systemd. The container goes before the lab that it is in.
struct Hosted {
    backup: Container,
    stage: Stage,
}

impl Hosted {
    fn raise() -> Result<Hosted> {
        let guest = TestbedConfig {
            memory_mib: MEMORY_MIB,
            // What it writes while the agent is away has to be sent: only the client's writes here.
            ..TestbedConfig::default()
        };
        let config = StageConfig {
            guest: guest.into(),
            without_daemons: true,
            ..StageConfig::default()
        };
        let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
        stage.lab.init_pki()?;
        stage.witness = Some(stage.lab.start_witness()?);
        let lab = &stage.lab;
        let shared: Vec<(&Path, String)> = [&lab.run, &lab.logs, &lab.paths.release]
            .map(|folder| (folder.as_path(), folder.display().to_string()))
            .into();
        let shared: Vec<(&Path, &str)> = shared.iter().map(|(path, text)| (*path, text.as_str())).collect();
        let backup = Container::boot_with(lab, Host::Backup, &shared)?;
        let log = lab.logs.join("agent-unit.log");
        let unit = format!(
            "[Unit]\nStartLimitIntervalSec=0\n\
             [Service]\nExecStart={}\nRestart=always\nRestartSec=100ms\nNotifyAccess=main\n\
             FileDescriptorStoreMax=64\nEnvironment=FDSTORE=64\nStandardOutput=append:{}\n",
            lab.agent_argv(&AgentConfig::default())?.join(" "),
            log.display()
        );
        backup.write(&format!("/etc/systemd/system/{UNIT}"), unit)?;
        backup.systemctl(&["daemon-reload"])?;
        backup.systemctl(&["start", UNIT])?;
        stage.timeline.follow("backup", &log);
        let mut hosted = Hosted { backup, stage };
        hosted.stage.protect(&ProtectConfig::default())?;
        Ok(hosted)
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
        waited.map_err(|error| anyhow!("{error}; it is {last}; {}", self.backup.journal(UNIT)))
    }

    fn agent(&self) -> Result<Pid> {
        let pid = self.backup.property(UNIT, "MainPID")?;
        self.backup.pid_here(&pid)
    }

    fn restart_agent(&self) -> Result<()> {
        self.backup.systemctl(&["restart", UNIT]).map(drop)
    }

    /// Kills it and waits until systemd has started another one.
    fn kill_agent(&self) -> Result<()> {
        let before = self.backup.property(UNIT, "MainPID")?;
        kill_process(self.agent()?, Signal::KILL).context("cannot kill the agent")?;
        wait_for("another agent", SOON, || {
            let now = self.backup.property(UNIT, "MainPID").ok()?;
            (now != before && now != "0").then_some(())
        })
    }

    /// What the agent's next life found in the fd store, and what the primary sent it until the guest was protected again.
    fn ensure_little_was_sent(&self, what: &str, gone: Stamp) -> Result<()> {
        let timeline = &self.stage.timeline;
        let found = timeline.wait("fd_store", gone, SOON)?;
        ensure!(number(&found.detail, "found")? > 0, "{what}: {}", found.detail);
        let sent = timeline.wait("first_copy_sent", found.at, SOON)?;
        let paired = timeline.wait("paired", sent.at, SOON)?;
        println!(
            "{what}: protected again after {:.0} ms, {}",
            paired.at.ms_since(gone),
            sent.detail
        );
        let pages = number(&sent.detail, "sent_pages")?;
        ensure!(
            pages * 20 < PAGES,
            "{what}: {pages} of {PAGES} pages were sent again"
        );
        ensure!(
            timeline.first("activated", gone).is_none(),
            "{what}: the backup took over"
        );
        ensure!(
            self.stage.guest.runs(&self.stage.lab)?,
            "{what}: the guest is paused"
        );
        self.wait_protected()?;
        self.stage.wait_ack_after(paired.at, SOON).map(drop)
    }

    fn wait_protected(&self) -> Result<()> {
        wait_for("protection", SOON, || {
            let status = self.stage.lab.status(Host::Primary).ok()?;
            (status["state"] == "protected").then_some(())
        })
    }

    /// The units of the standbys, waiting or active.
    fn standby_units(&self) -> Result<Vec<String>> {
        let words = ["list-units", "--no-legend", "--plain", "romulus-standby-*.scope"];
        let listed = self.backup.systemctl(&words)?;
        Ok(listed
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect())
    }

    fn ensure_whole(&mut self) -> Result<()> {
        self.stage.ensure_guest_is_whole()?;
        self.stage.ensure_nothing_lost()
    }
}

/// The figure of a field in an event's detail.
fn number(detail: &str, field: &str) -> Result<u64> {
    let figure = detail
        .split_whitespace()
        .find_map(|part| part.strip_prefix(field)?.strip_prefix('='));
    figure
        .and_then(|figure| figure.parse().ok())
        .with_context(|| format!("no figure {field} in {detail:?}"))
}

#[test]
fn an_agent_that_is_restarted_or_killed_finds_its_images_and_few_pages_are_sent_again() -> Result<()> {
    let mut hosted = Hosted::raise()?;
    let files = hosted.backup.property(UNIT, "NFileDescriptorStore")?;
    ensure!(
        files.parse::<u32>().is_ok_and(|files| files > 4),
        "{files} files are kept"
    );
    let at = Stamp::now();
    hosted.restart_agent()?;
    hosted.ensure_little_was_sent("restart", at)?;
    for kill in 1..=KILLS {
        // At another point of an epoch each time.
        sleep(Duration::from_micros(Stamp::now().micros() % 700_000));
        let at = Stamp::now();
        hosted.kill_agent()?;
        hosted.ensure_little_was_sent(&format!("kill {kill}"), at)?;
    }
    // Nothing is left behind by earlier lives.
    assert_eq!(hosted.backup.property(UNIT, "NFileDescriptorStore")?, files);
    assert_eq!(hosted.standby_units()?.len(), 1);
    hosted.ensure_whole()
}

#[test]
fn a_commit_outlives_the_agent_and_the_guest_that_is_taken_over_from_it_outlives_the_next_ones() -> Result<()>
{
    let mut hosted = Hosted::raise()?;
    sleep(Duration::from_secs(1));
    // Both at once: only what the dead agent acknowledged can save the guest.
    kill_process(hosted.agent()?, Signal::KILL)?;
    let killed = hosted.stage.kill_primary()?;
    let activated = hosted.stage.timeline.wait("activated", killed, SOON)?;
    hosted.stage.wait_ack_after(activated.at, SOON)?;
    let pid = hosted.wait_agent(|status| status["standby"] == "active")?["standby_pid"].clone();
    let units = hosted.standby_units()?;
    assert_eq!(units.len(), 1, "{units:?}");
    for what in ["restart", "kill"] {
        let at = Stamp::now();
        if what == "restart" {
            hosted.restart_agent()?;
        } else {
            hosted.kill_agent()?;
        }
        hosted.stage.timeline.wait("ready", at, SOON)?;
        let status = hosted.wait_agent(|status| status["standby"] == "active")?;
        assert_eq!(status["standby_pid"], pid, "{what}: {status}");
        hosted.stage.wait_ack_after(Stamp::now(), SOON)?;
    }
    assert_eq!(hosted.standby_units()?, units);
    hosted.ensure_whole()
}
