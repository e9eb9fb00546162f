//! Many small KVM guests of one or two primary hosts on one agent.
//!
//! All guests run in the lab's namespace of the primary, each on a tap of its own; what makes them VMs of several hosts is the
//! name and the certificate of their replicators. A host "dies" when all its VMMs and replicators are killed.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use romulus_host_sys::tap::Tap;
use romulus_telemetry::AdminClient;
use rustix::process::Signal;
use serde_json::Value;

use crate::daemons::{AgentConfig, Fault};
use crate::guest::{GuestConfig, QemuConfig, qmp};
use crate::lab::word;
use crate::links::Links;
use crate::namespace::within;
use crate::netns::{BRIDGE, GUEST_IP, Host, TAP};
use crate::resp::Redis;
use crate::{Lab, Paths, Process, Stamp, Vmm, wait_for};

mod guests;

/// Where guests' addresses begin in the lab's network.
const FIRST_GUEST: u8 = 100;
/// More do not have addresses.
const VMS_MAX: usize = 100;
/// Waiting for anything at all: several machines may be busy with other things.
pub const AT_MOST: Duration = Duration::from_secs(180);
const ANSWER_AT_MOST: Duration = Duration::from_secs(60);
/// A connection that is not answered is tried afresh instead of waiting for TCP's second try.
const CONNECT_AT_MOST: Duration = Duration::from_millis(100);

/// What the guests are.
#[derive(Clone, Debug)]
pub struct CrowdConfig {
    /// Memory of each guest in MiB.
    pub memory_mib: u32,
    /// What each guest writes, as the testbed's `dirty=` word has it; nothing when empty.
    pub dirty: String,
    /// Virtual processors of each guest, 1 to 4.
    pub vcpus: u32,
    /// Further words of each guest's command line.
    pub words: String,
    /// Settings of the agent, as TOML: keys outside of tables only.
    pub agent: String,
    /// Tables of the agent's settings, as TOML.
    pub agent_tables: String,
    /// A fault point to arm in the agent.
    pub agent_fault: Option<Fault>,
    /// Settings of the replicators, as TOML.
    pub replicators: String,
}

impl Default for CrowdConfig {
    fn default() -> CrowdConfig {
        CrowdConfig {
            memory_mib: 64,
            dirty: "random/counter:100:25".to_owned(),
            vcpus: 1,
            words: String::new(),
            agent: String::new(),
            agent_tables: String::new(),
            agent_fault: None,
            replicators: String::new(),
        }
    }
}

/// One VM.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its primary host.
    pub host: String,
    vmm: Vmm,
    tap: String,
    ip: Ipv4Addr,
    guest: Process,
    replicator: Option<Process>,
}

/// The lab with its guests. The fields are dropped in this order. The agent is a process of the lab, or whatever hosts one.
#[derive(Debug)]
pub struct Crowd<A = Process> {
    /// The VMs.
    pub members: Vec<Member>,
    /// The agent.
    pub agent: A,
    /// The witness.
    pub witness: Process,
    config: CrowdConfig,
    /// The lab.
    pub lab: Lab,
}

impl Crowd {
    /// Builds the lab and starts witness and agent; `hosts` are the names of primary hosts.
    ///
    /// # Errors
    /// When rights or programs are missing.
    pub fn raise(paths: &Paths, prefix: &str, hosts: &[&str], config: CrowdConfig) -> Result<Crowd> {
        Crowd::raise_with(paths, prefix, hosts, config, start_agent)
    }
}

impl<A: Sync> Crowd<A> {
    /// The same, with an agent that is started in another way.
    ///
    /// # Errors
    /// As [`Crowd::raise`], or what `start` says.
    pub fn raise_with(
        paths: &Paths,
        prefix: &str,
        hosts: &[&str],
        config: CrowdConfig,
        start: impl FnOnce(&Lab, &CrowdConfig) -> Result<A>,
    ) -> Result<Crowd<A>> {
        let mut lab = Lab::new(paths.clone(), prefix)?;
        lab.vmm = Vmm::Testbed;
        let mut argv = ["pki", "init", "--dir"].map(str::to_owned).to_vec();
        argv.insert(0, word(&lab.paths.binary("romulus")?));
        argv.push(word(&lab.run_path("pki")));
        let fixed = [Host::Backup, Host::Witness].map(|host| format!("{},{}", host.name(), host.ip()));
        let primaries = hosts.iter().map(|host| format!("{host},{}", Host::Primary.ip()));
        for host in primaries.chain(fixed) {
            argv.extend(["--host".to_owned(), host]);
        }
        lab.output(Host::Client, &argv)
            .context("cannot make certificates")?;
        let witness = lab.start_witness()?;
        let agent = start(&lab, &config)?;
        Ok(Crowd {
            members: Vec::new(),
            agent,
            witness,
            config,
            lab,
        })
    }

