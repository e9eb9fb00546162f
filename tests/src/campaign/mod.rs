//! Kills that are aimed: every named step of bootstrap, epoch and takeover, one trial each, with the real daemons.
//!
//! ```text
//!   a daemon is started with a fault armed ─► it is struck there (not reached: the trial fails)
//!        │ [HostDies: QEMU is killed at once]
//!        ▼
//!   the witness's record says who goes on ─┬─ the backup: it activates, every answer is still there, the old guest is mute and
//!                                          │  not paused, a replicator that starts again finds out and stops it
//!                                          └─ the primary: the guest runs; with the daemon back it is protected again
//!   always: no acknowledged write lost, no connection broken, one voice, no frame of an uncommitted epoch
//! ```
//!
//! A guest that stays on the primary serves the next trial; one that moved is used up.

mod plan;
mod table;
mod trial;
mod watch;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::client::ClientConfig;
use crate::daemons::AgentConfig;
use crate::guest::{GuestConfig, QemuConfig};
use crate::report::OK;
use crate::stage::{Stage, StageConfig};
use crate::{Paths, Stamp};

pub use plan::{Blow, Part, Trial, When, all};
pub use table::print as print_table;

/// What a trial has shown.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// What was done.
    #[serde(flatten)]
    pub trial: Trial,
    /// `ok`, or what went wrong.
    pub verdict: String,
    /// Who went on: `primary`, `backup`; empty when it is not known.
    pub went_on: String,
    /// Acknowledged writes of the client.
    pub acked_writes: u64,
    /// Of these, lost ones.
    pub lost_acked_writes: u64,
    /// Broken connections.
    pub connection_resets: u64,
    /// Frames that left the primary through a closed gate.
    pub gated_frames: usize,
    /// Of these, those of uncommitted epochs.
    pub uncommitted_frames: usize,
    /// Frames that came from the primary after the guest spoke on the backup: of committed epochs, or they would be counted above.
    pub late_frames: usize,
    /// Whether the memory was compared before the guest ran on the backup; null when it did not move.
    pub memory_verified: Option<bool>,
    /// How long the trial took.
    pub seconds: f64,
    /// Where the logs of a failed trial are.
    pub logs: Option<PathBuf>,
}

impl Outcome {
    fn of(trial: Trial) -> Outcome {
        Outcome {
            trial,
            verdict: OK.to_owned(),
            went_on: String::new(),
            acked_writes: 0,
            lost_acked_writes: 0,
            connection_resets: 0,
            gated_frames: 0,
            uncommitted_frames: 0,
            late_frames: 0,
            memory_verified: None,
            seconds: 0.0,
            logs: None,
        }
    }

    /// Whether all was well.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.verdict == OK
    }
}

/// The suspicion timeout of replicator and agent, in milliseconds: the campaign is about steps and not about times, and its machine may
/// be busy.
pub const SUSPICION_MS: u32 = 400;

/// How replicator and agent are told.
#[must_use]
pub fn patience() -> Vec<String> {
    vec!["--suspicion-timeout".to_owned(), format!("{SUSPICION_MS}ms")]
}

/// A campaign in a lab of its own.
#[derive(Debug)]
pub struct Campaign {
    paths: Paths,
    prefix: String,
    config: StageConfig,
    stage: Option<Stage>,
    failures: usize,
}

impl Campaign {
    /// A campaign with a Linux in QEMU; `accel` is `tcg` or `kvm`.
    #[must_use]
    pub fn new(paths: &Paths, prefix: &str, accel: &str) -> Campaign {
        let guest = QemuConfig {
            accel: accel.to_owned(),
            memory_mib: 160,
            workload: "redis,dirty:200:25".to_owned(),
            second_monitor: true,
            ..QemuConfig::default()
        };
        Campaign::with(paths, prefix, guest.into())
    }

    /// A campaign with this guest; one in QEMU needs a second monitor.
    #[must_use]
    pub fn with(paths: &Paths, prefix: &str, guest: GuestConfig) -> Campaign {
        let config = StageConfig {
            guest,
            client: ClientConfig {
                keys: 1000,
                ..ClientConfig::default()
            },
            agent: AgentConfig {
                verify_activation: true,
                extra: patience(),
                ..AgentConfig::default()
            },
            ..StageConfig::default()
        };
        Campaign {
            paths: paths.clone(),
            prefix: prefix.to_owned(),
            config,
            stage: None,
            failures: 0,
        }
    }

    /// Carries out one trial. A failure is a verdict, not an error.
    pub fn run(&mut self, trial: Trial) -> Outcome {
        let begun = Instant::now();
        let mut outcome = Outcome::of(trial);
        if let Err(error) = self.try_run(trial, &mut outcome) {
            outcome.verdict = format!("{error:#}");
            outcome.logs = self.keep_logs(trial).ok();
            // What it left is not to be trusted.
            self.stage = None;
        }
        outcome.seconds = begun.elapsed().as_secs_f64();
        outcome
    }

    fn try_run(&mut self, trial: Trial, outcome: &mut Outcome) -> Result<()> {
        let stage = match &mut self.stage {
            Some(stage) => stage,
            none => none.insert(Stage::raise(&self.paths, &self.prefix, &self.config)?),
        };
        let stays = trial::run(stage, &self.config, trial, outcome)?;
        if !stays {
            self.stage = None;
        }
        Ok(())
    }

    fn keep_logs(&mut self, trial: Trial) -> Result<PathBuf> {
        self.failures += 1;
        let name = format!("failed-{}-{}", self.failures, trial.point);
        let to = keep_logs(&self.paths, &self.prefix, &name)?;
        if let Some(stage) = &self.stage {
            let lines: Vec<String> = stage
                .timeline
                .events()
                .iter()
                .map(|event| {
                    format!(
                        "{} {} {} {}",
                        event.at.micros(),
                        event.source,
                        event.name,
                        event.detail
                    )
                })
                .collect();
            fs::write(to.join("timeline"), lines.join("\n")).context("cannot write the timeline")?;
        }
        fs::write(to.join("failed-at"), Stamp::now().micros().to_string()).context("cannot write")?;
        Ok(to)
    }
}

/// Copies the logs of the lab `prefix`, which its next run removes, to a folder beside them; returns that.
///
/// # Errors
/// When they can't be copied.
pub fn keep_logs(paths: &Paths, prefix: &str, name: &str) -> Result<PathBuf> {
    let logs = paths.target.join("logs");
    let (from, to) = (logs.join(prefix), logs.join(format!("{prefix}-{name}")));
    if to.exists() {
        fs::remove_dir_all(&to).context("cannot remove old logs")?;
    }
    fs::create_dir_all(&to).context("cannot make a folder for logs")?;
    for entry in fs::read_dir(&from).context("cannot read the logs")?.flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).context("cannot copy a log")?;
    }
    Ok(to)
}
