//! A lab in which a guest serves clients and every instrument runs: where the demo and most tests begin.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::audit::{Audit, audit};
use crate::benchmark::Benchmark;
use crate::client::{Client, ClientConfig, ClientReport};
use crate::daemons::{AgentConfig, ProtectConfig};
use crate::guest::{Guest, GuestConfig};
use crate::pinger::Pinger;
use crate::probe::Probe;
use crate::resp::Redis;
use crate::sniffer::Sniffer;
use crate::timeline::Timeline;
use crate::{Host, Lab, Paths, Process, Stamp, Vmm, wait_for};

/// Events of every epoch: too many to be shown.
const EVERY_EPOCH: &[&str] = &["barrier", "commit"];
/// A guest boots in three seconds; a busy machine takes its time.
const BOOT_AT_MOST: Duration = Duration::from_secs(90);
const PROTECT_AT_MOST: Duration = Duration::from_secs(120);
const AUDIT_SETTLES: Duration = Duration::from_millis(300);
const DRAIN_AT_MOST: Duration = Duration::from_secs(60);

/// What a stage is made of.
#[derive(Clone, Debug)]
pub struct StageConfig {
    /// The guest.
    pub guest: GuestConfig,
    /// The client's load.
    pub client: ClientConfig,
    /// The mean time between two requests of the probe.
    pub probe_every: Duration,
    /// The seed of the probe's arrivals.
    pub seed: u64,
    /// Whether events are printed.
    pub print: bool,
    /// How the agent is started.
    pub agent: AgentConfig,
    /// Leave the daemons out: the lab, the guest and the instruments only.
    pub without_daemons: bool,
    /// Have `redis-benchmark` load the guest beside the client; it has to be installed.
    pub benchmark: bool,
}

impl Default for StageConfig {
    fn default() -> StageConfig {
        StageConfig {
            guest: GuestConfig::default(),
            client: ClientConfig::default(),
            probe_every: Duration::from_millis(15),
            seed: 1,
            print: false,
            agent: AgentConfig::default(),
            without_daemons: false,
            benchmark: false,
        }
    }
}

/// Everything that runs. The fields are dropped in this order: the instruments, the daemons, the lab.
#[derive(Debug)]
pub struct Stage {
    client: Option<Client>,
    /// The load beside it.
    pub benchmark: Option<Benchmark>,
    /// The open-loop probe.
    pub probe: Probe,
    _pinger: Pinger,
    /// What the guest sends on the primary, before any gate.
    pub from_guest: Sniffer,
    /// What comes from the primary.
    pub from_primary: Sniffer,
    /// What comes from the backup.
    pub from_backup: Sniffer,
    /// The primary's replicator, once there is one.
    pub replicator: Option<Process>,
    /// Operator's commands that have not ended.
    pub orders: Vec<Process>,
    /// The guest on the primary.
    pub guest: Guest,
    /// The backup's agent.
    pub agent: Option<Process>,
    /// The witness.
    pub witness: Option<Process>,
    /// What happened.
    pub timeline: Timeline,
    /// The lab itself.
    pub lab: Lab,
}

impl Stage {
    /// Builds the lab, starts the daemons but for the replicator, boots the guest and puts it to work.
    ///
    /// # Errors
    /// When any of that fails; the error has the end of the log.
    pub fn raise(paths: &Paths, prefix: &str, config: &StageConfig) -> Result<Stage> {
        let mut lab = Lab::new(paths.clone(), prefix)?;
        lab.vmm = config.guest.vmm();
        let mut timeline = Timeline::new(config.print, EVERY_EPOCH);
        let note =
            |timeline: &Timeline, name: &str, detail: &str| timeline.add(Stamp::now(), "lab", name, detail);
        note(
            &timeline,
            "network_up",
            "client, primary, backup, witness around a switch",
        );
        let mut guest = Guest::start(&lab, &config.guest)?;
        let (witness, agent) = if config.without_daemons {
            (None, None)
        } else {
            start_daemons(&lab, &config.agent)?
        };
        if let Some(agent) = &agent {
            timeline.follow("backup", agent.log());
        }
        guest.wait_ready(BOOT_AT_MOST)?;
        guest.wait_redis(&lab, BOOT_AT_MOST)?;
        note(
            &timeline,
            "guest_serves",
            match lab.vmm {
                Vmm::Qemu => "redis answers on 10.77.0.2:6379; nothing of ours is attached yet",
                Vmm::Testbed => "its key-value service answers on 10.77.0.2:6379; nobody is attached yet",
            },
        );
        let from_guest = Sniffer::start_at_tap(&lab)?;
        let from_primary = Sniffer::start(&lab, Host::Primary)?;
        let from_backup = Sniffer::start(&lab, Host::Backup)?;
        let pinger = Pinger::start(&lab, Duration::from_millis(10))?;
        let client = Client::start(&lab, config.client)?;
        let benchmark = config.benchmark.then(|| Benchmark::start(&lab)).transpose()?;
        let probe = Probe::start(&lab, config.probe_every, config.seed)?;
        note(&timeline, "client_writes", "one TCP connection, pipelined SETs");
        Ok(Stage {
            client: Some(client),
            benchmark,
            probe,
            _pinger: pinger,
            from_guest,
            from_primary,
            from_backup,
            replicator: None,
            orders: Vec::new(),
            guest,
            agent,
            witness,
            timeline,
            lab,
        })
    }

