//! The developer's tasks, one entry point for each: `cargo xtask VERB`.
//!
//! Whatever a task needs it installs or builds itself, and says so; what it cannot get it names,
//! together with what to do about it.
#![forbid(unsafe_code)]

mod deb;
mod demo;
mod initramfs;
mod kernel;
mod kills;
mod kvm;
mod packages;
mod programs;
mod setup;
mod sh;
mod soak;
mod systemd_tree;
mod tasks;
mod trial;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer tasks of Romulus", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that are missing and build the test guest (idempotent)
    Setup,
    /// Protect a running guest, kill its host, and watch its clients go on
    Demo(demo::Args),
    /// Strike every named step of every daemon, and kill at random moments; a guest must survive all of it
    Kills(kills::Args),
    /// Keep a pair protected for minutes while the machine is busy; nobody may take over
    Soak(soak::Args),
    /// Run every test: units, simulation and, with the real binaries, end to end
    Test(tasks::TestArgs),
    /// Run the fuzz targets for a while each
    Fuzz(tasks::FuzzArgs),
    /// Make the Debian packages, from release binaries
    Deb(deb::Args),
    /// Check licences, bans and sources of the dependencies
    Deny,
    /// Do what the CI does (.ci/run)
    Ci,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup => setup::run(),
        Task::Demo(args) => demo::run(&args),
        Task::Kills(args) => kills::run(&args),
        Task::Soak(args) => soak::run(&args),
        Task::Test(args) => tasks::test(&args),
        Task::Fuzz(args) => tasks::fuzz(&args),
        Task::Deb(args) => deb::run(&args),
        Task::Deny => tasks::deny(),
        Task::Ci => tasks::ci(),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
