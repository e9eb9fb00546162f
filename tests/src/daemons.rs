//! The command lines of the daemons and of `romulus`, and nothing else about them: the one place to change.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use romulus_telemetry::openapi::Document;
use serde_json::Value;

use crate::guest::{attach, qmp};
use crate::lab::word;
use crate::netns::{BRIDGE, Host, TAP};
use crate::{Lab, Process, Vmm, wait_for};

/// The VM's name.
pub const VM: &str = "demo";

const AGENT_PORT: u16 = 7700;
const WITNESS_PORT: u16 = 7701;
/// The exit code of `romulus status` for a VM that is not protected.
const NOT_PROTECTED: i32 = 3;
/// Exit codes of `romulus may-run` besides 0: must not run, not known.
const MAY_NOT_RUN: [i32; 2] = [5, 6];

/// How `replicator protect` is called.
#[derive(Clone, Debug)]
pub struct ProtectConfig {
    /// Whether the VM is new to the witness.
    pub register: bool,
    /// Devices whose output need not survive; by default the console, which goes to a file for whoever looks for an error.
    pub disposable: Option<Vec<String>>,
    /// A fault point to arm.
    pub fault: Option<Fault>,
    /// Further arguments.
    pub extra: Vec<String>,
}

impl Default for ProtectConfig {
    fn default() -> ProtectConfig {
        ProtectConfig {
            register: true,
            disposable: None,
            fault: None,
            extra: Vec::new(),
        }
    }
}

/// A fault point that is armed in a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `NAME[@N]:ACTION`.
    pub place: String,
    /// Count passes only once this file is there.
    pub from: Option<PathBuf>,
}

/// How the agent is started.
#[derive(Clone, Debug, Default)]
pub struct AgentConfig {
    /// What starts it: words in front of its command line, which exec it.
    pub wrapper: Vec<String>,
    /// Compare all memory with the commit before a guest runs.
    pub verify_activation: bool,
    /// A fault point to arm.
    pub fault: Option<Fault>,
    /// Further arguments.
    pub extra: Vec<String>,
}

impl Lab {
    /// The folder of a host's certificates.
    fn pki(&self, host: Host) -> PathBuf {
        self.run_path("pki").join(host.name())
    }

    /// The admin socket of a host's daemon.
    #[must_use]
    pub fn admin(&self, host: Host) -> PathBuf {
        self.run_path(&format!("{}.admin", host.name()))
    }

    fn program(&self, name: &str) -> Result<String> {
        Ok(word(&self.paths.binary(name)?))
    }

    /// Makes the certificates of all hosts.
    ///
    /// # Errors
    /// What `romulus pki init` says.
    pub fn init_pki(&self) -> Result<()> {
        let mut argv = vec![
            self.program("romulus")?,
            "pki".into(),
            "init".into(),
            "--dir".into(),
        ];
        argv.push(word(&self.run_path("pki")));
        for host in [Host::Primary, Host::Backup, Host::Witness] {
            argv.extend(["--host".into(), format!("{},{}", host.name(), host.ip())]);
        }
        self.output(Host::Client, &argv)
            .context("cannot make certificates")?;
        Ok(())
    }

    /// Starts the witness.
    ///
    /// # Errors
    /// When it is not built or does not come up.
    pub fn start_witness(&self) -> Result<Process> {
        self.start_witness_with(None)
    }

    /// The same, with a fault point armed.
    ///
    /// # Errors
    /// As [`Lab::start_witness`].
    pub fn start_witness_with(&self, fault: Option<&Fault>) -> Result<Process> {
        let store = self.run_path("witness");
        if !store.exists() {
            let argv = [
                self.program("witness")?,
                "init".into(),
                "--dir".into(),
                word(&store),
            ];
            self.output(Host::Witness, &argv)
                .context("cannot make the witness's store")?;
        }
        let mut argv = armed(fault);
        argv.extend([self.program("witness")?, "run".into()]);
        push(
            &mut argv,
            "--listen",
            &format!("{}:{WITNESS_PORT}", Host::Witness.ip()),
        );
        push(&mut argv, "--dir", &word(&store));
        push(&mut argv, "--pki", &word(&self.pki(Host::Witness)));
        push(&mut argv, "--admin", &word(&self.admin(Host::Witness)));
        self.start_daemon(Host::Witness, "witness", &argv)
    }

    /// Starts the backup's agent.
    ///
    /// # Errors
    /// When it is not built or does not come up.
    pub fn start_agent(&self) -> Result<Process> {
        self.start_agent_with(&AgentConfig::default())
    }

    /// The same, in another way.
    ///
    /// # Errors
    /// As [`Lab::start_agent`].
    pub fn start_agent_with(&self, config: &AgentConfig) -> Result<Process> {
        self.start_daemon(Host::Backup, "backup-agent", &self.agent_argv(config)?)
    }

