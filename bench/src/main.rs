//! `bench`: measures what a plan names, each value beside a reference measured in the same run; shows and compares reports.
//!
//! ```text
//!   commands.rs  what the verbs do, and their exit codes
//!   advise/      looks at a running guest, and says which length of epochs suits it
//!   plan.rs      a TOML file ─► what to measure, how often, and within which bounds
//!   measures/    one file a family; each does its work in turn with the reference's
//!   run.rs       the turns: repetitions, rounds, seed, progress
//!   series.rs    how something went over time
//!   stats.rs     samples ─► p50, p95, p99, the spread of the repetitions
//!   report.rs    the JSON and the verdict; table.rs the same for people
//!   read.rs      reports from files
//!   page/        reports as one HTML page with plots
//!   check/       a quick run beside the history of such runs
//!   scale/       how many VMs a backup host carries, simulated by measured costs
//!   compare/     what changed from one report to another, and what is noise
//! ```
//!
//! Invariants: a measure that cannot run is a row with an error, never a pass; a value without its reference of the same run
//! has no ratio; nothing is measured after a plan that is wrong in any line.
#![forbid(unsafe_code)]

mod advise;
mod check;
mod commands;
mod compare;
mod contents;
mod host;
mod measures;
mod page;
mod parameters;
mod plan;
mod read;
mod report;
mod run;
mod scale;
mod series;
mod stats;
mod table;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use romulus_hypervisor::qemu::source::guardian;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use advise::AdviseArgs;
use commands::{CheckArgs, CompareArgs, ReportArgs, RunArgs, ScaleArgs};

#[derive(Parser)]
#[command(
    about = "Measures Romulus as ratios to the same work done alone in the same run",
    version
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the measures of a plan. Exit codes: 0 all bounds hold, 1 failed, 2 wrong usage or plan, 3 a bound does not
    /// hold, 4 a measure could not run
    Run(RunArgs),
    /// Look at a running guest without protecting it, and say what each length of epochs would cost. Exit codes: 0 said, 1 failed
    /// (the guest was let go), 2 wrong usage or settings, 3 no length reaches the goal
    Advise(Box<AdviseArgs>),
    /// Say which rows changed from report A to report B, and which only seem to. Exit codes: 0 no row is slower, 1 failed,
    /// 2 wrong usage or a file that is no report, 3 a row is slower
    Compare(CompareArgs),
    /// Make one HTML page of reports, with plots; it needs no network and no script. Exit codes: 0 made, 1 failed, 2 wrong
    /// usage or a file that is no report
    Report(ReportArgs),
    /// Run plans quickly and say which ratios moved by more than the noise. Exit codes: 0 none is higher and all bounds hold,
    /// 1 failed, 2 wrong usage, plan or history, 3 a ratio is higher or a bound does not hold, 4 a measure could not run
    Check(CheckArgs),
    /// Simulate many VMs on one backup host, by measured costs, and say where it saturates. Exit codes as for `run`
    Scale(ScaleArgs),
    /// List the measures and the plans that there are
    List,
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // The guests that are measured run in processes of their own, which are this program again.
    if args.get(1).is_some_and(|word| word == "testbed") {
        if let Err(error) = end_with_parent() {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
        return romulus_testbed::main(args.into_iter().skip(1));
    }
    if let Some(ended) = as_helper(&args) {
        return ended.map_or_else(
            |error| {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            },
            |()| ExitCode::SUCCESS,
        );
    }
    let done = match Cli::parse().command {
        Command::Run(args) => commands::run(&args),
        Command::Advise(args) => advise::run(&args),
        Command::Compare(args) => commands::compare(&args),
        Command::Report(args) => commands::report(&args),
        Command::Check(args) => commands::check(&args),
        Command::Scale(args) => commands::scale(&args),
        Command::List => {
            commands::list();
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// And so do the backup's end of a connection, and what frees a guest in QEMU if this program dies.
fn as_helper(args: &[OsString]) -> Option<anyhow::Result<()>> {
    let word = args.get(1)?.to_str()?;
    let words = args
        .iter()
        .skip(2)
        .map(|word| word.to_string_lossy().into_owned());
    let words: Vec<String> = words.collect();
    match word {
        measures::PEER => Some(end_with_parent().and_then(|()| measures::peer_main(&words))),
        advise::attach::GUARDIAN => Some(guardian::run(&words).map_err(anyhow::Error::new)),
        _ => None,
    }
}

/// A guest must not outlive the run that measures it, however that ends: the kernel kills it then.
fn end_with_parent() -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot ask to be ended with the parent")?;
    // A parent that was gone before has been replaced by another program.
    let exe = |pid: &str| std::fs::read_link(format!("/proc/{pid}/exe"));
    let parent = getppid().map_or_else(|| "1".to_owned(), |pid| pid.as_raw_nonzero().to_string());
    let (own, other) = (exe("self")?, exe(&parent));
    anyhow::ensure!(
        other.is_ok_and(|other| other == own),
        "only bench itself starts its guests"
    );
    Ok(())
}
