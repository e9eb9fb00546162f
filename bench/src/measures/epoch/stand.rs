//! A guest with a client, unprotected or really protected, and what can be seen of it from everywhere.

use std::time::{Duration, Instant};

use romulus_e2e::crowd::{Crowd, CrowdConfig};
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::probe::Probe;
use romulus_e2e::{Paths, Process, Stamp};
use romulus_vmm_attach::client::Client;
use serde_json::Value;

use super::SETTLE;
use super::counter::{Counter, Done};
use super::task::{Machine, Task};
use crate::advise::attach::Socket;
use crate::measures::host::LAB;
use crate::measures::host::watch::{TICKS_A_SECOND, cpu_ticks};
use crate::measures::kvm::guest::{all_memory, need_kvm};
use crate::run::Unable;
use crate::stats::float;

const HOST: &str = "left";
pub(super) const VM: &str = "vm";
/// The VMM lets its last client go in this time, whatever the machine does meanwhile.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// The guest and everything around it.
pub(super) struct Stand {
    /// There until the end.
    probe: Option<Probe>,
    counter: Counter,
    crowd: Crowd,
}

/// What a guest did that nobody protected.
#[derive(Clone, Copy, Debug)]
pub(super) struct Free {
    /// For a unit of its work; infinite where it gets nothing done besides dirtying pages.
    pub(super) ns_a_unit: f64,
    /// Its client's, at the median.
    pub(super) latency_ms: f64,
}

/// What it did while it was protected, and what that took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protected {
    /// As above.
    pub(super) ns_a_unit: f64,
    pub(super) latency_ms: f64,
    /// Medians since protection began.
    pub(super) pause_ms: f64,
    pub(super) lag_ms: f64,
    pub(super) dirty_pages: f64,
    pub(super) on_time_percent: f64,
    /// Of the slice.
    pub(super) megabytes_a_second: f64,
    /// Processor time, in per cent of a core.
    pub(super) replicator_percent: f64,
    pub(super) agent_percent: f64,
    pub(super) vmm_percent: f64,
}

impl Stand {
    /// Boots the guest in a new lab.
    pub(super) fn raise(machine: &Machine, seed: u64) -> Result<Self, Unable> {
        let (crowd, counter) = match &machine.task {
            Task::Dirty(dirty) => raise_kvm(machine, dirty)?,
            Task::Program(program) => raise_linux(machine, program)?,
        };
        let probe = crowd
            .probe(VM, machine.task.asks_every(), seed)
            .map_err(Unable::failed("starting a client"))?;
        Ok(Self {
            probe: Some(probe),
            counter,
            crowd,
        })
    }

    /// From now on the guest writes this.
    pub(super) fn write(&mut self, dirty: &str) -> Result<(), Unable> {
        self.crowd
            .tell(VM, &["DIRTY", dirty])
            .map_err(Unable::failed("telling the guest what to write"))?;
        self.counter.set_dirty(dirty);
        Ok(())
    }

    /// How the guest is attached to.
    pub(super) fn socket(&self) -> Socket {
        Socket::Attach(self.crowd.attach(VM))
    }

    /// Has the guest protected with these settings of the replicator, and waits until it is.
    pub(super) fn protect(&mut self, settings: &str) -> Result<(), Unable> {
        self.crowd.set_replicators(settings);
        self.crowd
            .protect_all()
            .map_err(Unable::failed("protecting the guest"))
    }

    pub(super) fn unprotect(&mut self) -> Result<(), Unable> {
        self.crowd
            .unprotect(VM)
            .map_err(Unable::failed("ending the protection"))
    }

    /// What the replicator says.
    pub(super) fn status(&self) -> Result<Value, Unable> {
        let status = self.crowd.status(VM);
        status.map_err(Unable::failed("asking the replicator"))
    }

    /// Watches the guest while nobody protects it.
    pub(super) fn free(&mut self, slice: Duration) -> Result<Free, Unable> {
        std::thread::sleep(SETTLE);
        let (ns_a_unit, latency_ms) = self.slice(slice)?;
        Ok(Free {
            ns_a_unit,
            latency_ms,
        })
    }