    /// The command line of the backup's agent.
    ///
    /// # Errors
    /// When it is not built, or its settings can't be written.
    pub fn agent_argv(&self, config: &AgentConfig) -> Result<Vec<String>> {
        let mut argv = armed(config.fault.as_ref());
        argv.extend(config.wrapper.iter().cloned());
        argv.extend([self.program("backup-agent")?, "run".into()]);
        if config.verify_activation {
            argv.push("--verify-activation".into());
        }
        push(&mut argv, "--host", Host::Backup.name());
        push(
            &mut argv,
            "--listen",
            &format!("{}:{AGENT_PORT}", Host::Backup.ip()),
        );
        push(
            &mut argv,
            "--witness",
            &format!("{}:{WITNESS_PORT}", Host::Witness.ip()),
        );
        push(&mut argv, "--pki", &word(&self.pki(Host::Backup)));
        push(&mut argv, "--image-dir", &word(&self.images));
        push(&mut argv, "--state-dir", &word(&self.run_path("agent-state")));
        push(&mut argv, "--bridge", BRIDGE);
        push(&mut argv, "--admin", &word(&self.admin(Host::Backup)));
        push(&mut argv, "--log-format", "json");
        self.push_settings(Host::Backup, &mut argv, &config.extra)?;
        Ok(argv)
    }

    /// The command line of `replicator protect`.
    ///
    /// # Errors
    /// When it is not built.
    pub fn protect_argv(&self, config: &ProtectConfig) -> Result<Vec<String>> {
        let mut argv = armed(config.fault.as_ref());
        argv.extend([self.program("replicator")?, "protect".into()]);
        push(&mut argv, "--vm", VM);
        push(&mut argv, "--host", Host::Primary.name());
        match self.vmm {
            Vmm::Qemu => {
                push(&mut argv, "--qmp", &word(&qmp(self)));
                push(&mut argv, "--fifo-dir", &word(&self.run));
            }
            Vmm::Testbed => push(&mut argv, "--attach", &word(&attach(self))),
        }
        push(
            &mut argv,
            "--backup",
            &format!("{}@{}:{AGENT_PORT}", Host::Backup.name(), Host::Backup.ip()),
        );
        push(
            &mut argv,
            "--witness",
            &format!("{}:{WITNESS_PORT}", Host::Witness.ip()),
        );
        push(&mut argv, "--tap", TAP);
        push(&mut argv, "--pki", &word(&self.pki(Host::Primary)));
        push(&mut argv, "--admin", &word(&self.admin(Host::Primary)));
        push(
            &mut argv,
            "--state-dir",
            &word(&self.run_path("replicator-state")),
        );
        if config.register {
            argv.push("--register".into());
        }
        let console = match self.vmm {
            Vmm::Qemu => "console",
            Vmm::Testbed => "serial",
        };
        for id in config.disposable.as_deref().unwrap_or(&[console.to_owned()]) {
            push(&mut argv, "--disposable", id);
        }
        push(&mut argv, "--log-format", "json");
        self.push_settings(Host::Primary, &mut argv, &config.extra)?;
        Ok(argv)
    }

    /// Starts `replicator protect` and does not wait for anything.
    ///
    /// # Errors
    /// When it is not built.
    pub fn start_replicator(&self, config: &ProtectConfig) -> Result<Process> {
        self.spawn(Host::Primary, "replicator", &self.protect_argv(config)?)
    }

    /// Adds further arguments and, unless they name a settings file, one that has every epoch logged, and that tells the agent
    /// how a standby of the testbed is started.
    fn push_settings(&self, host: Host, argv: &mut Vec<String>, extra: &[String]) -> Result<()> {
        if !extra.iter().any(|word| word == "--config") {
            let path = self.run_path(&format!("{host}.settings.toml"));
            let mut settings = "[log]\nlevel = \"info,epochs=debug\"\n".to_owned();
            if host == Host::Backup && self.vmm == Vmm::Testbed {
                let standby = [self.program("testbed")?, "standby".to_owned()];
                settings.push_str(&format!("\n[[vmm]]\nname = \"testbed\"\nstandby = {standby:?}\n"));
            }
            std::fs::write(&path, settings).with_context(|| format!("cannot write {}", path.display()))?;
            push(argv, "--config", &word(&path));
        }
        argv.extend(extra.iter().cloned());
        Ok(())
    }

