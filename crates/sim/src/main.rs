//! `romulus-sim`: runs schedules by seed, and tells a run as it happened.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use romulus_sim::{Mistake, run, run_fleet};

/// Runs the simulator. The exit code is 1 when an invariant is broken.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The seed of the (first) run.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many runs, with seeds from there on.
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// Runs so many VMs on one agent instead, generation after generation.
    #[arg(long, value_name = "VMS")]
    fleet: Option<u16>,
    /// With --fleet: until so many faults have happened.
    #[arg(long, default_value_t = 10_000, requires = "fleet")]
    faults: u64,
    /// Plants a mistake.
    #[arg(long)]
    mistake: Option<Mistake>,
    /// Tells everything that happens, if there is one run.
    #[arg(long)]
    trace: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(vms) = options.fleet {
        return fleet(&options, vms.max(1).into());
    }
    let tracing = options.trace && options.runs == 1;
    let (mut paired, mut took_over, mut commits, mut broken) = (0u64, 0u64, 0u64, 0u64);
    for seed in options.seed..options.seed.saturating_add(options.runs) {
        let outcome = run(seed, options.mistake, tracing);
        for line in &outcome.trace {
            println!("{line}");
        }
        paired += u64::from(outcome.reached.paired);
        took_over += u64::from(outcome.reached.took_over);
        commits += outcome.reached.commits;
        if let Some(violation) = outcome.violation {
            broken += 1;
            println!("seed {seed}: {violation}");
        }
    }
    println!(
        "{} runs, {paired} paired, {took_over} took over, {commits} commits, {broken} broken",
        options.runs
    );
    if broken == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn fleet(options: &Options, vms: usize) -> ExitCode {
    let outcome = run_fleet(options.seed, vms, options.faults, options.mistake);
    for (vm, seed, violation) in &outcome.violations {
        println!("{vm} (plan {seed}): {violation}");
    }
    for (kind, count) in &outcome.faults {
        println!("{count:>8}  {kind}");
    }
    println!(
        "{} faults, {} VMs in generations of {vms}, {} paired, {} took over, {} commits, {} lives of the agent, {} images \
         reopened, {} broken",
        outcome.fault_count(),
        outcome.vms,
        outcome.paired,
        outcome.took_over,
        outcome.commits,
        outcome.agent_lives,
        outcome.reopened,
        outcome.violations.len()
    );
    if outcome.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
