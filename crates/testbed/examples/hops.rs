//! `hops [--hops N] [--vcpus N]`: moves a machine with network, disk, timers and self-checks from process to process, N times
//! (1,000 by default), as `tests/hops.rs` does a few times. Needs root, for a network of its own, and `testbed` built beside it:
//!
//! ```sh
//! cargo build --release -p romulus-testbed --bin testbed --example hops
//! target/release/examples/hops --hops 10000 --vcpus 2
//! ```

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::PathBuf;

use clap::Parser;

#[derive(Parser)]
struct Options {
    /// How many times the machine goes into another process.
    #[arg(long, default_value_t = 1000)]
    hops: usize,
    /// vCPUs, 1 to 4.
    #[arg(long, default_value = "1")]
    vcpus: String,
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
    common::tour::hop_around(&testbed, &options.vcpus, options.hops, |hop| {
        if hop.is_multiple_of(100) {
            println!("{hop} hops");
        }
    });
    println!(
        "{} hops with {} vCPUs: the self-check holds, the connection lives",
        options.hops, options.vcpus
    );
}
