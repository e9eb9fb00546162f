//! `romulus`: the operator's command. It talks to the daemons through their admin sockets and makes certificates.
#![forbid(unsafe_code)]

mod admin;
mod args;
mod daemons;
mod doctor;
mod exit;
mod generate;
mod may_run;
mod pki;
mod protect;
mod render;
mod top;
mod validate;

use std::process::ExitCode;

use clap::Parser;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(args::Args::parse().command).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("romulus: {error:#}");
            let unreachable = error.downcast_ref::<daemons::Unreachable>().is_some();
            ExitCode::from(if unreachable {
                exit::UNREACHABLE
            } else {
                exit::FAILED
            })
        }
    }
}

async fn run(command: args::Command) -> anyhow::Result<u8> {
    match command {
        args::Command::Status(options) => admin::status(options).await,
        args::Command::Top(options) => top::run(options).await,
        args::Command::Events(options) => admin::events(options).await,
        args::Command::Protect(options) => protect::protect(options).await,
        args::Command::Wait(options) => protect::wait(options).await,
        args::Command::Unprotect(options) => admin::order(options, "unprotect", &["primary"], &[]).await,
        args::Command::Failover(options) => admin::failover(options).await,
        args::Command::Forget(options) => admin::forget(options).await,
        args::Command::MayRun(options) => may_run::run(options).await,
        args::Command::Doctor(options) => doctor::run(options).await,
        args::Command::Validate(options) => validate::run(&options),
        args::Command::Pki(command) => pki::run(command).await,
        args::Command::Completions { shell } => generate::completions(shell),
        args::Command::Man { dir } => generate::man_pages(&dir),
    }
}
