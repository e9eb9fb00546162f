//! `cargo xtask kills`: every named step of every daemon is struck, and kills at random moments besides.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use romulus_e2e::benchmark::PROGRAM;
use romulus_e2e::campaign::{Campaign, Outcome, SUSPICION_MS, Trial, all, keep_logs, patience, print_table};
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::report::Kill;
use romulus_e2e::scenario::{ScenarioConfig, kill_once};
use romulus_e2e::{Paths, Stamp, Vmm};
use serde_json::json;

use crate::{demo, kvm, packages, setup, sh};

/// What the campaign can be told.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Only trials whose description (`replicator protected capture.holding kill`) contains one of these, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    points: Vec<String>,
    /// Only list the trials
    #[arg(long)]
    list: bool,
    /// Leave out the aimed trials
    #[arg(long)]
    no_aimed: bool,
    /// Kill the primary's host so many times at random moments besides, each time with a fresh pair; with --kvm under the load of
    /// redis-benchmark
    #[arg(long, default_value_t = 0, value_name = "N")]
    random: u32,
    /// Draw the random moments from this number (printed by every run)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Use guest and daemons as an earlier run or `cargo build --release` left them
    #[arg(long)]
    no_build: bool,
    /// Write what was found to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run the guest in the test VMM of this checkout, over KVM
    #[arg(long)]
    kvm: bool,
    /// QEMU's accelerator, tcg or kvm
    #[arg(long, default_value = "tcg", value_name = "NAME", value_parser = ["tcg", "kvm"], conflicts_with = "kvm")]
    accel: String,
    /// What the names of the lab's namespaces, folders and sockets begin with
    #[arg(long, value_name = "NAME", default_value = "romk")]
    lab: String,
}

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let trials = chosen(args)?;
    if args.list {
        for trial in &trials {
            println!("{}", describe(trial));
        }
        return Ok(ExitCode::SUCCESS);
    }
    setup::need_lab_rights()?;
    let paths = prepare(args)?;
    if args.kvm && args.random > 0 {
        packages::need(&[("redis-tools", PROGRAM)])?;
    }
    demo::clean_up_on_signals(&args.lab);
    let mut outcomes = Vec::new();
    let mut campaign = if args.kvm {
        Campaign::with(&paths, &args.lab, kvm::guest(200))
    } else {
        Campaign::new(&paths, &args.lab, &args.accel)
    };
    for (number, trial) in trials.iter().enumerate() {
        let outcome = campaign.run(*trial);
        println!(
            "[{}/{}] {:<60} {:>5.1} s  {:<8} {}",
            number + 1,
            trials.len(),
            describe(trial),
            outcome.seconds,
            outcome.went_on,
            outcome.verdict.lines().next().unwrap_or_default()
        );
        outcomes.push(outcome);
        write(args, &outcomes, &[])?;
    }
    drop(campaign);
    let seed = args.seed.unwrap_or_else(|| Stamp::now().micros());
    let mut kills = Vec::new();
    for number in 0..args.random {
        if number == 0 {
            sh::step(&format!("random moments, seed {seed}"));
        }
        let config = scenario(args, seed.wrapping_add(u64::from(number)));
        let kill = kill_once(&paths, &args.lab, &config).unwrap_or_else(|error| Kill {
            verdict: format!("{error:#}"),
            ..Kill::default()
        });
        println!(
            "[{}/{}] killed {:.2} s after protection: {} acknowledged, {} gated frames, first frame after {:.0} ms, {}",
            number + 1,
            args.random,
            kill.protected_s,
            kill.acked_writes,
            kill.gated_frames,
            kill.first_frame_ms.unwrap_or(f64::NAN),
            kill.verdict.lines().next().unwrap_or_default()
        );
        if !kill.is_ok() {
            let kept = keep_logs(&paths, &args.lab, &format!("failed-random-{}", number + 1));
            println!(
                "  logs: {}",
                kept.map_or_else(|error| format!("{error:#}"), |to| to.display().to_string())
            );
        }
        kills.push(kill);
        write(args, &outcomes, &kills)?;
    }
    Ok(verdict(&outcomes, &kills))
}

fn prepare(args: &Args) -> Result<Paths> {
    if args.no_build {
        return Ok(Paths::of_checkout(&sh::root()));
    }
    demo::prepare(args.kvm)
}

