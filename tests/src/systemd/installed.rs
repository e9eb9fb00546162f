//! The packages of this checkout in containers, set up as an operator would.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Container;
use crate::daemons::VM;
use crate::guest::{GuestConfig, attach, qmp};
use crate::netns::{BRIDGE, TAP};
use crate::{Host, Lab, Vmm, wait_for};

/// The agent's unit.
pub const AGENT: &str = "romulus-backup-agent.service";
/// The unit of the replicator of the lab's VM.
pub const REPLICATOR: &str = "romulus-replicator@demo.service";
/// The witness's unit.
pub const WITNESS: &str = "romulus-witness.service";

const SOON: Duration = Duration::from_secs(120);

impl Container {
    /// Installs packages of this checkout, with the one that all need.
    ///
    /// # Errors
    /// When they are not built, or dpkg says no.
    pub fn install(&self, lab: &Lab, packages: &[&str]) -> Result<()> {
        let mut argv = vec!["dpkg".to_owned(), "--install".to_owned()];
        let debs = fs::read_dir(lab.paths.debs()).context("no packages: `cargo xtask deb` makes them")?;
        for deb in debs.flatten() {
            let name = deb.file_name().to_string_lossy().into_owned();
            let package = name.split('_').next().unwrap_or_default();
            if package == "romulus" || packages.contains(&package) {
                self.copy_in(&deb.path(), &format!("/tmp/{name}"))?;
                argv.push(format!("/tmp/{name}"));
            }
        }
        ensure!(
            argv.len() == packages.len() + 3,
            "not all of {packages:?} are built: {argv:?}"
        );
        self.run(&words(&argv)).map(drop)
    }

    /// Makes packages that are installed anew with a later version, and installs those, as an upgrade does.
    ///
    /// # Errors
    /// What dpkg says.
    pub fn upgrade(&self, packages: &[&str]) -> Result<()> {
        let script = "set -e; cd /tmp; debs=\nfor p in romulus \"$@\"; do\n\
            rm -rf x; dpkg-deb -R ${p}_*-1_amd64.deb x; sed -i 's/^Version: .*/&.1/; s/(= \\([^)]*\\))/(= \\1.1)/' x/DEBIAN/control\n\
            dpkg-deb -Znone -b x later-$p.deb; debs=\"$debs later-$p.deb\"; done; dpkg --install $debs";
        let mut argv = vec!["sh", "-c", script, "upgrade"];
        argv.extend_from_slice(packages);
        self.run(&argv).map(drop)
    }

    /// Gives the host its certificates, which the lab has made.
    ///
    /// # Errors
    /// When they are not there.
    pub fn install_pki(&self, lab: &Lab) -> Result<()> {
        let folder = lab.run_path("pki").join(self.host().name());
        for file in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let file = file?;
            let to = format!("/etc/romulus/pki/{}", file.file_name().to_string_lossy());
            self.copy_in(&file.path(), &to)?;
        }
        Ok(())
    }

    /// Installs, sets up and starts the witness.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_witness(&self, lab: &Lab) -> Result<()> {
        self.install(lab, &["romulus-witness"])?;
        self.install_pki(lab)?;
        self.run(&["chgrp", "-R", "romulus-witness", "/etc/romulus/pki"])?;
        self.run(&["chmod", "-R", "g=rX", "/etc/romulus/pki"])?;
        self.systemctl(&["enable", "--now", WITNESS])?;
        self.wait_property(WITNESS, "ActiveState", "active", SOON)
    }

    /// Installs, sets up and starts the agent, which knows the test VMM.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&self, lab: &Lab) -> Result<()> {
        self.install(lab, &["romulus-backup-agent"])?;
        self.install_pki(lab)?;
        let settings = format!(
            "bridge = \"{BRIDGE}\"\nwitness = [\"{}:7701\"]\n[[vmm]]\nname = \"testbed\"\nstandby = [\"{}/testbed\", \"standby\"]\n",
            Host::Witness.ip(),
            super::BINARIES,
        );
        self.write("/etc/romulus/backup-agent.d/10-lab.toml", settings)?;
        self.systemctl(&["enable", "--now", AGENT])?;
        self.wait_property(AGENT, "ActiveState", "active", SOON)
    }

    /// Starts the guest, as a unit, and installs the replicator with its host's settings; starts no replicator.
    ///
    /// # Errors
    /// When either can't be.
    pub fn start_guest(&self, lab: &Lab, config: impl Into<GuestConfig>) -> Result<()> {
        let mut argv = vec!["systemd-run".to_owned(), "--unit=guest".to_owned()];
        argv.extend(config.into().argv(lab)?);
        self.run(&words(&argv))?;
        let (_, socket, _) = reached(lab);
        wait_for("the guest's socket", SOON, || socket.exists().then_some(()))?;
        self.install(lab, &["romulus-replicator"])?;
        self.install_pki(lab)?;
        let host = format!(
            "backup = \"{}@{}:7700\"\nwitness = [\"{}:7701\"]\n",
            Host::Backup.name(),
            Host::Backup.ip(),
            Host::Witness.ip(),
        );
        self.write("/etc/romulus/replicator.d/10-lab.toml", host)
    }

    /// Has the lab's guest protected as an operator does, also after a boot, and waits until it is.
    ///
    /// # Errors
    /// When it does not come to be, with the replicator's journal.
    pub fn protect_guest(&self, lab: &Lab) -> Result<Value> {
        let (option, socket, console) = reached(lab);
        let socket = socket.to_string_lossy();
        let how = [
            option,
            &socket,
            "--tap",
            TAP,
            "--disposable",
            console,
            "--register",
            "--timeout",
            "3m",
        ];
        let argv = [&["romulus", "protect", VM], &how[..]].concat();
        self.run(&argv).with_context(|| self.journal(REPLICATOR))?;
        self.systemctl(&["enable", REPLICATOR])?;
        self.wait_state("protected", SOON)
    }

    /// What `romulus status --json` says of the one daemon here.
    ///
    /// # Errors
    /// When there is no daemon, or several, or it does not answer.
    pub fn romulus_status(&self) -> Result<Value> {
        // Its exit code says "not protected", too.
        let out = self.output(&["romulus", "status", "--json"])?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let answer: Value = serde_json::from_slice(&out.stdout)
            .with_context(|| format!("no status on {}: {said}", self.host()))?;
        match answer["daemons"].as_array().map(Vec::as_slice) {
            Some([one]) if one["status"].is_object() => Ok(one["status"].clone()),
            _ => bail!("not the status of one daemon on {}: {answer}", self.host()),
        }
    }

    /// Waits until the replicator here says that the VM is in this state, and returns the status.
    ///
    /// # Errors
    /// When it does not in time; with the last status and the journal.
    pub fn wait_state(&self, state: &str, at_most: Duration) -> Result<Value> {
        let mut last = String::new();
        let waited = wait_for(&format!("the state {state:?}"), at_most, || {
            let status = self.romulus_status();
            last = format!("{status:?}");
            status.ok().filter(|status| status["state"] == state)
        });
        waited.with_context(|| format!("last: {last}; the journal:\n{}", self.journal(REPLICATOR)))
    }
}

/// How the lab's guest is reached: the option of `romulus protect`, the socket, and what its console is called.
fn reached(lab: &Lab) -> (&'static str, PathBuf, &'static str) {
    match lab.vmm {
        Vmm::Qemu => ("--qmp", qmp(lab), "console"),
        Vmm::Testbed => ("--attach", attach(lab), "serial"),
    }
}

fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}