    /// Boots another guest on a host.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn add(&mut self, host: &str, name: &str, dirty: Option<&str>) -> Result<()> {
        let number = self.members.len();
        if number >= VMS_MAX {
            bail!("a lab has at most {VMS_MAX} guests");
        }
        let last = FIRST_GUEST + u8::try_from(number)?;
        let ip = Ipv4Addr::new(10, 77, 0, last);
        let tap = format!("tap-{number}");
        within(&self.lab.net.namespace(Host::Primary), || {
            let made = Tap::create(&tap, false).with_context(|| format!("cannot make the tap {tap}"))?;
            made.persist().context("cannot keep the tap")?;
            let mut links = Links::open()?;
            links.join(&tap, BRIDGE)?;
            links.switch(&tap, true)
        })?;
        let mut argv = vec![word(&self.lab.paths.binary("testbed")?), "run".to_owned()];
        let mut add = |option: &str, value: &str| argv.extend([option.to_owned(), value.to_owned()]);
        add("--name", name);
        add("--memory", &self.config.memory_mib.to_string());
        add("--vcpus", &self.config.vcpus.to_string());
        add("--tap", &tap);
        add("--mac", &format!("52:54:00:77:01:{last:02x}"));
        add("--attach", &word(&self.attach(name)));
        add("--serial", &word(&self.lab.logs.join(format!("{name}.console"))));
        let dirty = dirty.unwrap_or(&self.config.dirty);
        let mut words = self.config.words.clone();
        if !dirty.is_empty() {
            words = format!("{words} dirty={dirty}");
        }
        add(
            "--cmdline",
            &format!(
                "ip={ip}/24 ip6=fd77::{last}/64 gw={} port=6379 {words}",
                Host::Client.ip()
            ),
        );
        self.start(Vmm::Testbed, host, name, (ip, tap), &argv)
    }

    /// Boots a Linux in a stock QEMU on a host; a lab has one such guest at most.
    ///
    /// # Errors
    /// When there is one already, or it does not come up.
    pub fn add_qemu(&mut self, host: &str, name: &str) -> Result<()> {
        self.add_qemu_with(host, name, &QemuConfig::default())
    }

    /// The same, of this kind.
    ///
    /// # Errors
    /// As [`Crowd::add_qemu`].
    pub fn add_qemu_with(&mut self, host: &str, name: &str, config: &QemuConfig) -> Result<()> {
        anyhow::ensure!(
            self.members.iter().all(|member| member.vmm != Vmm::Qemu),
            "there is a guest in QEMU already"
        );
        let argv = GuestConfig::Qemu(config.clone()).argv(&self.lab)?;
        self.start(Vmm::Qemu, host, name, (GUEST_IP, TAP.to_owned()), &argv)
    }

    fn start(
        &mut self,
        vmm: Vmm,
        host: &str,
        name: &str,
        (ip, tap): (Ipv4Addr, String),
        argv: &[String],
    ) -> Result<()> {
        let guest = self.lab.spawn(Host::Primary, name, argv)?;
        self.members.push(Member {
            name: name.to_owned(),
            host: host.to_owned(),
            vmm,
            tap,
            ip,
            guest,
            replicator: None,
        });
        self.wait_serves(name).map(drop)
    }

    /// Starts the replicator of a VM and does not wait for anything.
    ///
    /// # Errors
    /// When it is not built.
    pub fn start_replicator(&mut self, name: &str) -> Result<()> {
        let number = self.number(name)?;
        let settings = self.lab.run_path("replicators.toml");
        std::fs::write(&settings, &self.config.replicators).context("cannot write settings")?;
        let member = &self.members[number];
        let (host, tap) = (member.host.clone(), member.tap.clone());
        let mut argv = vec![word(&self.lab.paths.binary("replicator")?), "protect".to_owned()];
        let mut add = |option: &str, value: &str| argv.extend([option.to_owned(), value.to_owned()]);
        add("--config", &word(&settings));
        add("--vm", name);
        add("--host", &host);
        let console = match member.vmm {
            Vmm::Testbed => {
                add("--attach", &word(&self.attach(name)));
                "serial"
            }
            Vmm::Qemu => {
                add("--qmp", &word(&qmp(&self.lab)));
                add("--fifo-dir", &word(&self.lab.run));
                "console"
            }
        };
        add(
            "--backup",
            &format!("{}@{}:7700", Host::Backup.name(), Host::Backup.ip()),
        );
        add("--witness", &format!("{}:7701", Host::Witness.ip()));
        add("--tap", &tap);
        add("--pki", &word(&self.lab.run_path("pki").join(&host)));
        add("--admin", &word(&self.admin(name)));
        add("--state-dir", &word(&self.lab.run_path(&format!("{name}-state"))));
        add("--disposable", console);
        add("--log-format", "json");
        argv.push("--register".to_owned());
        let replicator = self
            .lab
            .spawn(Host::Primary, &format!("replicator-{name}"), &argv)?;
        self.members[number].replicator = Some(replicator);
        Ok(())
    }

    /// What replicators that are started from now on have for settings, as TOML.
    pub fn set_replicators(&mut self, settings: &str) {
        settings.clone_into(&mut self.config.replicators);
    }

    /// Starts the replicators of all VMs that have none, one after another, and waits until each VM is protected.
    ///
    /// # Errors
    /// When one is not in time.
    pub fn protect_all(&mut self) -> Result<()> {
        let names: Vec<String> = self
            .members
            .iter()
            .filter(|member| member.replicator.is_none())
            .map(|member| member.name.clone())
            .collect();
        for name in names {
            self.start_replicator(&name)?;
            self.wait_protected(&name)?;
        }
        Ok(())
    }

    /// Waits until the replicator of a VM says that it is protected.
    ///
    /// # Errors
    /// When it does not, with the end of its log.
    pub fn wait_protected(&mut self, name: &str) -> Result<()> {
        let mut last = Value::Null;
        let waited = wait_for(&format!("protection of {name}"), AT_MOST, || {
            last = self.status(name).unwrap_or(Value::Null);
            (last["state"] == "protected").then_some(())
        });
        waited.map_err(|error| {
            let tail = self.replicator(name).map(|replicator| replicator.tail());
            anyhow!("{error:#}; last status {last}; log: {}", tail.unwrap_or_default())
        })
    }

    /// Waits until a VM's service answers, wherever it runs; returns when.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_serves(&self, name: &str) -> Result<Stamp> {
        let ip = self.members[self.number(name)?].ip;
        wait_for(&format!("the service of {name}"), AT_MOST, || {
            Redis::connect_to(&self.lab, ip, CONNECT_AT_MOST)
                .ok()?
                .ping()
                .ok()?;
            Some(Stamp::now())
        })
    }

    /// Kills everything of a primary host at once; returns when.
    ///
    /// # Errors
    /// When something of it had ended before.
    pub fn kill_host(&mut self, host: &str) -> Result<Stamp> {
        let at = Stamp::now();
        let mut dead: Vec<&mut Member> = self.members.iter_mut().filter(|m| m.host == host).collect();
        for member in &dead {
            if let Some(replicator) = &member.replicator {
                replicator.signal(Signal::KILL)?;
            }
            member.guest.signal(Signal::KILL)?;
        }
        for member in &mut dead {
            member.replicator.take();
            member.guest.kill();
        }
        Ok(at)
    }

    /// Ends the protection of a VM in good order.
    ///
    /// # Errors
    /// When `romulus` fails, or the replicator does not end.
    pub fn unprotect(&mut self, name: &str) -> Result<()> {
        let argv = [
            word(&self.lab.paths.binary("romulus")?),
            "unprotect".to_owned(),
            "--admin".to_owned(),
            word(&self.admin(name)),
        ];
        self.lab.output(Host::Primary, &argv)?;
        let number = self.number(name)?;
        let replicator = self.members[number].replicator.take();
        let ended = replicator
            .context("it has no replicator")?
            .wait(AT_MOST)
            .context("the replicator")?;
        anyhow::ensure!(ended.success(), "the replicator of {name} ended with {ended}");
        Ok(())
    }

    /// What the replicator of a VM says of it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self, name: &str) -> Result<Value> {
        let (code, body) = request(self.admin(name), "GET", "/v1/status")?;
        anyhow::ensure!(code == 200, "status {code}: {body}");
        Ok(body)
    }

    /// What the agent says.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn agent_asked(&self, method: &str, path: &str) -> Result<(u16, Value)> {
        request(self.lab.admin(Host::Backup), method, path)
    }

    /// What the agent says of one VM; null when it has none of that name.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn at_agent(&self, name: &str) -> Result<Value> {
        let (_, status) = self.agent_asked("GET", &format!("/v1/status?vm={name}"))?;
        Ok(status["vms"][0].clone())
    }

    /// What the agent says of itself and of all its VMs.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn agent_status(&self) -> Result<Value> {
        let (_, status) = self.agent_asked("GET", "/v1/status")?;
        Ok(status)
    }

    /// The VMs whose activation ended, in the order in which it did.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn activated(&self) -> Result<Vec<String>> {
        let (_, answer) = self.agent_asked("GET", "/v1/events")?;
        let mut events: Vec<(u64, String)> = answer["events"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|event| event["event"] == "activated")
            .filter_map(|event| Some((event["unix_us"].as_u64()?, event["vm"].as_str()?.to_owned())))
            .collect();
        events.sort();
        Ok(events.into_iter().map(|(_, vm)| vm).collect())
    }

    /// The VMM of a guest.
    ///
    /// # Errors
    /// When there is no such VM.
    pub fn guest(&self, name: &str) -> Result<&Process> {
        Ok(&self.members[self.number(name)?].guest)
    }

    /// What the agent has kept of what happened to a VM, oldest first.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn events_of(&self, name: &str) -> Result<Vec<Value>> {
        let (_, mut answer) = self.agent_asked("GET", &format!("/v1/events?vm={name}"))?;
        match answer["events"].take() {
            Value::Array(events) => Ok(events),
            other => bail!("{other} is no list of events"),
        }
    }

    /// The replicator of a VM.
    ///
    /// # Errors
    /// When it has none.
    pub fn replicator(&self, name: &str) -> Result<&Process> {
        let member = &self.members[self.number(name)?];
        member.replicator.as_ref().context("it has no replicator")
    }

    fn number(&self, name: &str) -> Result<usize> {
        self.members
            .iter()
            .position(|member| member.name == name)
            .with_context(|| format!("there is no VM {name}"))
    }

    /// The attach socket of a VM's VMM.
    #[must_use]
    pub fn attach(&self, name: &str) -> PathBuf {
        self.lab.run_path(&format!("{name}.attach"))
    }

    fn admin(&self, name: &str) -> PathBuf {
        self.lab.run_path(&format!("{name}.admin"))
    }
}

fn start_agent(lab: &Lab, config: &CrowdConfig) -> Result<Process> {
    let standby = [word(&lab.paths.binary("testbed")?), "standby".to_owned()];
    let settings = format!(
        "{}\n[[vmm]]\nname = \"testbed\"\nstandby = {standby:?}\n\n{}\n",
        config.agent, config.agent_tables
    );
    let path = lab.run_path("agent.toml");
    std::fs::write(&path, settings).with_context(|| format!("cannot write {}", path.display()))?;
    lab.start_agent_with(&AgentConfig {
        extra: vec!["--config".to_owned(), word(&path)],
        fault: config.agent_fault.clone(),
        ..AgentConfig::default()
    })
}

/// Asks a daemon on its admin socket; the status code and the JSON of the answer.
fn request(socket: PathBuf, method: &str, path: &str) -> Result<(u16, Value)> {
    let client = AdminClient::new(socket).with_timeout(ANSWER_AT_MOST);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(client.ask_with_status(method, path))?)
}
