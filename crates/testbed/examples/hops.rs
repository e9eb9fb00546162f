//! `hops [--hops N] [--vcpus N]`: moves a machine with network, disk, timers and self-checks from process to process, N times
//! (1,000 by default), as `tests/hops.rs` does a few times. Needs root, for a network of its own, and `testbed` built beside it:
//!
//! ```sh
//! cargo build --release -p romulus-testbed --bin testbed --example hops
//! target/release/examples/hops --hops 10000 --vcpus 2
//! ```
//!
//! When a step takes too long, or at SIGTERM, it says what it was doing, and what its processes wait for; they end with it.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::PathBuf;
use std::process::exit;
use std::time::{Duration, Instant};

use clap::Parser;
use common::steps::Steps;
use common::tour::{Plan, hop_around};
use tokio::signal::unix::{SignalKind, signal};

/// How often it is looked whether a step takes too long.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Parser)]
struct Options {
    /// How many times the machine goes into another process.
    #[arg(long, default_value_t = 1000)]
    hops: usize,
    /// vCPUs, 1 to 4.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Memory of the machine.
    #[arg(long, default_value_t = 48, value_name = "MIB")]
    memory: u64,
    /// How long one step of a hop may take.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    step_limit: u64,
    /// While there is such a file no hop begins, and the machine stands still: somebody measures something here.
    #[arg(long, value_name = "FILE")]
    hold_while: Option<PathBuf>,
    /// The VMM; `testbed` in the folder above this program by default.
    #[arg(long)]
    testbed: Option<PathBuf>,
}

fn main() {
    let options = Options::parse();
    let testbed = options.testbed.unwrap_or_else(|| {
        let here = std::env::current_exe().expect("a program knows where it is");
        here.parent()
            .and_then(|folder| folder.parent())
            .expect("it lies in a folder")
            .join("testbed")
    });
    let plan = Plan {
        program: &testbed,
        vcpus: options.vcpus,
        memory_mib: options.memory,
        hops: options.hops,
        hold: options.hold_while.as_deref(),
    };
    let steps = Steps::new();
    let (watched, limit) = (steps.clone(), Duration::from_secs(options.step_limit));
    std::thread::spawn(move || watch(&watched, limit));
    let begin = Instant::now();
    let found = hop_around(&plan, &steps, |hop| {
        if hop.is_multiple_of(100) {
            println!("{hop} hops in {:.0} s", begin.elapsed().as_secs_f64());
        }
    });
    println!("{steps}");
    println!(
        "{} hops with {} vCPUs in {:.0} s: the self-check holds, the connection lives; {found:?}",
        options.hops,
        options.vcpus,
        begin.elapsed().as_secs_f64()
    );
}

/// Ends the program when a step takes longer than `limit`, or when somebody ends it, and says what it was doing.
fn watch(steps: &Steps, limit: Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime for signals");
    let why = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM can be waited for");
        loop {
            tokio::select! {
                _ = terminate.recv() => return "ended by SIGTERM",
                _ = tokio::signal::ctrl_c() => return "ended by SIGINT",
                () = tokio::time::sleep(LOOK) => {}
            }
            if steps.at().1 > limit {
                return "a step takes too long";
            }
        }
    });
    println!("{why}\n{steps}");
    processes().into_iter().for_each(|process| tell_threads(&process));
    // What was started ends with the thread that started it.
    exit(1);
}

/// This process and its children.
fn processes() -> Vec<String> {
    let mut all = vec![std::process::id().to_string()];
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        all.extend(children.split_whitespace().map(str::to_owned));
    }
    all
}

/// What each thread of a process does, as far as the kernel says.
fn tell_threads(process: &str) {
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find(|line| line.starts_with("State:"));
        println!(
            "process {process}, thread {}: {}, in {}",
            read("comm").trim(),
            state.unwrap_or("gone"),
            read("wchan")
        );
    }
}
