//! One container: booting it, running commands in it, reaching its files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use romulus_host_sys::child::die_with_thread;
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::word;
use crate::{Host, Lab, Process, wait_for};

/// Where a container has the checkout's release binaries.
pub const BINARIES: &str = "/opt/romulus";

const BOOT_SCRIPT: &str = include_str!("boot.sh");
/// Ten seconds on an idle machine.
const BOOT_AT_MOST: Duration = Duration::from_secs(180);
const END_AT_MOST: Duration = Duration::from_secs(30);
/// One that takes longer hangs: `timeout` ends it, with code 124, so that a test says which it was.
const COMMAND_AT_MOST_S: &str = "300";
/// What commands in a container find.
const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("LC_ALL", "C.UTF-8"),
    ("DEBIAN_FRONTEND", "noninteractive"),
    ("SYSTEMD_PAGER", ""),
];

/// A host of a lab that runs systemd. Dropping it ends everything in it and forgets what was written there.
#[derive(Debug)]
pub struct Container {
    init: Pid,
    process: Process,
    host: Host,
}

impl Container {
    /// Boots a host of the lab and waits until systemd has started everything.
    ///
    /// # Errors
    /// When the tree is missing, rights are, or systemd does not come up; the error has what failed.
    pub fn boot(lab: &Lab, host: Host) -> Result<Container> {
        Self::boot_with(lab, host, &[])
    }

    /// The same, with folders of this machine mounted in it: each one's path here, and there.
    ///
    /// # Errors
    /// As [`Container::boot`].
    pub fn boot_with(lab: &Lab, host: Host, folders: &[(&Path, &str)]) -> Result<Container> {
        let base = lab.paths.systemd_tree();
        ensure!(
            base.join("lib/systemd/systemd").exists(),
            "{} holds no systemd: `cargo xtask setup` makes it",
            base.display()
        );
        let namespace = lab.net.namespace(host);
        let work = lab.run_path(&format!("systemd-{host}"));
        // Nothing is mounted there outside of containers: what is left is the number of one that is gone.
        if work.exists() {
            fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        }
        fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
        let script = work.join("boot.sh");
        fs::write(&script, BOOT_SCRIPT).with_context(|| format!("cannot write {}", script.display()))?;
        let mut argv: Vec<String> = ["env".to_owned(), format!("BOOT_SCRIPT={}", word(&script))].into();
        argv.extend(["unshare", "--mount", "--fork", "--kill-child=TERM", "sh"].map(str::to_owned));
        argv.extend([word(&script), namespace, word(&base), word(&work)]);
        argv.extend([word(&lab.paths.release), BINARIES.to_owned()]);
        for (here, there) in folders {
            argv.extend([word(here), (*there).to_owned()]);
        }
        let mut process = lab.spawn(host, &format!("systemd-{host}"), &argv)?;
        let init = wait_for_init(&mut process, &work.join("init"))?;
        let container = Container { init, process, host };
        container.wait_booted()?;
        Ok(container)
    }

    fn wait_booted(&self) -> Result<()> {
        let mut last = String::new();
        let up = wait_for("systemd", BOOT_AT_MOST, || {
            // Fails, too, while systemd does not listen yet.
            last = self
                .output(&["systemctl", "is-system-running"])
                .map(|out| text(&out.stdout).trim().to_owned())
                .unwrap_or_default();
            matches!(last.as_str(), "running" | "degraded").then_some(())
        });
        up.map_err(|error| anyhow!("{error}; it says {last:?}; {}", self.process.tail()))?;
        ensure!(
            last == "running",
            "units failed while {} booted:\n{}",
            self.host,
            self.run(&["systemctl", "--failed", "--no-legend"])?
        );
        Ok(())
    }

    /// Which host it is.
    #[must_use]
    pub fn host(&self) -> Host {
        self.host
    }

