//! `commit.latency`, `epochs.on-time`, `link.slow`, and in a file of its own what an idle guest costs and gets: one VM with its real replicator, agent and witness, in the end-to-end tests' lab.
//!
//! What is told is what the daemons say of themselves in their status, and what the kernel says of them. It needs root, /dev/kvm and the release
//! binaries of this checkout. A VM that is not protected at the end, or that made no checkpoints, is an error.

pub(crate) mod idle;

use std::time::{Duration, Instant};

use romulus_e2e::crowd::{Crowd, CrowdConfig};
use romulus_e2e::{Host, Paths, wait_for};
use serde::Deserialize;
use serde_json::Value;

use super::host::watch::{TICKS_A_SECOND, cpu_ticks, number};
use super::host::{LAB, figure};
use super::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable};
use crate::stats::float;

const HOST: &str = "left";
const VM: &str = "vm";
/// From the protection to the first look, so that the pace is even and hot pages are hot.
const SETTLE: Duration = Duration::from_secs(2);
/// A cable that was cut shows within so long.
const NOTICED_AT_MOST: Duration = Duration::from_secs(60);
/// As the replicators have it.
const EPOCH_MS: u32 = 25;
/// Pages of a moving set.
const FIVE_HUNDRED: &str = "random:500:25:64";
const TWO_THOUSAND: &str = "random:2000:25:64";
/// The guest does nothing but that.
const QUIET: &str = "check=off log=off";
const NOTHING: &str = "off";
/// Settings of a replicator.
const BY_DEFAULT: &str = "";

/// Settings of what is watched for a while.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Common {
    /// What the guest writes; each a row. Nothing said: what the measure's own bound is for.
    #[serde(default)]
    dirty: Vec<String>,
    /// How long it is watched.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
}

const fn slice_ms() -> u32 {
    10_000
}

const fn memory_mib() -> u32 {
    256
}

/// What was seen of a VM in a slice.
struct Seen {
    /// At the end: the replicator's status, and the agent's of this VM.
    status: Value,
    agent: Value,
    /// In the slice.
    epochs: f64,
    late: f64,
    wire_bytes: f64,
    slice: Duration,
    /// Processor time, in per cent of a core.
    replicator_percent: f64,
    agent_percent: f64,
}

impl Seen {
    fn of_status(&self, field: &str, quantile: &str) -> Result<f64, Unable> {
        let value = &self.status[field][quantile];
        value
            .as_f64()
            .ok_or_else(|| Unable::Wrong(format!("the status has no {field}.{quantile}: {}", self.status)))
    }
}

/// Counts at one moment.
struct Counts {
    status: Value,
    epochs: f64,
    late: f64,
    wire_bytes: f64,
    replicator_ticks: u64,
    agent_ticks: u64,
    at: Instant,
}

fn pid(process: &romulus_e2e::Process) -> Result<i32, Unable> {
    let pid = process.pid().map_err(Unable::failed("looking for a daemon"))?;
    Ok(pid.as_raw_nonzero().get())
}

impl Counts {
    fn now(crowd: &Crowd) -> Result<Self, Unable> {
        let status = crowd
            .status(VM)
            .map_err(Unable::failed("asking the replicator"))?;
        if status["state"] != "protected" {
            return Err(Unable::Wrong(format!("the VM is not protected: {status}")));
        }
        let epochs = float(number(&status["epochs"])?);
        let on_time = status["epoch_on_time_ratio"].as_f64().unwrap_or(0.0);
        let replicator = crowd
            .replicator(VM)
            .map_err(Unable::failed("looking for a daemon"))?;
        Ok(Self {
            epochs,
            late: epochs * (1.0 - on_time),
            wire_bytes: float(number(&status["wire_bytes"])?),
            replicator_ticks: cpu_ticks(pid(replicator)?)?,
            agent_ticks: cpu_ticks(pid(&crowd.agent)?)?,
            at: Instant::now(),
            status,
        })
    }
}

/// Watches the protected VM for a slice.
fn watch(crowd: &Crowd, slice: Duration) -> Result<Seen, Unable> {
    std::thread::sleep(SETTLE.min(slice));
    let before = Counts::now(crowd)?;
    std::thread::sleep(slice);
    let after = Counts::now(crowd)?;
    let agent = crowd.at_agent(VM).map_err(Unable::failed("asking the agent"))?;
    if before.status["session"] != after.status["session"] {
        return Err(Unable::Wrong("its session ended while it was watched".to_owned()));
    }
    let epochs = after.epochs - before.epochs;
    if epochs < 1.0 || number(&agent["commits"])? == 0 {
        return Err(Unable::Wrong(format!(
            "{epochs} checkpoints were taken meanwhile"
        )));
    }
    let slice = after.at - before.at;
    let percent = |after: u64, before: u64| {
        let seconds = float(after.saturating_sub(before)) / TICKS_A_SECOND;
        100.0 * seconds / slice.as_secs_f64()
    };
    Ok(Seen {
        epochs,
        late: (after.late - before.late).max(0.0),
        wire_bytes: after.wire_bytes - before.wire_bytes,
        replicator_percent: percent(after.replicator_ticks, before.replicator_ticks),
        agent_percent: percent(after.agent_ticks, before.agent_ticks),
        status: after.status,
        agent,
        slice,
    })
}

