//! `cargo xtask soak`: a pair under load for minutes, in which nobody may take over.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use romulus_e2e::Paths;
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::soak::{SoakConfig, SoakReport, soak};
use romulus_e2e::stage::StageConfig;

use crate::{demo, kvm, setup, sh};

/// What the soak can be told.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// For so long
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1440))]
    minutes: u64,
    /// Keep every core busy with a process of normal priority
    #[arg(long)]
    load: bool,
    /// Pages that the guest dirties every 25 ms beside what redis does
    #[arg(long, default_value_t = 600, value_name = "N")]
    dirty_pages: u32,
    /// Run the guest in the test VMM of this checkout, over KVM
    #[arg(long)]
    kvm: bool,
    /// Use guest and daemons as an earlier run or `cargo build --release` left them
    #[arg(long)]
    no_build: bool,
    /// Write what was seen to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What the names of the lab's namespaces, folders and sockets begin with
    #[arg(long, value_name = "NAME", default_value = "romo")]
    lab: String,
    /// Pass this on to `replicator protect` (repeat it for more)
    #[arg(long = "protect-arg", value_name = "ARG", allow_hyphen_values = true)]
    protect_args: Vec<String>,
}

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::need_lab_rights()?;
    let paths = if args.no_build {
        Paths::of_checkout(&sh::root())
    } else {
        demo::prepare(args.kvm)?
    };
    demo::clean_up_on_signals(&args.lab);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut config = SoakConfig {
        stage: StageConfig::default(),
        protect: ProtectConfig::default(),
        duration: Duration::from_secs(args.minutes * 60),
        busy_processes: if args.load { cores } else { 0 },
    };
    config.protect.extra.clone_from(&args.protect_args);
    config.stage.guest = if args.kvm {
        kvm::guest(args.dirty_pages)
    } else {
        QemuConfig::default().dirty_pages(args.dirty_pages).into()
    };
    sh::step(&format!(
        "soak: {} minutes, {} busy processes on {cores} cores",
        args.minutes, config.busy_processes
    ));
    let mut told = 0.0;
    let report = soak(&paths, &args.lab, &config, |report| {
        if report.seconds - told >= 30.0 {
            told = report.seconds;
            print_line(report);
        }
    })?;
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    }
    print_line(&report);
    println!(
        "verdict: {} ({} takeovers, {} acknowledged writes of {} lost, {} connections reset)",
        if report.is_ok() { "ok" } else { "FAILED" },
        report.takeovers,
        report.lost_acked_writes,
        report.acked_writes,
        report.connection_resets
    );
    Ok(if report.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print_line(report: &SoakReport) {
    let status = |name: &str| {
        report
            .status
            .get(name)
            .map_or_else(String::new, ToString::to_string)
    };
    println!(
        "  {:>5.0} s, load at most {:.1}: {} takeovers, {} suspicions, paired again {} times, {} of {} looks not protected; \
         epochs {}, on time {}",
        report.seconds,
        report.load_max,
        report.takeovers,
        report.suspicions,
        report.pairs_lost,
        report.looks_unprotected.0,
        report.looks_unprotected.1,
        status("epochs"),
        status("epoch_on_time_ratio"),
    );
}
