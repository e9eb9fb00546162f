//! The plans of `bench` that raise a lab or start a QEMU, in their shortest form. The others are tried in `bench/tests/plans.rs`.

use anyhow::Result;
use romulus_e2e::Paths;
use romulus_e2e::plans::run_shortest;

fn try_plan(plan: &str, only: &[&str]) -> Result<()> {
    run_shortest(&Paths::here().binary("bench")?, plan, only)
}

#[test]
fn the_plan_of_the_backup_host_runs_in_its_shortest_form() -> Result<()> {
    try_plan("backup-host", &[])
}

#[test]
fn the_sweep_of_epochs_runs_in_its_shortest_form() -> Result<()> {
    try_plan("epoch", &[])
}

#[test]
fn the_sweep_of_epochs_of_a_linux_runs_in_its_shortest_form() -> Result<()> {
    try_plan("epoch-linux", &[])
}

#[test]
fn the_plan_of_the_peers_runs_in_its_shortest_form() -> Result<()> {
    try_plan("peers", &[])
}

#[test]
fn what_of_the_limits_needs_a_lab_runs_in_its_shortest_form() -> Result<()> {
    let only = ["kvm.", "commit", "idle", "epochs", "link", "harvest.scan", "peer"];
    try_plan("limits", &only)
}