/// A protected VM whose guest writes so, and does nothing else; its replicator has these settings.
fn protected(dirty: &str, memory_mib: u32, settings: &str) -> Result<Crowd, Unable> {
    let config = CrowdConfig {
        memory_mib,
        dirty: dirty.to_owned(),
        words: QUIET.to_owned(),
        replicators: settings.to_owned(),
        ..CrowdConfig::default()
    };
    let raised = Crowd::raise(&Paths::here(), LAB, &[HOST], config);
    let mut crowd = raised.map_err(Unable::failed("raising the lab"))?;
    crowd
        .add(HOST, VM, None)
        .map_err(Unable::failed("starting a guest"))?;
    crowd
        .protect_all()
        .map_err(Unable::failed("protecting the guest"))?;
    Ok(crowd)
}

fn slice(run: &Run, slice_ms: u32) -> Duration {
    Duration::from_millis(run.rounds(slice_ms).max(1000).into())
}

impl Common {
    fn problem(&self) -> Option<String> {
        let mut dirty = self.dirty.iter().filter(|dirty| *dirty != NOTHING);
        outside("slice_ms", self.slice_ms.into(), 1000, 600_000)
            .or_else(|| outside("memory_mib", self.memory_mib.into(), 64, 4096))
            .or_else(|| dirty.find_map(|dirty| super::kvm::dirty_problem(dirty)))
    }

    /// A protected guest that writes so, for a slice; its replicator has these settings.
    fn look(&self, run: &Run, dirty: &str, settings: &str) -> Result<Seen, Unable> {
        let crowd = protected(dirty, self.memory_mib, settings)?;
        watch(&crowd, slice(run, self.slice_ms))
    }

    /// For each thing that the guest writes: what was seen in each repetition.
    fn each<T>(
        &self,
        run: &mut Run,
        by_default: &str,
        look: impl Fn(&Run, &str) -> Result<T, Unable>,
        finding: impl Fn(&[T]) -> Result<Finding, Unable>,
    ) -> Result<(), Unable> {
        let by_default = [by_default.to_owned()];
        let all_dirty = if self.dirty.is_empty() {
            &by_default[..]
        } else {
            &self.dirty[..]
        };
        for dirty in all_dirty {
            let mut all = Vec::new();
            for repetition in 0..run.repetitions() {
                run.say(format!(
                    "dirty={dirty}, {} of {}",
                    repetition + 1,
                    run.repetitions()
                ));
                all.push(look(run, dirty)?);
            }
            let found = Finding {
                case: dirty.clone(),
                ..finding(&all)?
            };
            run.found_at(parameters(dirty, self.memory_mib), found);
        }
        Ok(())
    }
}

