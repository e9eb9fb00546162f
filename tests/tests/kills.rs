//! Kills aimed at named steps: a few of each kind, for every change. `cargo xtask kills` strikes all of them.

use anyhow::{Result, ensure};
use romulus_e2e::campaign::{Blow, Campaign, Part, Trial, When, all};
use romulus_e2e::{Paths, TEST_LAB, Vmm};

/// Carries out one trial of each of these, in the order of the plan, so that a guest serves many.
fn survives(wanted: &[(Part, When, &str, Blow)]) -> Result<()> {
    let of_plan = |trial: &Trial| wanted.contains(&(trial.part, trial.when, trial.point, trial.blow));
    let trials: Vec<Trial> = all(Vmm::Qemu).into_iter().filter(of_plan).collect();
    ensure!(
        trials.len() >= wanted.len(),
        "the plan has only {trials:?} of these"
    );
    let mut campaign = Campaign::new(&Paths::here(), TEST_LAB, "tcg");
    for trial in trials {
        let outcome = campaign.run(trial);
        println!(
            "  {} in {:.1} s: {}",
            trial.point, outcome.seconds, outcome.verdict
        );
        ensure!(outcome.is_ok(), "{outcome:#?}");
    }
    Ok(())
}

#[test]
fn a_daemon_that_dies_on_the_way_to_protection_hinders_neither_the_guest_nor_the_next_try() -> Result<()> {
    use {Blow::*, Part::*, When::*};
    survives(&[
        (Replicator, Starting, "bootstrap.in_ram", Kill),
        (Replicator, Starting, "arm.holding", Stop),
        (Replicator, Starting, "replicator.after_close", Kill),
        (Replicator, Starting, "replicator.after_close", Stop),
        (Agent, Starting, "agent.after_unusable", Kill),
        (Agent, Starting, "standby.in_stream", Kill),
        (Witness, Starting, "store.renamed", Kill),
    ])
}

#[test]
fn a_daemon_that_dies_at_any_step_of_an_epoch_or_a_takeover_costs_no_answer() -> Result<()> {
    use {Blow::*, Part::*, When::*};
    survives(&[
        (Agent, Protected, "agent.in_apply", Kill),
        (Agent, Protected, "agent.after_commit", Stop),
        (Replicator, Protected, "capture.after_command", Kill),
        (Replicator, Protected, "capture.after_barrier", Stop),
        (Replicator, Protected, "replicator.commit_queued", HostDies),
        (Replicator, Protected, "replicator.before_release", HostDies),
        (Agent, TakingOver, "agent.after_consumed", Kill),
        (Witness, TakingOver, "store.synced", Kill),
    ])
}