    /// Starts the agent, in the place of one that runs.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&mut self, config: &AgentConfig) -> Result<()> {
        drop(self.agent.take());
        let agent = self.lab.start_agent_with(config)?;
        self.timeline.follow("backup", agent.log());
        self.agent = Some(agent);
        Ok(())
    }

    /// Starts the replicator and waits until it says *protected*; returns the status that says so.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn protect(&mut self, config: &ProtectConfig) -> Result<Value> {
        let mut replicator = self.lab.start_replicator(config)?;
        self.timeline.follow("primary", replicator.log());
        let status = self.lab.wait_protected(&mut replicator, PROTECT_AT_MOST);
        self.replicator = Some(replicator);
        let status = status?;
        self.timeline
            .add(Stamp::now(), "lab", "protected", "`romulus status` says so");
        Ok(status)
    }

    /// Kills the VMM and the replicator at once, as if their host had died, and returns when.
    ///
    /// # Errors
    /// When one of them has ended before.
    pub fn kill_primary(&mut self) -> Result<Stamp> {
        let replicator = self
            .replicator
            .as_mut()
            .ok_or_else(|| anyhow!("there is no replicator to kill"))?;
        let at = Stamp::now();
        self.guest
            .kill_now()
            .context("the VMM is gone before it was killed")?;
        replicator
            .signal(Signal::KILL)
            .context("the replicator is gone before it was killed")?;
        let victims = format!("SIGKILL to {} and the replicator", self.lab.vmm.name());
        self.timeline.add(at, "lab", "kill", &victims);
        // Reaped, so that they do not stay as zombies that signals still reach.
        replicator.kill();
        self.guest.process_mut().kill();
        Ok(at)
    }

    /// Whether what has left the primary's host until now had been committed; see [`audit`].
    #[must_use]
    pub fn audit(&self) -> Audit {
        let until = Stamp::now();
        let judge = || {
            let mut left = self.from_primary.frames();
            left.retain(|frame| frame.at <= until);
            audit(&self.from_guest.frames(), &left, &self.timeline.events())
        };
        // What the sniffers captured and the daemons logged last has yet to be read.
        sleep(AUDIT_SETTLES);
        let first = judge();
        if first.uncommitted_frames == 0 {
            return first;
        }
        sleep(AUDIT_SETTLES * 5);
        judge()
    }

    /// The running client.
    ///
    /// # Errors
    /// When it has been finished.
    pub fn client(&self) -> Result<&Client> {
        self.client
            .as_ref()
            .ok_or_else(|| anyhow!("the client has been finished"))
    }

    /// Waits until the client has an answer that came after `from`.
    ///
    /// # Errors
    /// When it does not, or the connection broke.
    pub fn wait_ack_after(&self, from: Stamp, at_most: Duration) -> Result<Stamp> {
        let client = self.client()?;
        wait_for("an answer to the client", at_most, || {
            if let Some(trouble) = client.trouble() {
                return Some(Err(anyhow!("the client's connection: {trouble}")));
            }
            client.last_ack().filter(|at| *at > from).map(Ok)
        })?
    }

    /// Has another client write, on a connection of its own, after the last one was finished.
    ///
    /// # Errors
    /// When redis cannot be reached.
    pub fn start_client(&mut self, config: ClientConfig) -> Result<()> {
        self.client = Some(Client::start(&self.lab, config)?);
        Ok(())
    }

    /// Stops the client and reads everything back.
    ///
    /// # Errors
    /// As [`Client::finish`].
    pub fn finish_client(&mut self) -> Result<ClientReport> {
        let client = self
            .client
            .take()
            .ok_or_else(|| anyhow!("the client has been finished"))?;
        client.finish(&self.lab, DRAIN_AT_MOST)
    }

    /// Finishes the client. It must have lost nothing: no acknowledged write, no connection.
    ///
    /// # Errors
    /// What it lost, or as [`Stage::finish_client`].
    pub fn ensure_nothing_lost(&mut self) -> Result<()> {
        let report = self.finish_client()?;
        ensure!(
            (report.lost, report.resets, report.refused) == (0, 0, 0),
            "{} acknowledged writes lost, {} connections reset, {} refused: {:?}",
            report.lost,
            report.resets,
            report.refused,
            report.trouble
        );
        Ok(())
    }

    /// The testbed's guest must have found nothing wrong in itself: no byte, no register, no interrupt, no step of its clock.
    ///
    /// # Errors
    /// What it found, or that it does not answer.
    pub fn ensure_guest_is_whole(&self) -> Result<()> {
        Redis::connect(&self.lab, Duration::from_secs(5))?.self_check()
    }

    /// Sends the testbed's guest a command and does not wait for an answer: it may be its end.
    ///
    /// # Errors
    /// When its service cannot be reached.
    pub fn tell_guest(&self, words: &[&str]) -> Result<()> {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        Redis::connect(&self.lab, Duration::from_secs(5))?.tell(&words)
    }

    /// By how much the guest's clock is ahead of this machine's, in microseconds.
    ///
    /// # Errors
    /// When redis does not answer.
    pub fn clock_ahead_us(&self) -> Result<i64> {
        Redis::connect(&self.lab, Duration::from_secs(5))?.clock_ahead_us(self.lab.vmm)
    }
}

fn start_daemons(lab: &Lab, agent: &AgentConfig) -> Result<(Option<Process>, Option<Process>)> {
    lab.init_pki()?;
    let witness = lab.start_witness()?;
    let agent = lab.start_agent_with(agent)?;
    Ok((Some(witness), Some(agent)))
}
