//! The plans that are shipped and need no lab, each once in its shortest form.

use std::collections::BTreeSet;
use std::path::Path;

use romulus_e2e::plans::run_shortest;

/// Tried here. `kvm` needs /dev/kvm, and fails without it.
const TRIED: [&str; 3] = ["parts", "kvm", "scale"];
/// These raise the end-to-end tests' lab with the release binaries and as root, or QEMU guests: `tests/tests/plans.rs`.
const NEED_THE_LAB: [&str; 5] = ["backup-host", "epoch", "epoch-linux", "limits", "peers"];
/// What of `limits` needs no lab, and is tried here. As root, like the tests of the gate itself.
const LIMITS_WITHOUT_LAB: [&str; 5] = ["gate", "wire", "codec", "memory", "harvest.large"];
fn try_plan(plan: &str, only: &[&str]) {
    run_shortest(Path::new(env!("CARGO_BIN_EXE_bench")), plan, only).unwrap();
}

#[test]
fn the_plan_of_the_parts_runs_in_its_shortest_form() {
    try_plan("parts", &[]);
}

#[test]
fn the_plan_of_a_kvm_guest_runs_in_its_shortest_form() {
    try_plan("kvm", &[]);
}

#[test]
fn what_of_the_limits_needs_no_lab_runs_in_its_shortest_form() {
    try_plan("limits", &LIMITS_WITHOUT_LAB);
}

#[test]
fn the_plan_of_simulated_fleets_runs_in_its_shortest_form() {
    try_plan("scale", &[]);
}

#[test]
fn every_plan_that_is_shipped_is_tried_here_or_said_to_need_the_lab() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("plans");
    let shipped: BTreeSet<String> = std::fs::read_dir(folder)
        .expect("the plans")
        .map(|entry| {
            entry
                .expect("a plan")
                .path()
                .file_stem()
                .expect("a name")
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let known: BTreeSet<String> = TRIED
        .iter()
        .chain(&NEED_THE_LAB)
        .map(|plan| (*plan).to_owned())
        .collect();
    assert_eq!(
        shipped, known,
        "say of a new plan whether it is tried here or needs the lab"
    );
}
