//! `romulus`: the operator's command. It talks to the daemons through their admin sockets and makes certificates.
#![forbid(unsafe_code)]

mod admin;
mod args;
mod may_run;
mod pki;
mod render;

use std::process::ExitCode;

use clap::Parser;

/// Exit codes are part of the interface.
mod exit {
    /// The command did what it says.
    pub(crate) const OK: u8 = 0;
    /// It failed; the message says why.
    pub(crate) const FAILED: u8 = 1;
    /// `status`: reachable, and not protected.
    pub(crate) const NOT_PROTECTED: u8 = 3;
    /// The daemon could not be reached.
    pub(crate) const UNREACHABLE: u8 = 4;
    /// `may-run`: the record names another host.
    pub(crate) const MUST_NOT_RUN: u8 = 5;
    /// `may-run`: the witness does not answer, or is not to be believed.
    pub(crate) const UNKNOWN: u8 = 6;
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = args::Args::parse();
    let result = match args.command {
        args::Command::Status(options) => admin::status(options).await,
        args::Command::Events(options) => admin::events(options).await,
        args::Command::Unprotect(options) => admin::order(options, "unprotect", &[]).await,
        args::Command::Failover(options) => admin::failover(options).await,
        args::Command::MayRun(options) => may_run::run(options).await,
        args::Command::Pki(command) => pki::run(command).map(|()| exit::OK),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("romulus: {error:#}");
            let unreachable = error.downcast_ref::<admin::Unreachable>().is_some();
            ExitCode::from(if unreachable {
                exit::UNREACHABLE
            } else {
                exit::FAILED
            })
        }
    }
}
