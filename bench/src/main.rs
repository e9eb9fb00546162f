//! `bench run PLAN --json FILE`: measures what a plan names, each value beside a reference measured in the same run.
//!
//! ```text
//!   plan.rs      a TOML file ─► what to measure, how often, and within which bounds
//!   measures/    one file a family; each does its work in turn with the reference's
//!   run.rs       the turns: repetitions, rounds, seed, progress
//!   stats.rs     samples ─► p50, p95, p99, the spread of the repetitions
//!   report.rs    the JSON and the verdict; table.rs the same for people
//! ```
//!
//! Invariants: a measure that cannot run is a row with an error, never a pass; a value without its reference of the same run
//! has no ratio; nothing is measured after a plan that is wrong in any line.
#![forbid(unsafe_code)]

mod contents;
mod host;
mod measures;
mod plan;
mod report;
mod run;
mod stats;
mod table;

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use plan::Plan;
use report::Report;
use run::Settings;

/// The plan or the command line is wrong. The same number as clap's own.
const EXIT_USAGE: u8 = 2;
/// Everything was measured, and a bound does not hold.
const EXIT_BOUND: u8 = 3;
/// Something that the plan names could not be measured.
const EXIT_UNABLE: u8 = 4;

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
    /// List the measures and the plans that there are
    List,
}

#[derive(clap::Args)]
struct RunArgs {
    /// A plan: a TOML file, or the name of one that is built in
    plan: String,
    /// Few rounds, to see that everything runs: the figures mean little
    #[arg(long)]
    quick: bool,
    /// Only measures whose name begins so; can be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
    let done = match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::List => {
            list();
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
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

fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let plan = match Plan::find(&args.plan).and_then(|plan| plan.only(&args.only)) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("error: {:#}", anyhow::Error::new(error));
            return Ok(ExitCode::from(EXIT_USAGE));
        }
    };
    // Before the first measure: minutes of it must not end in a file that cannot be written.
    let mut into = match &args.json {
        Some(path) => Some(File::create(path).with_context(|| format!("cannot write {}", path.display()))?),
        None => None,
    };
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing (cargo run --release -p bench)");
    }
    let settings = Settings {
        quick: args.quick,
        repetitions: plan.repetitions,
        seed: plan.seed,
    };
    let report = Report::of(&plan, settings);
    print!("{}", table::of(&report));
    if let Some(file) = &mut into {
        let text = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.write_all(b"\n"))
            .context("cannot write the report")?;
    }
    Ok(if report.measures.iter().any(|row| row.error.is_some()) {
        ExitCode::from(EXIT_UNABLE)
    } else if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_BOUND)
    })
}

fn list() {
    println!("measures:");
    for kind in measures::ALL {
        println!("  {:18} {}", kind.name, kind.about);
    }
    println!("\nbuilt-in plans:");
    for (name, text) in plan::BUILT_IN {
        let about = Plan::parse(text).map_or_else(|error| error.to_string(), |plan| plan.about);
        println!("  {name:18} {about}");
    }
}
