//! `host.*`: one agent that backs up many VMs, against the same agent with one.
//!
//! The guests are small ones of the test VMM in the end-to-end tests' lab, protected by real replicators; what is measured is what the
//! agent says of itself, and what the kernel says of it. It needs root, /dev/kvm and the release binaries of this checkout.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use romulus_e2e::Paths;
use romulus_e2e::crowd::{Crowd, CrowdConfig};
use serde::Deserialize;
use serde_json::Value;

use super::{Measure, outside};
use crate::run::{Finding, Run, Unable};
use crate::stats::{Figure, float};

/// What the lab's namespaces, folders and sockets begin with.
pub(super) const LAB: &str = "romb";
const HOST: &str = "left";
/// What an agent takes besides images and staging: its program, threads and connections.
const AGENT_MIB: f64 = 64.0;
const PAGE_BYTES: u64 = 4096;
const MIB: f64 = 1024.0 * 1024.0;
/// Of the times in /proc/PID/stat: USER_HZ, which is 100 on every x86-64 Linux.
const TICKS_A_SECOND: f64 = 100.0;

/// Settings of all of them.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Common {
    /// VMs on the agent.
    #[serde(default = "sixteen")]
    vms: u16,
    /// What each guest writes.
    #[serde(default = "dirty")]
    dirty: String,
    /// How long the agent is watched.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
}

const fn sixteen() -> u16 {
    16
}

fn dirty() -> String {
    "random/counter:100:25".to_owned()
}

const fn slice_ms() -> u32 {
    30_000
}

impl Common {
    fn problem(&self) -> Option<String> {
        outside("vms", self.vms.into(), 1, 64)
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 1000, 600_000))
            .or_else(|| super::kvm::dirty_problem(&self.dirty))
    }

    fn slice(&self, run: &Run) -> Duration {
        let ms = if run.rounds(100) < 100 {
            self.slice_ms / 10
        } else {
            self.slice_ms
        };
        Duration::from_millis(ms.into())
    }

    /// So many VMs, all protected; with a flood, one more that writes so, which is there before them.
    fn crowd(&self, run: &Run, vms: u16, flood: Option<&str>) -> Result<Crowd, Unable> {
        run.say(format!("starting {vms} VMs"));
        let config = CrowdConfig {
            dirty: self.dirty.clone(),
            agent: "vms_max = 64\nstarts_max = 8\n".to_owned(),
            agent_tables: "[network]\nconnections_max = 128\nconnections_per_host_max = 128\n".to_owned(),
            ..CrowdConfig::default()
        };
        let raised = Crowd::raise(&Paths::here(), LAB, &[HOST], config);
        let mut crowd = raised.map_err(Unable::failed("raising the lab"))?;
        if let Some(flood) = flood {
            crowd
                .add(HOST, "flood", Some(flood))
                .map_err(Unable::failed("starting the flood"))?;
            crowd
                .protect_all()
                .map_err(Unable::failed("protecting the guest that floods"))?;
        }
        for vm in 0..vms {
            crowd
                .add(HOST, &name(vm), None)
                .map_err(Unable::failed("starting a guest"))?;
        }
        crowd
            .protect_all()
            .map_err(Unable::failed("protecting the guests"))?;
        Ok(crowd)
    }

    /// An agent with so many VMs that has been watched for a while.
    fn watched(&self, run: &Run, vms: u16) -> Result<Watched, Unable> {
        let crowd = self.crowd(run, vms, None)?;
        Watched::watch(&crowd, &(0..vms).map(name).collect::<Vec<_>>(), self.slice(run))
    }
}

fn name(vm: u16) -> String {
    format!("vm-{vm}")
}

/// What an agent did meanwhile.
struct Watched {
    /// Of each VM: from the last byte of a checkpoint to its acknowledgement, the 99th percentile since the agent's start, in
    /// microseconds.
    acks_us: Vec<f64>,
    /// The agent's processor time, in nanoseconds.
    cpu_ns: f64,
    pages: f64,
    /// The agent's own memory, that of its images' memory files, and that of their staging, in MiB.
    agent_mib: f64,
    image_mib: f64,
    staging_mib: f64,
    /// The least part of a VM's epochs that began on time.
    on_time: f64,
}