    /// What `witness show --json` says of the VM: null when it is not known.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn record(&self) -> Result<Value> {
        let argv = [
            self.program("witness")?,
            "show".into(),
            "--json".into(),
            "--dir".into(),
            word(&self.run_path("witness")),
        ];
        let text = self.output(Host::Witness, &argv)?;
        let shown: Value = serde_json::from_str(&text).context("`witness show` printed no JSON")?;
        Ok(shown["records"][0].clone())
    }

    /// What `romulus status --json` says of a host's daemon.
    ///
    /// # Errors
    /// When the daemon does not answer, or not in JSON.
    pub fn status(&self, host: Host) -> Result<Value> {
        let argv = self.romulus_argv(host, &["status", "--json"])?;
        let text = self.output_or(host, &argv, &[NOT_PROTECTED])?;
        let status: Value = serde_json::from_str(&text)
            .context("`romulus status --json` printed something else than JSON")?;
        Document::shipped()
            .check("GET", "/v1/status", 200, &status)
            .map_err(|problem| anyhow!("docs/openapi.json does not fit the status: {problem}"))?;
        Ok(status)
    }

    /// Runs `romulus` against a host's daemon.
    ///
    /// # Errors
    /// When it fails; the error has what it said.
    pub fn romulus(&self, host: Host, words: &[&str]) -> Result<String> {
        self.output(host, &self.romulus_argv(host, words)?)
    }

    /// The verdict of `romulus may-run` on a host: `may_run`, `must_not_run` or `unknown`.
    ///
    /// # Errors
    /// When it fails, or prints something else.
    pub fn may_run(&self, host: Host) -> Result<String> {
        let mut argv = ["may-run", VM, "--json"].map(str::to_owned).to_vec();
        argv.insert(0, self.program("romulus")?);
        push(
            &mut argv,
            "--witness",
            &format!("{}:{WITNESS_PORT}", Host::Witness.ip()),
        );
        push(&mut argv, "--pki", &word(&self.pki(host)));
        push(&mut argv, "--state-dir", &word(&self.run_path("no-state")));
        push(&mut argv, "--timeout", "2s");
        let text = self.output_or(host, &argv, &MAY_NOT_RUN)?;
        let answer: Value = serde_json::from_str(&text).context("`romulus may-run` printed no JSON")?;
        let verdict = answer.get("verdict").and_then(Value::as_str);
        verdict
            .map(str::to_owned)
            .with_context(|| format!("no verdict in {answer}"))
    }

    /// The records that the witness has, as `witness show` prints them.
    ///
    /// # Errors
    /// When the witness does not answer.
    pub fn records(&self) -> Result<String> {
        let mut argv = vec![self.program("witness")?, "show".into()];
        push(&mut argv, "--dir", &word(&self.run_path("witness")));
        self.output(Host::Witness, &argv)
    }

    /// The command line of `romulus` for a host's daemon.
    ///
    /// # Errors
    /// When it is not built.
    pub fn romulus_argv(&self, host: Host, words: &[&str]) -> Result<Vec<String>> {
        let mut argv = vec![self.program("romulus")?];
        argv.extend(words.iter().map(|word| (*word).to_owned()));
        push(&mut argv, "--admin", &word(&self.admin(host)));
        Ok(argv)
    }

    /// Waits until the primary's daemon says that the guest is protected, and returns that status.
    ///
    /// # Errors
    /// When it does not in time, with the last status and the end of the replicator's log.
    pub fn wait_protected(&self, replicator: &mut Process, at_most: Duration) -> Result<Value> {
        let mut last = String::from("no status yet");
        let waited = wait_for("protection", at_most, || {
            if let Some(status) = replicator.ended() {
                return Some(Err(anyhow::anyhow!("the replicator ended ({status})")));
            }
            match self.status(Host::Primary) {
                Ok(status) if status.get("state").and_then(Value::as_str) == Some("protected") => {
                    Some(Ok(status))
                }
                Ok(status) => {
                    last = status.to_string();
                    None
                }
                Err(error) => {
                    last = format!("{error:#}");
                    None
                }
            }
        });
        waited.and_then(|result| result).map_err(|error| {
            let (log, tail) = (replicator.log().display().to_string(), replicator.tail());
            anyhow::anyhow!("{error:#}\nlast status: {last}\nthe end of {log}:\n{tail}")
        })
    }

    fn start_daemon(&self, host: Host, name: &str, argv: &[String]) -> Result<Process> {
        let mut daemon = self.spawn(host, name, argv)?;
        let socket = self.admin(host);
        let up = wait_for(
            &format!("the admin socket of {name}"),
            Duration::from_secs(10),
            || {
                if let Some(status) = daemon.ended() {
                    return Some(Err(anyhow::anyhow!("{name} ended ({status})")));
                }
                std::os::unix::net::UnixStream::connect(&socket)
                    .ok()
                    .map(|_| Ok(()))
            },
        );
        up.and_then(|result| result)
            .with_context(|| format!("{name} says:\n{}", daemon.tail()))?;
        Ok(daemon)
    }
}

/// The beginning of a command line with a fault point armed, or none.
fn armed(fault: Option<&Fault>) -> Vec<String> {
    let Some(fault) = fault else { return Vec::new() };
    let mut argv = vec!["env".to_owned(), format!("ROMULUS_FAULT={}", fault.place)];
    // As an installation has it: to look the names of a panic's functions up takes longer than a suspicion timeout.
    argv.push("RUST_BACKTRACE=0".to_owned());
    argv.extend(
        fault
            .from
            .iter()
            .map(|file| format!("ROMULUS_FAULT_FROM={}", word(file))),
    );
    argv
}

fn push(argv: &mut Vec<String>, name: &str, value: &str) {
    argv.extend([name.to_owned(), value.to_owned()]);
}
