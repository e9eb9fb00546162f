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
mod link;
mod metrics;
mod pause_parts;
mod protect;
mod session_cell;
mod status;
mod witness_task;

use std::process::ExitCode;

use clap::Parser;
use romulus_hypervisor::qemu::source::guardian;

use crate::args::{Args, Command};

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Protect(options) => protect::run(&options),
        Command::Guardian { rest } => guardian::run(&rest).map_err(anyhow::Error::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(event = "ended", error = format!("{error:#}"));
            eprintln!("replicator: {error:#}");
            ExitCode::FAILURE
        }
    }
}
