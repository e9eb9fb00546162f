//! A machine goes from process to process, and neither the guest nor its clients notice anything but time.

mod common;

use std::path::Path;

use common::tour::hop_around;

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");
/// Few, as a test; `cargo run --release -p romulus-testbed --example hops` makes as many as one likes.
const HOPS: usize = 6;

#[test]
fn a_guest_of_one_vcpu_goes_on_in_process_after_process() {
    hop_around(Path::new(TESTBED), "1", HOPS, |_| ());
}

#[test]
fn a_guest_of_two_vcpus_goes_on_in_process_after_process() {
    hop_around(Path::new(TESTBED), "2", HOPS, |_| ());
}