    /// Watches it while it is protected.
    pub(super) fn protected(&mut self, slice: Duration) -> Result<Protected, Unable> {
        std::thread::sleep(SETTLE);
        let (before, begun) = (self.counts()?, Instant::now());
        let (ns_a_unit, latency_ms) = self.slice(slice)?;
        let (after, seconds) = (self.counts()?, begun.elapsed().as_secs_f64());
        let status = self.status()?;
        if status["state"] != "protected" {
            return Err(Unable::Wrong(format!("the guest is not protected: {status}")));
        }
        let part = |key: &str| number(&status[key]["p50"]);
        let percent =
            |before: u64, after: u64| float(after.saturating_sub(before)) / TICKS_A_SECOND / seconds * 100.0;
        Ok(Protected {
            ns_a_unit,
            latency_ms,
            pause_ms: part("pause_ms")?,
            lag_ms: part("commit_lag_ms")?,
            dirty_pages: part("dirty_pages")?,
            on_time_percent: 100.0 * number(&status["epoch_on_time_ratio"])?,
            megabytes_a_second: (after.wire_bytes - before.wire_bytes) / seconds / 1e6,
            replicator_percent: percent(before.replicator, after.replicator),
            agent_percent: percent(before.agent, after.agent),
            vmm_percent: percent(before.vmm, after.vmm),
        })
    }

    fn slice(&mut self, slice: Duration) -> Result<(f64, f64), Unable> {
        let (from, before) = (Stamp::now(), self.done()?);
        std::thread::sleep(slice);
        let (after, to) = (self.done()?, Stamp::now());
        let seen = self.probe.as_ref().map(|probe| probe.quantiles(from, to));
        match seen {
            Some((latency, answers)) if answers > 0 => Ok((after.ns_a_unit_since(&before), latency.p50)),
            _ => Err(Unable::Wrong("the guest's client got no answer".to_owned())),
        }
    }

    fn done(&mut self) -> Result<Done, Unable> {
        self.counter.done(&self.crowd)
    }

    fn counts(&self) -> Result<Counts, Unable> {
        let failed = || Unable::failed("looking for the processes");
        let replicator = self.crowd.replicator(VM).map_err(failed())?;
        let vmm = self.crowd.guest(VM).map_err(failed())?;
        Ok(Counts {
            wire_bytes: number(&self.status()?["wire_bytes"])?,
            replicator: ticks(replicator)?,
            agent: ticks(&self.crowd.agent)?,
            vmm: ticks(vmm)?,
        })
    }
}

/// A guest of the test VMM.
fn raise_kvm(machine: &Machine, dirty: &str) -> Result<(Crowd, Counter), Unable> {
    need_kvm()?;
    let mut crowd = raise_lab(CrowdConfig {
        memory_mib: machine.memory_mib,
        vcpus: machine.vcpus,
        words: "progress=on work=on check=off log=off".to_owned(),
        dirty: dirty.to_owned(),
        ..CrowdConfig::default()
    })?;
    crowd
        .add(HOST, VM, None)
        .map_err(Unable::failed("starting a guest"))?;
    // The VMM has one client at a time: this one is gone when the memory is mapped.
    let (client, attachment) = Client::connect(&crowd.attach(VM), "bench", CONNECT_LIMIT)
        .map_err(Unable::failed("connecting to the test VMM"))?;
    let memory = all_memory(&attachment)?;
    drop((client, attachment));
    Ok((crowd, Counter::of_memory(memory, dirty)))
}

/// The end-to-end tests' Linux, in a stock QEMU.
fn raise_linux(machine: &Machine, program: &str) -> Result<(Crowd, Counter), Unable> {
    let mut crowd = raise_lab(CrowdConfig::default())?;
    let config = QemuConfig {
        memory_mib: machine.memory_mib,
        vcpus: machine.vcpus,
        programs: true,
        workload: machine.task.workload(),
        ..QemuConfig::default()
    };
    crowd
        .add_qemu_with(HOST, VM, &config)
        .map_err(Unable::failed("starting a guest"))?;
    let counter = Counter::of_program(&crowd, program)?;
    Ok((crowd, counter))
}

fn raise_lab(config: CrowdConfig) -> Result<Crowd, Unable> {
    Crowd::raise(&Paths::here(), LAB, &[HOST], config).map_err(Unable::failed("raising the lab"))
}

impl Drop for Stand {
    fn drop(&mut self) {
        // While there still is a guest that its threads can be let go by.
        let probe = self.probe.take();
        if let Some(Err(error)) = probe.map(Probe::finish) {
            eprintln!("{error:#}");
        }
    }
}

/// At one moment.
struct Counts {
    wire_bytes: f64,
    replicator: u64,
    agent: u64,
    vmm: u64,
}

fn ticks(process: &Process) -> Result<u64, Unable> {
    let pid = process.pid().map_err(Unable::failed("looking for a process"))?;
    cpu_ticks(pid.as_raw_nonzero().get())
}

pub(super) fn number(value: &Value) -> Result<f64, Unable> {
    value
        .as_f64()
        .ok_or_else(|| Unable::Wrong(format!("{value} is no number of a status")))
}
