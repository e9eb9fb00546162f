//! A pair that stays protected for long while the machine is kept busy: nothing is wrong, so nobody may take over.

use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use romulus_host_sys::child::die_with_thread;
use serde::Serialize;
use serde_json::Value;

use crate::stage::{Stage, StageConfig};
use crate::{Host, Paths, Stamp};

/// How often the status is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long and how hard.
#[derive(Clone, Debug)]
pub struct SoakConfig {
    /// What to run.
    pub stage: StageConfig,
    /// How to protect it.
    pub protect: crate::daemons::ProtectConfig,
    /// For so long.
    pub duration: Duration,
    /// Processes that do nothing but use a processor, at normal priority.
    pub busy_processes: usize,
}

/// What was seen.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SoakReport {
    /// Seconds under protection.
    pub seconds: f64,
    /// Busy processes.
    pub busy_processes: usize,
    /// The machine's load, averaged over a minute: the most that was seen.
    pub load_max: f64,
    /// Activations at the backup. There was no reason for one.
    pub takeovers: usize,
    /// Suspicions of either host, whatever followed from them.
    pub suspicions: usize,
    /// Times that the pair had to be made anew.
    pub pairs_lost: usize,
    /// Looks at the status that did not say *protected*, of all looks.
    pub looks_unprotected: (usize, usize),
    /// Acknowledged writes that are not there.
    pub lost_acked_writes: u64,
    /// 1 when the client's connection broke.
    pub connection_resets: u64,
    /// Acknowledged writes.
    pub acked_writes: u64,
    /// The primary's last status.
    pub status: Value,
}

impl SoakReport {
    /// Whether nobody took over, and nothing was lost.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        (self.takeovers, self.lost_acked_writes, self.connection_resets) == (0, 0, 0)
    }
}

/// Processes that burn time until they are dropped.
struct Load(Vec<Child>);

impl Load {
    fn start(count: usize) -> Result<Load> {
        let mut load = Load(Vec::new());
        for _ in 0..count {
            let mut command = Command::new("sh");
            command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
            let child = die_with_thread(&mut command).spawn();
            load.0.push(child.context("cannot start a busy process")?);
        }
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It cannot have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs it in a lab named by `prefix`, telling `progress` now and then.
///
/// # Errors
/// When the guest is not protected in the first place, or nothing can be verified at the end.
pub fn soak(
    paths: &Paths,
    prefix: &str,
    config: &SoakConfig,
    mut progress: impl FnMut(&SoakReport),
) -> Result<SoakReport> {
    let mut stage = Stage::raise(paths, prefix, &config.stage)?;
    stage.protect(&config.protect)?;
    let load = Load::start(config.busy_processes)?;
    let (from, begun) = (Stamp::now(), Instant::now());
    let mut report = SoakReport {
        busy_processes: config.busy_processes,
        ..SoakReport::default()
    };
    while begun.elapsed() < config.duration {
        sleep(LOOK_EVERY);
        look(&stage, from, &mut report);
        report.seconds = begun.elapsed().as_secs_f64();
        progress(&report);
        if report.takeovers > 0 {
            break;
        }
    }
    drop(load);
    let client = stage.finish_client()?;
    report.lost_acked_writes = client.lost;
    report.connection_resets = client.resets;
    report.acked_writes = client.acked;
    Ok(report)
}

fn look(stage: &Stage, from: Stamp, report: &mut SoakReport) {
    let count = |name: &str| {
        let events = stage.timeline.events();
        events
            .iter()
            .filter(|event| event.name == name && event.at >= from)
            .count()
    };
    report.takeovers = count("activated");
    report.suspicions = count("suspicion");
    report.pairs_lost = count("paired");
    report.looks_unprotected.1 += 1;
    match stage.lab.status(Host::Primary) {
        Ok(status) => {
            if status.get("state").and_then(Value::as_str) != Some("protected") {
                report.looks_unprotected.0 += 1;
            }
            report.status = status;
        }
        Err(_) => report.looks_unprotected.0 += 1,
    }
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = text
        .split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or(0.0);
    report.load_max = f64::max(report.load_max, load);
}
