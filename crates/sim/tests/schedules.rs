//! Many schedules: nothing is ever broken, whatever a seed lets go wrong; and the same seed is the same run.
#![forbid(unsafe_code)]

use romulus_sim::{Reached, run};

/// Schedules of a test run; `ROMULUS_SIM_RUNS` sets another number, `ROMULUS_SIM_SEED` another first seed.
const RUNS: u64 = 10_000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

fn run_all(seeds: impl Iterator<Item = u64>) -> (Vec<String>, Reached, u64) {
    let (mut broken, mut sum, mut took_over) = (Vec::new(), Reached::default(), 0);
    for seed in seeds {
        let outcome = run(seed, None, false);
        if let Some(violation) = outcome.violation {
            broken.push(format!("seed {seed}: {violation}"));
        }
        sum.paired |= outcome.reached.paired;
        sum.commits += outcome.reached.commits;
        sum.outputs += outcome.reached.outputs;
        sum.reopened += outcome.reached.reopened;
        sum.held_pages += outcome.reached.held_pages;
        took_over += u64::from(outcome.reached.took_over);
    }
    (broken, sum, took_over)
}

#[test]
fn no_schedule_breaks_an_invariant() {
    let (first, runs) = (number("ROMULUS_SIM_SEED", 0), number("ROMULUS_SIM_RUNS", RUNS));
    let halves: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|half| scope.spawn(move || run_all((first + half..first + runs).step_by(2))))
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("a worker's panic is the machine's"))
            .collect()
    });
    let broken: Vec<_> = halves.iter().flat_map(|(broken, ..)| broken.clone()).collect();
    let commits: u64 = halves.iter().map(|(_, sum, _)| sum.commits).sum();
    let reopened: u64 = halves.iter().map(|(_, sum, _)| sum.reopened).sum();
    let held: u64 = halves.iter().map(|(_, sum, _)| sum.held_pages).sum();
    let took_over: u64 = halves.iter().map(|(.., took_over)| took_over).sum();
    println!(
        "{runs} schedules from seed {first}: {commits} commits, {took_over} takeovers, {reopened} images reopened, {held} pages held by backups at a new session"
    );
    assert!(
        broken.is_empty(),
        "replay with `cargo run -p romulus-sim -- --trace --seed N`:\n{}",
        broken.join("\n")
    );
    // A simulator in which nothing happens finds nothing.
    assert!(
        took_over > runs / 20 && commits > runs * 20 && reopened > runs / 50 && held > runs,
        "too little happened"
    );
}

#[test]
fn a_seed_reproduces_its_run() {
    for seed in 0..40 {
        let (first, second) = (run(seed, None, true), run(seed, None, true));
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!(first.reached, second.reached, "seed {seed}");
        assert!(first.trace.len() > 20, "seed {seed} tells what happened");
    }
}
