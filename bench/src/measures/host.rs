//! `host.*`: one agent that backs up many VMs, against the same agent with one.
//!
//! The guests are small ones of the test VMM in the end-to-end tests' lab, protected by real replicators; what is measured is what the
//! agent says of itself, and what the kernel says of it. It needs root, /dev/kvm and the release binaries of this checkout.
//!
//! Guests, replicators and the agent share the machine, so that what is measured is the agent only while the machine is not the
//! limit: the notes say how busy it was.

use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use romulus_e2e::Paths;
use romulus_e2e::crowd::{Crowd, CrowdConfig};
use serde::Deserialize;

use super::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable};
use crate::stats::{Figure, float};

mod flood;
mod strangers;
pub(super) mod watch;

pub(crate) use flood::{Flood, Late};
pub(crate) use strangers::{Beset, Strangers};

use watch::Watched;

/// What the lab's namespaces, folders and sockets begin with. Two checkouts that measure on one machine need different ones: set
/// `ROMULUS_BENCH_LAB` when building.
pub(super) const LAB: &str = match option_env!("ROMULUS_BENCH_LAB") {
    Some(name) => name,
    None => "romb",
};
const HOST: &str = "left";
/// Guests that do nothing but what they are told to write: their checks of themselves, every 5 ms, would take more of the machine than
/// everything that is measured here.
const QUIET: &str = "check=off log=off";
/// What an agent takes besides images and staging: its program, threads and connections.
const AGENT_MIB: f64 = 64.0;

/// Settings of all of them.
#[derive(Clone, Debug, Deserialize, PartialEq)]
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
    "random/counter:20:25".to_owned()
}

/// As long as the last 1,024 acknowledgements take at 25 ms.
const fn slice_ms() -> u32 {
    26_000
}

impl Common {
    fn problem(&self) -> Option<String> {
        outside("vms", self.vms.into(), 1, 64)
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 1000, 600_000))
            .or_else(|| super::kvm::dirty_problem(&self.dirty))
    }

    fn parameters(&self) -> [(&'static str, Parameter); 3] {
        [
            ("vms", self.vms.into()),
            ("dirty", self.dirty.as_str().into()),
            ("slice_ms", self.slice_ms.into()),
        ]
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
            words: QUIET.to_owned(),
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
        }
        for name in names(vms) {
            crowd
                .add(HOST, &name, None)
                .map_err(Unable::failed("starting a guest"))?;
        }
        crowd
            .protect_all()
            .map_err(Unable::failed("protecting the guests"))?;
        Ok(crowd)
    }

    /// An agent with so many VMs that has been watched for a while.
    fn watched(&self, run: &Run, vms: u16, flood: Option<&str>) -> Result<Watched, Unable> {
        let crowd = self.crowd(run, vms, flood)?;
        run.say(format!("watching {vms} VMs"));
        Watched::watch(&crowd, &names(vms), || {
            sleep(self.slice(run));
            Ok(())
        })
    }
}

fn names(vms: u16) -> Vec<String> {
    (0..vms).map(|vm| format!("vm-{vm}")).collect()
}

/// What was watched of two agents in turn: the one, and the one that it is compared with.
type Pairs = Vec<(Watched, Watched)>;

/// What was watched last, and how: measures that ask for the same share one run.
static LAST: Mutex<Option<(String, Pairs)>> = Mutex::new(None);

/// Watches in turn, once for each repetition, unless just that was done last.
fn pairs(
    run: &Run,
    what: &str,
    watch: impl Fn() -> Result<(Watched, Watched), Unable>,
) -> Result<Pairs, Unable> {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, pairs)) = last.as_ref().filter(|(done, _)| done == what) {
        return Ok(pairs.clone());
    }
    let mut pairs = Vec::new();
    for _ in 0..run.repetitions() {
        pairs.push(watch()?);
    }
    *last = Some((what.to_owned(), pairs.clone()));
    Ok(pairs)
}

/// Many VMs, and one.
fn many_and_one(run: &Run, common: &Common) -> Result<Pairs, Unable> {
    pairs(run, &format!("many {common:?}"), || {
        let one = common.watched(run, 1, None)?;
        Ok((common.watched(run, common.vms, None)?, one))
    })
}

pub(super) fn figure(values: &[f64]) -> Result<Figure, Unable> {
    Figure::of(values).ok_or_else(|| Unable::Wrong("nothing was measured".to_owned()))
}

fn each(pairs: &Pairs, value: impl Fn(&(Watched, Watched)) -> f64) -> Result<Figure, Unable> {
    figure(&pairs.iter().map(value).collect::<Vec<_>>())
}