fn chosen(args: &Args) -> Result<Vec<Trial>> {
    let wanted = |trial: &Trial| {
        let text = describe(trial);
        args.points.is_empty() || args.points.iter().any(|part| text.contains(part.trim()))
    };
    let trials: Vec<Trial> = if args.no_aimed {
        Vec::new()
    } else {
        let vmm = if args.kvm { Vmm::Testbed } else { Vmm::Qemu };
        all(vmm).into_iter().filter(wanted).collect()
    };
    if trials.is_empty() && !args.no_aimed {
        bail!("no trial's description contains any of these; `cargo xtask kills --list` shows them all");
    }
    Ok(trials)
}

fn describe(trial: &Trial) -> String {
    let word = |value: serde_json::Result<serde_json::Value>| {
        value
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default()
    };
    format!(
        "{} {} {}@{} {}",
        word(serde_json::to_value(trial.part)),
        word(serde_json::to_value(trial.when)),
        trial.point,
        trial.pass,
        word(serde_json::to_value(trial.blow))
    )
}

fn scenario(args: &Args, seed: u64) -> ScenarioConfig {
    let mut config = ScenarioConfig {
        before: Duration::from_millis(500),
        protected: Duration::from_millis(1500),
        after: Duration::from_millis(1500),
        ..ScenarioConfig::default()
    };
    config.stage.seed = seed;
    config.stage.guest = if args.kvm {
        kvm::guest(600)
    } else {
        let guest = QemuConfig {
            accel: args.accel.clone(),
            ..QemuConfig::default()
        };
        guest.dirty_pages(600).into()
    };
    config.stage.benchmark = args.kvm;
    // The testbed's guest checks its memory itself, and the time to its first frame counts.
    config.stage.agent.verify_activation = !args.kvm;
    config.stage.agent.extra = patience();
    config.protect.extra = patience();
    config
}

fn write(args: &Args, outcomes: &[Outcome], kills: &[Kill]) -> Result<()> {
    let Some(file) = &args.json else { return Ok(()) };
    let report = json!({
        "aimed": outcomes,
        "random": kills,
        "failed": failed(outcomes, kills),
        "suspicion_timeout_ms": SUSPICION_MS,
        "first_frame_ms": first_frame(kills),
        "lost_acked_writes": outcomes.iter().map(|o| o.lost_acked_writes).sum::<u64>()
            + kills.iter().map(|kill| kill.lost_acked_writes).sum::<u64>(),
        "connection_resets": outcomes.iter().map(|o| o.connection_resets).sum::<u64>()
            + kills.iter().map(|kill| kill.connection_resets).sum::<u64>(),
        "uncommitted_frames": outcomes.iter().map(|o| o.uncommitted_frames).sum::<usize>()
            + kills.iter().map(|kill| kill.uncommitted_frames).sum::<usize>(),
    });
    let text = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
    fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}

/// From the kill to the first frame of the activated guest: median, 99th percentile and worst of all kills.
fn first_frame(kills: &[Kill]) -> Option<serde_json::Value> {
    let mut times: Vec<f64> = kills.iter().filter_map(|kill| kill.first_frame_ms).collect();
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(((times.len() - 1) * percent).div_ceil(100)).copied();
    (!times.is_empty()).then(|| json!({"p50": at(50), "p99": at(99), "max": at(100)}))
}

fn failed(outcomes: &[Outcome], kills: &[Kill]) -> usize {
    outcomes.iter().filter(|outcome| !outcome.is_ok()).count()
        + kills.iter().filter(|kill| !kill.is_ok()).count()
}

fn verdict(outcomes: &[Outcome], kills: &[Kill]) -> ExitCode {
    println!();
    if !outcomes.is_empty() {
        print_table(outcomes);
    }
    for (number, kill) in kills.iter().enumerate().filter(|(_, kill)| !kill.is_ok()) {
        println!("  FAILED random kill {}: {}", number + 1, kill.verdict);
    }
    if let Some(times) = first_frame(kills) {
        println!(
            "from the kill to the guest's first frame, with a suspicion timeout of {SUSPICION_MS} ms: {times} ms"
        );
    }
    let failed = failed(outcomes, kills);
    println!(
        "verdict: {failed} of {} aimed and {} random kills failed",
        outcomes.len(),
        kills.len()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
