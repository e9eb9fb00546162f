//! `replicator`: attaches to a running guest and protects it.
#![forbid(unsafe_code)]

mod admin;
mod args;
mod buffers;
mod capture;
mod driver;
mod encode;
mod events;
mod gate_watch;
mod gates;
mod idle;
mod link;
mod metrics;
mod pause_parts;
mod protect;
mod session_cell;
mod status;
mod tries;
mod tuner;
mod witness_task;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use romulus_daemon::{BadSettings, exit_code};
use romulus_hypervisor::qemu::source::guardian;

use crate::args::{Args, Command};
use crate::driver::Fenced;

/// Another host speaks for the VM, so it must not run here: as `romulus may-run` says it.
const EXIT_FENCED: u8 = 5;

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Validate { vm, config } => args::read_settings(vm.as_ref(), config.as_deref())
            .map(drop)
            .context(BadSettings),
        Command::Protect(options) => protect::run(&options),
        Command::Guardian { rest } => guardian::run(&rest).map_err(anyhow::Error::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(event = "ended", error = format!("{error:#}"));
            eprintln!("replicator: {error:#}");
            if error.is::<Fenced>() {
                ExitCode::from(EXIT_FENCED)
            } else {
                exit_code(&error)
            }
        }
    }
}
