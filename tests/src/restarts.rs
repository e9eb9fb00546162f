//! An agent with many protected VMs that systemd restarts, or finds dead: how long until all are protected again, what is sent again
//! for that, and whether what it had committed is still there.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::crowd::{AT_MOST, Crowd, CrowdConfig};
use crate::guest::runs_guest;
use crate::systemd::AgentUnit;
use crate::timeline::{Event, Timeline};
use crate::{Host, Lab, Paths, Stamp, wait_for};

const HOST: &str = "left";
/// A strike comes within so long after the last one's VMs are protected.
const STRIKE_WITHIN_MS: u64 = 700;
/// Events of every epoch: too many to be shown.
const EVERY_EPOCH: &[&str] = &["barrier", "commit"];

/// What is struck.
#[derive(Clone, Debug)]
pub struct RestartsConfig {
    /// VMs, all protected to the one agent.
    pub vms: u16,
    /// Memory of each guest in MiB.
    pub memory_mib: u32,
    /// What each guest writes, as the testbed's `dirty=` word has it. What it writes while the agent is away has to be sent.
    pub dirty: String,
    /// Whether the daemons' events are printed.
    pub print: bool,
}

impl Default for RestartsConfig {
    fn default() -> RestartsConfig {
        RestartsConfig {
            vms: 8,
            memory_mib: 64,
            // 1,600 pages a second, within one MiB.
            dirty: "random/counter:40:25:1".to_owned(),
            print: false,
        }
    }
}

/// How the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// `systemctl restart`.
    Restart,
    /// SIGKILL, and systemd starts it again.
    Kill,
}

/// What followed a strike.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// From the strike until the last VM was protected again, in milliseconds.
    pub protected_ms: f64,
    /// The same of the first VM.
    pub first_protected_ms: f64,
    /// From the strike until the agent was there again, in milliseconds.
    pub agent_ms: f64,
    /// Of each VM, in this order: pages that were sent again, by the memory that it has. A page that changed while the copy went on
    /// counts twice.
    pub sent_ratios: Vec<f64>,
    /// Of each VM, in this order: the longest pause of a guest since it is protected again, in milliseconds.
    pub pauses_ms: Vec<f64>,
}

impl Outcome {
    /// Sent again of all memory together.
    #[must_use]
    pub fn sent_ratio(&self) -> f64 {
        let count = u32::try_from(self.sent_ratios.len()).unwrap_or(u32::MAX);
        self.sent_ratios.iter().sum::<f64>() / f64::from(count.max(1))
    }

    /// Sent again of the VM that took the most.
    #[must_use]
    pub fn worst_sent_ratio(&self) -> f64 {
        self.sent_ratios.iter().copied().fold(0.0, f64::max)
    }

    /// The longest pause of any guest.
    #[must_use]
    pub fn pause_ms(&self) -> f64 {
        self.pauses_ms.iter().copied().fold(0.0, f64::max)
    }
}

/// The VMs and their agent.
#[derive(Debug)]
pub struct Restarts {
    timeline: Timeline,
    crowd: Crowd<AgentUnit>,
    names: Vec<String>,
    pages: f64,
}

impl Restarts {
    /// Starts everything, and protects all VMs.
    ///
    /// # Errors
    /// When rights or programs are missing, or a VM does not come to be protected.
    pub fn raise(paths: &Paths, prefix: &str, config: &RestartsConfig) -> Result<Restarts> {
        let guests = CrowdConfig {
            memory_mib: config.memory_mib,
            dirty: config.dirty.clone(),
            ..CrowdConfig::default()
        };
        let start =
            |lab: &Lab, guests: &CrowdConfig| AgentUnit::start(lab, &guests.agent, &guests.agent_tables);
        let mut crowd = Crowd::raise_with(paths, prefix, &[HOST], guests, start)?;
        let mut timeline = Timeline::new(config.print, EVERY_EPOCH);
        timeline.follow("agent", crowd.agent.log());
        let names: Vec<String> = (0..config.vms).map(|vm| format!("vm-{vm}")).collect();
        for name in &names {
            crowd.add(HOST, name, None)?;
        }
        crowd.protect_all()?;
        for name in &names {
            timeline.follow(name, crowd.replicator(name)?.log());
        }
        Ok(Restarts {
            timeline,
            crowd,
            names,
            pages: f64::from(config.memory_mib) * 256.0,
        })
    }

