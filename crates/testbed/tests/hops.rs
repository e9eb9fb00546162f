//! A machine goes from process to process, and neither the guest nor its clients notice anything but time.

mod common;

use std::path::Path;

use common::steps::Steps;
use common::tour::{Found, Plan, hop_around};

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");
/// Few, as a test; `cargo run --release -p romulus-testbed --example hops` makes as many as one likes.
const HOPS: usize = 6;

fn hop(vcpus: u32, memory_mib: u64) -> Found {
    let plan = Plan {
        program: Path::new(TESTBED),
        vcpus,
        memory_mib,
        hops: HOPS,
        hold: None,
    };
    hop_around(&plan, &Steps::new(), |_| ())
}

#[test]
fn a_guest_of_one_vcpu_goes_on_in_process_after_process() {
    hop(1, 48);
}

#[test]
fn a_guest_of_two_vcpus_goes_on_in_process_after_process() {
    hop(2, 48);
}

#[test]
fn a_guest_of_three_vcpus_goes_on_in_process_after_process() {
    hop(3, 48);
}

/// Most of it is never there: what the guest has not touched is a hole in its memory file, and in the image.
#[test]
fn a_guest_with_memory_above_the_hole_under_4_gib_goes_on_in_process_after_process() {
    let found = hop(2, 3 * 1024 + 512);
    assert_eq!(found.pages.len(), 2);
    assert!(found.pages.iter().all(|pages| *pages > 0), "{found:?}");
}