fn notes(pairs: &Pairs, note: impl Fn(&Watched) -> String) -> String {
    let all: Vec<String> = pairs.iter().map(|(watched, _)| note(watched)).collect();
    all.join("; ")
}

/// `host.ack`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Ack(Common);

impl Measure for Ack {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let pairs = many_and_one(run, &self.0)?;
        let note = |watched: &Watched| {
            format!(
                "of the worst VM {:.0} us, {:.0} % of the machine busy, {:.1} % of a VM's epochs late",
                watched.worst_ack_us, watched.busy_percent, watched.late_percent
            )
        };
        run.found_at(
            self.0.parameters(),
            Finding {
                case: self.0.vms.to_string(),
                unit: "us",
                value: each(&pairs, |(many, _)| many.ack_us)?,
                reference: Some(("one VM".to_owned(), each(&pairs, |(_, one)| one.ack_us)?)),
                note: Some(format!("p99 of all; {}", notes(&pairs, note))),
            },
        );
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
        let pairs = many_and_one(run, &self.0)?;
        let note = |watched: &Watched| format!("{:.0} pages a second", watched.pages_a_second);
        run.found_at(
            self.0.parameters(),
            Finding {
                case: self.0.vms.to_string(),
                unit: "us",
                value: each(&pairs, |(many, _)| many.page_cpu_us)?,
                reference: Some(("one VM".to_owned(), each(&pairs, |(_, one)| one.page_cpu_us)?)),
                note: Some(format!(
                    "the agent's processor time for a committed page; {}",
                    notes(&pairs, note)
                )),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.connections`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Connections(Common);

impl Measure for Connections {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let pairs = many_and_one(run, &self.0)?;
        let note = |watched: &Watched| {
            format!(
                "{:.0} us of all its threads, {:.1} pages an epoch",
                watched.epoch_cpu_us, watched.pages_an_epoch
            )
        };
        let one = pairs.first().map_or_else(String::new, |(_, one)| note(one));
        let finding = Finding {
            case: self.0.vms.to_string(),
            unit: "us",
            value: each(&pairs, |(many, _)| many.epoch_connections_us)?,
            reference: Some((
                "one VM".to_owned(),
                each(&pairs, |(_, one)| one.epoch_connections_us)?,
            )),
            note: Some(format!("for an epoch; {}; one VM: {one}", notes(&pairs, note))),
        };
        let at = [
            ("vms", u32::from(self.0.vms).into()),
            (
                "pages_an_epoch",
                Parameter::Number(each(&pairs, |(many, _)| many.pages_an_epoch)?.p50),
            ),
            (
                "one_pages_an_epoch",
                Parameter::Number(each(&pairs, |(_, one)| one.pages_an_epoch)?.p50),
            ),
            (
                "one_epoch_us",
                Parameter::Number(each(&pairs, |(_, one)| one.epoch_cpu_us)?.p50),
            ),
            (
                "one_busy_percent",
                Parameter::Number(each(&pairs, |(_, one)| one.busy_percent)?.p50),
            ),
            (
                "busy_percent",
                Parameter::Number(each(&pairs, |(many, _)| many.busy_percent)?.p50),
            ),
        ];
        run.found_at(at, finding);
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
        let pairs = many_and_one(run, &self.0)?;
        // What staging takes has a limit of its own.
        let value = |watched: &Watched| (watched.agent_mib - AGENT_MIB).max(0.0) + watched.image_mib;
        let note = |watched: &Watched| {
            format!(
                "agent {:.1} MiB, images {:.1} MiB, staging {:.1} MiB",
                watched.agent_mib, watched.image_mib, watched.staging_mib
            )
        };
        run.found_at(
            self.0.parameters(),
            Finding {
                case: self.0.vms.to_string(),
                unit: "MiB",
                value: each(&pairs, |(many, _)| value(many))?,
                reference: Some((
                    "touched pages of the images".to_owned(),
                    each(&pairs, |(many, _)| many.image_mib)?,
                )),
                note: Some(format!(
                    "without {AGENT_MIB} MiB and staging; {}",
                    notes(&pairs, note)
                )),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
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
        let names = names(self.vms);
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
        run.found_at(
            [("vms", self.vms.into()), ("dirty", self.dirty.as_str().into())],
            Finding {
                case: format!("{}", self.vms),
                unit: "ms",
                value: figure(&last)?,
                reference: Some(("the first of them".to_owned(), figure(&first)?)),
                note: Some(
                    "from the kill until the last of them serves; the suspicion timeout is 150 ms".to_owned(),
                ),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.common().problem()
    }
}