impl Watched {
    fn watch(crowd: &Crowd, names: &[String], slice: Duration) -> Result<Self, Unable> {
        let failed = || Unable::failed("asking the agent");
        let pid = crowd.agent.pid().map_err(failed())?.as_raw_nonzero().get();
        let pages = |crowd: &Crowd| -> Result<u64, Unable> {
            let mut sum = 0;
            for name in names {
                let status = crowd
                    .status(name)
                    .map_err(Unable::failed("asking a replicator"))?;
                sum += number(&status["page_bytes"])? / PAGE_BYTES;
            }
            Ok(sum)
        };
        let (cpu_before, pages_before) = (cpu_ticks(pid)?, pages(crowd)?);
        sleep(slice);
        let (cpu_after, pages_after) = (cpu_ticks(pid)?, pages(crowd)?);
        let mut acks_us = Vec::new();
        let mut on_time = 1.0_f64;
        for name in names {
            let at_agent = crowd.at_agent(name).map_err(failed())?;
            acks_us.push(float(number(&at_agent["receive_to_ack_us"]["p99"])?));
            let status = crowd
                .status(name)
                .map_err(Unable::failed("asking a replicator"))?;
            if status["state"] != "protected" {
                return Err(Unable::Wrong(format!(
                    "{name} was not protected any more: {status}"
                )));
            }
            on_time = on_time.min(status["epoch_on_time_ratio"].as_f64().unwrap_or(0.0));
        }
        let (image_mib, staging_mib) = image_mib(&crowd.lab.images)?;
        Ok(Self {
            acks_us,
            cpu_ns: float(cpu_after.saturating_sub(cpu_before)) * 1e9 / TICKS_A_SECOND,
            pages: float(pages_after.saturating_sub(pages_before)),
            agent_mib: anonymous_mib(pid)?,
            image_mib,
            staging_mib,
            on_time,
        })
    }

    fn worst_ack_us(&self) -> f64 {
        self.acks_us.iter().copied().fold(0.0, f64::max)
    }
}

fn number(value: &Value) -> Result<u64, Unable> {
    value
        .as_u64()
        .ok_or_else(|| Unable::Wrong(format!("{value} is no number of the agent's status")))
}

fn read(path: &str) -> Result<String, Unable> {
    fs::read_to_string(path).map_err(Unable::failed("reading what the kernel says of the agent"))
}

/// User and system time of a process, in ticks.
fn cpu_ticks(pid: i32) -> Result<u64, Unable> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse().ok())
        .collect();
    Ok(fields.iter().sum())
}

/// Memory that is the process's own, in MiB.
fn anonymous_mib(pid: i32) -> Result<f64, Unable> {
    let status = read(&format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("RssAnon:")?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        })
        .ok_or_else(|| Unable::Wrong("the kernel does not tell the agent's memory".to_owned()))?;
    Ok(float(kib) / 1024.0)
}

/// Memory of all files of images: of the guests' memory, and of everything else.
fn image_mib(folder: &Path) -> Result<(f64, f64), Unable> {
    use std::os::unix::fs::MetadataExt as _;
    let (mut memory, mut others) = (0, 0);
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(Unable::failed("listing the images"))?;
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_string_lossy().starts_with("ram-") {
                memory += metadata.blocks() * 512;
            } else {
                others += metadata.blocks() * 512;
            }
        }
    }
    Ok((float(memory) / MIB, float(others) / MIB))
}

pub(super) fn figure(values: &[f64]) -> Result<Figure, Unable> {
    Figure::of(values).ok_or_else(|| Unable::Wrong("nothing was measured".to_owned()))
}

/// `host.ack`, and what it costs a page.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Ack(Common);

