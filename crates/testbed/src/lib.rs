//! A small VMM over KVM: what Romulus is demonstrated, tested and measured with.
//!
//! ```text
//!   cli ─► run ─► machine ─► loader (elf)          guest memory: image, tables, boot information
//!            │       ├─────► cpu                   how a vCPU begins
//!            │       ├─────► virtio, wiring        devices; doorbells and interrupts
//!            │       └─────► ports                 exits of the vCPUs: console, end, reset
//!            └─► vmm-attach: runs the vCPUs, stops, saves and restores them, serves sidecars
//! ```
//!
//! `firmware` is a guest for QEMU on KVM, where the kernel of Linux may not run. The VMM's own guest is `guest/`; what both agree on is `romulus_guest_core::abi`. There is no unsafe code: KVM, mappings and
//! signals are behind kvm-ioctls, vm-memory and romulus-host-sys.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod cpu;
mod elf;
pub mod error;
pub mod firmware;
pub mod host;
pub mod loader;
pub mod mac;
pub mod machine;
pub mod ports;
pub mod run;
pub mod virtio;
mod wiring;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};

/// All of the program: parses `args` (the first one is the program's name), runs, says what went wrong on standard
/// error. `RUST_LOG` chooses what is logged there.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // A message that can't be printed has nobody to read it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    // The queues' library logs each mistake of a guest, which could fill a disk; the devices say it once themselves.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,virtio_queue=off"));
    // It fails when a program that uses this as a library has set its own. A guest must not end because nobody reads the log any more:
    // the subscriber would complain about that to a standard error that is gone, and panic.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .try_init();
    let ended = match cli.command {
        Command::Run(options) => run::run(&options),
        Command::Standby(options) => run::standby(options),
    };
    ended.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "testbed: {}", chain(&error));
        ExitCode::FAILURE
    })
}

/// An error with its causes, without saying the same twice.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