fn parameters(dirty: &str, memory_mib: u32) -> [(&'static str, Parameter); 3] {
    [
        ("dirty", dirty.into()),
        ("memory_mib", memory_mib.into()),
        ("epoch_ms", EPOCH_MS.into()),
    ]
}

fn notes<T>(all: &[T], note: impl Fn(&T) -> Result<String, Unable>) -> Result<Option<String>, Unable> {
    let all = all.iter().map(note).collect::<Result<Vec<_>, _>>()?;
    Ok(Some(all.join("; ")))
}

/// `commit.latency`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct CommitLatency(Common);

impl Measure for CommitLatency {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let look = |run: &Run, dirty: &str| self.0.look(run, dirty, BY_DEFAULT);
        self.0.each(run, FIVE_HUNDRED, look, |all| {
            let p50 = all.iter().map(|seen| seen.of_status("commit_lag_ms", "p50"));
            let ack_us = |seen: &Seen| {
                seen.agent["receive_to_ack_recent_us"]["p50"]
                    .as_f64()
                    .unwrap_or(0.0)
            };
            Ok(Finding {
                case: String::new(),
                unit: "ms",
                value: figure(&p50.collect::<Result<Vec<_>, _>>()?)?,
                reference: None,
                note: notes(all, |seen| {
                    Ok(format!(
                        "p99 {:.2} ms, {} pages, at the agent from the last byte {:.0} us",
                        seen.of_status("commit_lag_ms", "p99")?,
                        seen.of_status("dirty_pages", "p50")?,
                        ack_us(seen)
                    ))
                })?,
            })
        })
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `epochs.on-time`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct OnTime(Common);

impl Measure for OnTime {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let look = |run: &Run, dirty: &str| self.0.look(run, dirty, BY_DEFAULT);
        self.0.each(run, TWO_THOUSAND, look, |all| {
            let late = all.iter().map(|seen| 100.0 * seen.late / seen.epochs);
            Ok(Finding {
                case: String::new(),
                unit: "%",
                value: figure(&late.collect::<Vec<_>>())?,
                reference: None,
                note: notes(all, |seen| {
                    Ok(format!(
                        "began more than 2 ms late; {:.0} checkpoints in {:.1} s, {} pages, pause {:.2} ms, commit {:.2} ms after it",
                        seen.epochs,
                        seen.slice.as_secs_f64(),
                        seen.of_status("dirty_pages", "p50")?,
                        seen.of_status("pause_ms", "p50")?,
                        seen.of_status("commit_lag_ms", "p50")?
                    ))
                })?,
            })
        })
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `link.slow`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SlowLink {
    /// What the guest writes: as many pages in an epoch of any length.
    #[serde(default = "whole_set")]
    dirty: String,
    /// By how much.
    #[serde(default = "ten")]
    times: u32,
    #[serde(default = "slice_ms")]
    slice_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
}

/// 1,024 pages, all of them in every 25 ms, with bytes that nothing makes smaller.
fn whole_set() -> String {
    "sequential/random:1024:25:4".to_owned()
}

const fn ten() -> u32 {
    10
}

impl SlowLink {
    /// On a link as fast as it can, and on one with so many times fewer bytes a second than that took; each once more. All in the same
    /// processes, because two replicators differ by more than the link may make of one: in where their memory happens to lie.
    fn pairs(&self, run: &Run) -> Result<[(Seen, Seen); 2], Unable> {
        let slice = slice(run, self.slice_ms);
        let mut crowd = protected(&self.dirty, self.memory_mib, BY_DEFAULT)?;
        run.say("a fast link");
        let fast = watch(&crowd, slice)?;
        let bytes_a_second = fast.wire_bytes / fast.slice.as_secs_f64() / f64::from(self.times);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "limited to what fits"
        )]
        let limit = bytes_a_second.clamp(1000.0, f64::from(u32::MAX)) as u32;
        let watch_slow = |crowd: &mut Crowd| {
            run.say(format!("a link of {:.1} MB/s", f64::from(limit) / 1e6));
            link_of(crowd, limit)?;
            let slow = watch(crowd, slice)?;
            // Otherwise the link was not what held it up, and nothing was shown.
            let taken = slow.wire_bytes / slow.slice.as_secs_f64();
            if taken > 1.5 * f64::from(limit) {
                return Err(Unable::Wrong(format!(
                    "{:.1} MB/s were sent on a link of {:.1} MB/s",
                    taken / 1e6,
                    f64::from(limit) / 1e6
                )));
            }
            Ok(slow)
        };
        let slow = watch_slow(&mut crowd)?;
        run.say("a fast link again");
        link_of(&mut crowd, u32::MAX)?;
        let fast_again = watch(&crowd, slice)?;
        let slow_again = watch_slow(&mut crowd)?;
        Ok([(fast, slow), (fast_again, slow_again)])
    }
}

/// Cuts the cable, and goes on with a link of so many bytes a second: with the session that begins then, the figures of pauses begin
/// anew.
fn link_of(crowd: &mut Crowd, bytes_a_second: u32) -> Result<(), Unable> {
    let failed = Unable::failed("changing the link");
    let changed = (|| {
        crowd.lab.net.set_cable(Host::Backup, false)?;
        wait_for("the end of the session", NOTICED_AT_MOST, || {
            (crowd.status(VM).ok()?["state"] != "protected").then_some(())
        })?;
        crowd.lab.net.slow_down(Host::Backup, bytes_a_second)?;
        crowd.lab.net.set_cable(Host::Backup, true)?;
        crowd.wait_protected(VM)
    })();
    changed.map_err(failed)
}

impl Measure for SlowLink {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let (mut pauses, mut references, mut told) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..run.repetitions() {
            let pairs = self.pairs(run)?;
            let describe = |seen: &Seen| {
                Ok::<_, Unable>(format!(
                    "{} pages, {:.1} MB/s, {:.1} checkpoints/s, commit {:.1} ms after the pause",
                    seen.of_status("dirty_pages", "p50")?,
                    seen.wire_bytes / seen.slice.as_secs_f64() / 1e6,
                    seen.epochs / seen.slice.as_secs_f64(),
                    seen.of_status("commit_lag_ms", "p50")?
                ))
            };
            for (fast, slow) in &pairs {
                pauses.push(slow.of_status("pause_ms", "p50")?);
                references.push(fast.of_status("pause_ms", "p50")?);
                told.push(format!("slow: {}; fast: {}", describe(slow)?, describe(fast)?));
            }
        }
        let at: [(&str, Parameter); 3] = parameters(&self.dirty, self.memory_mib);
        let finding = Finding {
            case: format!("{}x", self.times),
            unit: "ms",
            value: figure(&pauses)?,
            reference: Some(("a fast link".to_owned(), figure(&references)?)),
            note: Some(told.join("; ")),
        };
        run.found_at(at, finding);
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        outside("times", self.times.into(), 2, 1000)
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 1000, 600_000))
            .or_else(|| outside("memory_mib", self.memory_mib.into(), 64, 4096))
            .or_else(|| super::kvm::dirty_problem(&self.dirty))
    }
}
