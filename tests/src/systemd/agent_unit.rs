//! The backup's agent in its unit, as the package has it, for labs whose other daemons run without systemd.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::{AGENT, Container};
use crate::lab::word;
use crate::netns::BRIDGE;
use crate::{Host, Lab, Vmm, wait_for};

const UNIT: &str = include_str!("../../../packaging/systemd/romulus-backup-agent.service");
const SOON: Duration = Duration::from_secs(120);

/// The agent under systemd on the lab's backup. Its admin socket, its log and the checkout are where the lab has them; all else is
/// the unit's: its sandbox, its fd store, its folders.
#[derive(Debug)]
pub struct AgentUnit {
    /// The host that it runs on.
    pub container: Container,
    log: PathBuf,
}

impl AgentUnit {
    /// Boots the backup and starts the agent on it; the lab must have its certificates. `keys` and `tables` are further settings,
    /// as TOML: keys outside of tables, and tables.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(lab: &Lab, keys: &str, tables: &str) -> Result<AgentUnit> {
        let container = Container::boot_for_vmm(lab, Host::Backup)?;
        container.copy_in(&lab.paths.binary("backup-agent")?, "/usr/sbin/backup-agent")?;
        container.install_pki(lab)?;
        container.run(&["mkdir", "-m", "755", "/run/romulus"])?;
        container.write("/etc/romulus/backup-agent.toml", settings(lab, keys, tables)?)?;
        let log = lab.logs.join("agent-unit.log");
        container.write(&format!("/etc/systemd/system/{AGENT}"), UNIT)?;
        // The checkout and the lab's folders may lie where the unit looks away.
        let drop_in = format!(
            "[Service]\nPrivateTmp=no\nProtectHome=no\nReadWritePaths={} {}\nStandardOutput=append:{}\n",
            lab.run.display(),
            lab.logs.display(),
            log.display()
        );
        container.write(&format!("/etc/systemd/system/{AGENT}.d/10-lab.conf"), drop_in)?;
        container.systemctl(&["daemon-reload"])?;
        let started = container.systemctl(&["start", AGENT]);
        started.with_context(|| container.journal(AGENT))?;
        Ok(AgentUnit { container, log })
    }

    /// Where all lives of the agent log, as JSON.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The agent's process.
    ///
    /// # Errors
    /// When there is none.
    pub fn pid(&self) -> Result<Pid> {
        self.container.pid_here(&self.main_pid()?)
    }

    fn main_pid(&self) -> Result<String> {
        self.container.property(AGENT, "MainPID")
    }

    /// Has systemd restart it, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&self) -> Result<()> {
        let restarted = self.container.systemctl(&["restart", AGENT]);
        restarted.map(drop).with_context(|| self.container.journal(AGENT))
    }

    /// Kills it and waits until systemd has started another one.
    ///
    /// # Errors
    /// When there is none to kill, or no other one comes.
    pub fn kill(&self) -> Result<()> {
        let before = self.main_pid()?;
        kill_process(self.container.pid_here(&before)?, Signal::KILL).context("cannot kill the agent")?;
        wait_for("another agent", SOON, || {
            let now = self.main_pid().ok()?;
            (now != before && now != "0").then_some(())
        })
    }

    /// How many files systemd keeps for it.
    ///
    /// # Errors
    /// When systemd does not say.
    pub fn kept_files(&self) -> Result<u32> {
        let count = self.container.property(AGENT, "NFileDescriptorStore")?;
        count
            .parse()
            .with_context(|| format!("{count:?} is no number of files"))
    }

    /// The units of the standbys, waiting or active.
    ///
    /// # Errors
    /// When systemd does not say.
    pub fn standby_units(&self) -> Result<Vec<String>> {
        let words = ["list-units", "--no-legend", "--plain", "romulus-standby-*.scope"];
        let listed = self.container.systemctl(&words)?;
        let names = listed.lines().filter_map(|line| line.split_whitespace().next());
        Ok(names.map(str::to_owned).collect())
    }
}

fn settings(lab: &Lab, keys: &str, tables: &str) -> Result<String> {
    let mut text = format!(
        "witness = [\"{}:7701\"]\nbridge = \"{BRIDGE}\"\nadmin_socket = {:?}\n{keys}\n\
         [log]\nformat = \"json\"\nlevel = \"info,epochs=debug\"\n{tables}\n",
        Host::Witness.ip(),
        lab.admin(Host::Backup),
    );
    if lab.vmm == Vmm::Testbed {
        let standby = [word(&lab.paths.binary("testbed")?), "standby".to_owned()];
        text.push_str(&format!("[[vmm]]\nname = \"testbed\"\nstandby = {standby:?}\n"));
    }
    Ok(text)
}
