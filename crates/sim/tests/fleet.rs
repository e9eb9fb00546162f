//! Many VMs on one agent: what they share may fail, and no VM's invariants are broken by it, nor by another VM.
//!
//! The whole of it: `cargo run --release -p romulus-sim -- --fleet 50 --faults 10000`.
#![forbid(unsafe_code)]

use romulus_sim::{Mistake, run_fleet};

/// VMs on the agent.
const VMS: usize = 50;

#[test]
fn fifty_vms_on_one_agent_and_its_restarts_break_no_invariant() {
    let outcome = run_fleet(1, VMS, 300, None);
    assert!(
        outcome.violations.is_empty(),
        "replay with `cargo run -p romulus-sim -- --fleet {VMS} --faults 300 --seed 1`: {:#?}",
        outcome.violations
    );
    println!("{outcome:?}");
    // A fleet in which nothing happens finds nothing.
    assert!(
        outcome.agent_lives > 3
            && outcome.took_over > 10
            && outcome.reopened > 10
            && outcome.paired > outcome.vms / 2,
        "too little happened: {outcome:?}"
    );
}

#[test]
fn a_seed_reproduces_its_fleet() {
    assert_eq!(run_fleet(7, 12, 1, None), run_fleet(7, 12, 1, None));
}

#[test]
fn a_planted_mistake_is_found_among_many_vms() {
    for mistake in [
        Mistake::PageLeftOut,
        Mistake::TakeOverWithoutGrant,
        Mistake::ReleaseBeforeAck,
    ] {
        let outcome = run_fleet(3, 20, 4_000, Some(mistake));
        assert!(
            !outcome.violations.is_empty(),
            "{mistake:?} is not found: {outcome:?}"
        );
    }
}