    /// Ends the agent at a random moment and waits until all VMs are protected again.
    ///
    /// # Errors
    /// When one of them does not come to be, its guest does not run or finds something wrong, or a commit is gone.
    pub fn strike(&mut self, strike: Strike) -> Result<Outcome> {
        sleep(Duration::from_millis(Stamp::now().micros() % STRIKE_WITHIN_MS));
        let at = Stamp::now();
        match strike {
            Strike::Restart => self.crowd.agent.restart()?,
            Strike::Kill => self.crowd.agent.kill()?,
        }
        let ready = self.wait_event("agent", "ready", at)?;
        let mut paired = Vec::new();
        let mut sent_ratios = Vec::new();
        for name in &self.names {
            let event = self.wait_event(name, "paired", at)?;
            let copies = self.events(name, "first_copy_sent", at, event.at);
            let sent: Vec<u64> = copies
                .iter()
                .map(|copy| number(copy, "sent_pages"))
                .collect::<Result<_>>()?;
            let sent = u32::try_from(sent.iter().sum::<u64>())?;
            sent_ratios.push(f64::from(sent) / self.pages);
            paired.push(event.at.ms_since(at));
        }
        let mut pauses_ms = Vec::new();
        for name in &self.names.clone() {
            self.crowd.wait_protected(name)?;
            let status = self.crowd.status(name)?;
            let longest = status["pause_ms"]["max"].as_f64();
            pauses_ms.push(longest.with_context(|| format!("no pauses in {status}"))?);
        }
        self.ensure_commits_intact(at, strike)?;
        self.ensure_guests_run(at)?;
        Ok(Outcome {
            protected_ms: paired.iter().copied().fold(0.0, f64::max),
            first_protected_ms: paired.iter().copied().fold(f64::INFINITY, f64::min),
            agent_ms: ready.at.ms_since(at),
            sent_ratios,
            pauses_ms,
        })
    }

    /// Each image that the agent's new life found is that of the last commit that the old one spoke of: unless that had heard
    /// from the witness, while it ended, that the VM's host speaks alone since. Such a commit may never be used again.
    fn ensure_commits_intact(&self, at: Stamp, strike: Strike) -> Result<()> {
        for name in &self.names {
            let of_vm = |what: &'static str| {
                self.timeline
                    .select(|event| event.source == "agent" && event.vm == *name && event.name == what)
            };
            let found = of_vm("image_found").into_iter().find(|event| event.at >= at);
            let found = found.with_context(|| format!("the agent did not find an image of {name}"))?;
            let last = of_vm("commit").into_iter().rfind(|event| event.at < found.at);
            let last = last.with_context(|| format!("the agent never had a commit of {name}"))?;
            let given_up = of_vm("protection").into_iter().any(|event| {
                (last.at..found.at).contains(&event.at) && event.detail.contains("reason=no backup")
            });
            if given_up {
                ensure!(
                    strike == Strike::Restart,
                    "an agent that was killed gave {name} up"
                );
                continue;
            }
            ensure!(
                field(&found, "session") == field(&last, "session")
                    && number(&found, "epoch")? >= number(&last, "epoch")?,
                "{name}: the last commit was {:?}, found was {:?}",
                last.detail,
                found.detail
            );
        }
        Ok(())
    }

    fn ensure_guests_run(&self, since: Stamp) -> Result<()> {
        ensure!(
            self.events("agent", "activated", since, Stamp::now()).is_empty(),
            "the agent took a guest over"
        );
        for name in &self.names {
            ensure!(
                runs_guest(self.crowd.guest(name)?.pid()?)?,
                "the guest of {name} is paused"
            );
            self.crowd.ensure_whole(name)?;
        }
        Ok(())
    }

    /// Nothing has been left behind by the agent's lives.
    ///
    /// # Errors
    /// What has.
    pub fn ensure_nothing_left(&self) -> Result<()> {
        let units = self.crowd.agent.standby_units()?;
        ensure!(units.len() == self.names.len(), "standbys: {units:?}");
        Ok(())
    }

    /// How many files systemd keeps for the agent.
    ///
    /// # Errors
    /// When systemd does not say.
    pub fn kept_files(&self) -> Result<u32> {
        self.crowd.agent.kept_files()
    }

    /// Kills the VMs' host, and waits until all of them serve from the backup.
    ///
    /// # Errors
    /// When one does not, or finds something wrong in itself.
    pub fn kill_host(&mut self) -> Result<()> {
        self.crowd.kill_host(HOST)?;
        for name in &self.names {
            self.crowd.wait_serves(name)?;
            self.crowd.ensure_whole(name)?;
        }
        ensure_let_out(&self.timeline)
    }

    fn events(&self, source: &str, name: &str, from: Stamp, to: Stamp) -> Vec<Event> {
        self.timeline
            .select(|event| event.source == source && event.name == name && (from..=to).contains(&event.at))
    }

    fn wait_event(&self, source: &str, name: &str, from: Stamp) -> Result<Event> {
        let found = || self.events(source, name, from, Stamp::now()).into_iter().next();
        wait_for(&format!("{name} of {source}"), AT_MOST, found)
            .map_err(|error| anyhow!("{error:#}; the agent: {:?}", self.crowd.lab.status(Host::Backup)))
    }
}

/// The agent has said of no guest that it took over that something keeps it from the network.
///
/// # Errors
/// What it said.
pub fn ensure_let_out(timeline: &Timeline) -> Result<()> {
    let complaints = timeline.select(|event| ["not_announced", "not_joined"].contains(&event.name.as_str()));
    ensure!(complaints.is_empty(), "{complaints:?}");
    Ok(())
}

/// A word of an event's detail.
fn field<'e>(event: &'e Event, name: &str) -> Option<&'e str> {
    let mut words = event.detail.split_whitespace();
    words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

/// The figure of a field in an event's detail.
///
/// # Errors
/// When it has none.
pub fn number(event: &Event, name: &str) -> Result<u64> {
    let figure = field(event, name).and_then(|figure| figure.parse().ok());
    figure.with_context(|| format!("no figure {name} in {} {:?}", event.name, event.detail))
}