    /// Runs a command in it to its end and returns what it printed.
    ///
    /// # Errors
    /// When it fails; the error has what it said.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        let out = self.output(argv)?;
        if !out.status.success() {
            bail!(
                "`{}` on {} failed ({}): {}{}",
                argv.join(" "),
                self.host,
                out.status,
                text(&out.stdout),
                text(&out.stderr).trim()
            );
        }
        Ok(text(&out.stdout))
    }

    /// Runs a command in it to its end, however that is.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, argv: &[&str]) -> Result<Output> {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=10", COMMAND_AT_MOST_S, "nsenter"])
            .args(["--target", &self.init.as_raw_nonzero().to_string(), "--all", "--"])
            .args(argv)
            .env_clear()
            .envs(ENVIRONMENT)
            .stdin(Stdio::null());
        let out = die_with_thread(&mut command).output();
        out.with_context(|| format!("cannot run {} on {}", argv.join(" "), self.host))
    }

    /// A path of the container as this machine reaches it. Sockets can be connected to.
    ///
    /// # Panics
    /// When the path is not absolute.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        assert!(inside.starts_with('/'), "{inside} is not absolute");
        PathBuf::from(format!("/proc/{}/root{inside}", self.init.as_raw_nonzero()))
    }

    /// Writes a file, and makes its folders.
    ///
    /// # Errors
    /// When the container is gone or its tmpfs is full.
    pub fn write(&self, inside: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let path = self.path(inside);
        let folder = path.parent().context("a file at the root of everything")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::write(&path, contents).with_context(|| format!("cannot write {inside} on {}", self.host))
    }

    /// Copies a file of this machine into it, with its mode.
    ///
    /// # Errors
    /// When either can't be reached.
    pub fn copy_in(&self, here: &Path, inside: &str) -> Result<()> {
        let path = self.path(inside);
        let folder = path.parent().context("a file at the root of everything")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let copied = fs::copy(here, &path);
        copied.with_context(|| format!("cannot copy {} to {inside} on {}", here.display(), self.host))?;
        Ok(())
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it is not there.
    pub fn read(&self, inside: &str) -> Result<String> {
        let path = self.path(inside);
        fs::read_to_string(&path).with_context(|| format!("cannot read {inside} on {}", self.host))
    }

    /// What `systemctl` says to these words.
    ///
    /// # Errors
    /// As [`Container::run`].
    pub fn systemctl(&self, words: &[&str]) -> Result<String> {
        let mut argv = vec!["systemctl"];
        argv.extend_from_slice(words);
        self.run(&argv)
    }

    /// Has a unit read its settings again.
    ///
    /// # Errors
    /// When they are not good, or as [`Container::run`]; with the end of the unit's journal.
    pub fn reload(&self, unit: &str) -> Result<()> {
        let reloaded = self.systemctl(&["reload", unit]);
        reloaded.map(drop).with_context(|| self.journal(unit))
    }

    /// A property of a unit, such as `ActiveState`, `MainPID`, `NRestarts`, `StatusText`, `NFileDescriptorStore`.
    ///
    /// # Errors
    /// As [`Container::run`].
    pub fn property(&self, unit: &str, property: &str) -> Result<String> {
        let shown = self.systemctl(&["show", "--value", "--property", property, unit])?;
        Ok(shown.trim().to_owned())
    }

    /// Waits until a property of a unit is `wanted`.
    ///
    /// # Errors
    /// When it is not in time; with what it was last and the end of the unit's journal.
    pub fn wait_property(&self, unit: &str, property: &str, wanted: &str, at_most: Duration) -> Result<()> {
        let what = format!("{property}={wanted} of {unit} on {}", self.host);
        let mut last = String::new();
        let waited = wait_for(&what, at_most, || {
            last = self
                .property(unit, property)
                .unwrap_or_else(|error| format!("{error:#}"));
            (last == wanted).then_some(())
        });
        waited.map_err(|error| anyhow!("{error}; it is {last:?}; the journal:\n{}", self.journal(unit)))
    }

    /// Waits until a unit has logged this.
    ///
    /// # Errors
    /// When it has not in time, with the end of its journal.
    pub fn wait_journal(&self, unit: &str, text: &str, at_most: Duration) -> Result<()> {
        let found = wait_for(&format!("{text:?} in the journal"), at_most, || {
            self.journal(unit).contains(text).then_some(())
        });
        found.with_context(|| self.journal(unit))
    }

    /// The end of a unit's journal, for errors and to look for a line. Empty when there is none.
    #[must_use]
    pub fn journal(&self, unit: &str) -> String {
        let argv = [
            "journalctl",
            "--no-pager",
            "--output",
            "cat",
            "--lines",
            "200",
            "--unit",
            unit,
        ];
        self.run(&argv).unwrap_or_default()
    }

    /// The number by which this machine knows a process of the container, such as a unit's `MainPID`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn pid_here(&self, inside: &str) -> Result<Pid> {
        let wanted = format!("\t{inside}");
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(&self.init.as_raw_nonzero().to_string());
        for entry in fs::read_dir("/proc").context("cannot list /proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            if !pid.bytes().all(|byte| byte.is_ascii_digit()) || namespace(&pid) != own {
                continue;
            }
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let numbers = status.lines().find(|line| line.starts_with("NSpid:"));
            if numbers.is_some_and(|line| line.ends_with(&wanted)) {
                return Pid::from_raw(pid.parse()?).context("a process with number 0");
            }
        }
        bail!("there is no process {inside} on {}", self.host)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // With its first process all others of the container end; the script then removes the cgroups.
        let _ = kill_process(self.init, Signal::KILL);
        let _ = self.process.wait(END_AT_MOST);
    }
}

fn wait_for_init(process: &mut Process, file: &Path) -> Result<Pid> {
    let init = wait_for("the container's first process", BOOT_AT_MOST, || {
        if let Some(status) = process.ended() {
            return Some(Err(anyhow!("the container ended ({status})")));
        }
        fs::read_to_string(file).ok().map(Ok)
    });
    let init = init
        .and_then(|result| result)
        .with_context(|| format!("no container: {}", process.tail()))?;
    Pid::from_raw(init.trim().parse()?).context("a process with number 0")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