impl Measure for Ack {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (mut many, mut one, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..run.repetitions() {
            one.push(self.0.watched(run, 1)?.worst_ack_us());
            let watched = self.0.watched(run, self.0.vms)?;
            many.push(watched.worst_ack_us());
            notes.push(format!("epochs on time at least {:.2}", watched.on_time));
        }
        run.found(Finding {
            case: format!("{}", self.0.vms),
            unit: "us",
            value: figure(&many)?,
            reference: Some(("one VM".to_owned(), figure(&one)?)),
            note: Some(format!("p99 of the worst VM; {}", notes.join(", "))),
        });
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.cpu`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Cpu(Common);

impl Measure for Cpu {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (mut many, mut one) = (Vec::new(), Vec::new());
        for _ in 0..run.repetitions() {
            let per_page = |watched: &Watched| watched.cpu_ns / 1000.0 / watched.pages.max(1.0);
            one.push(per_page(&self.0.watched(run, 1)?));
            many.push(per_page(&self.0.watched(run, self.0.vms)?));
        }
        run.found(Finding {
            case: format!("{}", self.0.vms),
            unit: "us",
            value: figure(&many)?,
            reference: Some(("one VM".to_owned(), figure(&one)?)),
            note: Some("the agent's processor time for a committed page".to_owned()),
        });
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.memory`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Memory(Common);

impl Measure for Memory {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (mut values, mut touched, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..run.repetitions() {
            let watched = self.0.watched(run, self.0.vms)?;
            // What staging takes has a limit of its own.
            values.push((watched.agent_mib - AGENT_MIB).max(0.0) + watched.image_mib);
            touched.push(watched.image_mib);
            notes.push(format!(
                "agent {:.1} MiB, images {:.1} MiB, staging {:.1} MiB",
                watched.agent_mib, watched.image_mib, watched.staging_mib
            ));
        }
        run.found(Finding {
            case: format!("{}", self.0.vms),
            unit: "MiB",
            value: figure(&values)?,
            reference: Some(("touched pages of the images".to_owned(), figure(&touched)?)),
            note: Some(format!(
                "without {AGENT_MIB} MiB and staging; {}",
                notes.join("; ")
            )),
        });
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.flood`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Flood {
    /// VMs that do not flood.
    #[serde(default = "four")]
    vms: u16,
    /// What they write.
    #[serde(default = "dirty")]
    dirty: String,
    /// What the flooding guest writes.
    #[serde(default = "flood")]
    flood: String,
    #[serde(default = "slice_ms")]
    slice_ms: u32,
}

const fn four() -> u16 {
    4
}

fn flood() -> String {
    "random/random:4000:25:48".to_owned()
}

impl Flood {
    fn common(&self) -> Common {
        Common {
            vms: self.vms,
            dirty: self.dirty.clone(),
            slice_ms: self.slice_ms,
        }
    }
}

impl Measure for Flood {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (mut with, mut without, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        let (common, names) = (self.common(), (0..self.vms).map(name).collect::<Vec<_>>());
        for _ in 0..run.repetitions() {
            without.push(common.watched(run, self.vms)?.worst_ack_us());
            let crowd = common.crowd(run, self.vms, Some(&self.flood))?;
            let watched = Watched::watch(&crowd, &names, common.slice(run))?;
            with.push(watched.worst_ack_us());
            notes.push(format!("epochs on time at least {:.2}", watched.on_time));
        }
        run.found(Finding {
            case: "others".to_owned(),
            unit: "us",
            value: figure(&with)?,
            reference: Some(("without the flood".to_owned(), figure(&without)?)),
            note: Some(format!("p99 of the worst of the others; {}", notes.join(", "))),
        });
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.common()
            .problem()
            .or_else(|| super::kvm::dirty_problem(&self.flood))
    }
}

/// `host.takeover`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Takeover {
    /// VMs of the host that dies.
    #[serde(default = "eight")]
    vms: u16,
    #[serde(default = "dirty")]
    dirty: String,
}

const fn eight() -> u16 {
    8
}

impl Takeover {
    fn common(&self) -> Common {
        Common {
            vms: self.vms,
            dirty: self.dirty.clone(),
            slice_ms: slice_ms(),
        }
    }
}

impl Measure for Takeover {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let names: Vec<String> = (0..self.vms).map(name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (mut last, mut first) = (Vec::new(), Vec::new());
        for _ in 0..run.repetitions() {
            let mut crowd = self.common().crowd(run, self.vms, None)?;
            run.say("the host dies");
            let killed = crowd
                .kill_host(HOST)
                .map_err(Unable::failed("killing the host"))?;
            let answers = crowd
                .first_answers_ms(&names, killed)
                .map_err(Unable::failed("waiting for the takeover"))?;
            last.push(answers.iter().copied().max().map_or(0.0, float));
            first.push(answers.iter().copied().min().map_or(0.0, float));
        }
        run.found(Finding {
            case: format!("{}", self.vms),
            unit: "ms",
            value: figure(&last)?,
            reference: Some(("the first of them".to_owned(), figure(&first)?)),
            note: Some(
                "from the kill until the last of them serves; the suspicion timeout is 150 ms".to_owned(),
            ),
        });
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.common().problem()
    }
}
