//! `witness`: keeps the record of who may let a VM speak, and changes it by compare-and-set.
//!
//! ```text
//!   QUIC, certificates ─► server: who asks? ─► desk: one at a time ─► romulus_protocol::Witness
//!                                                        │ record
//!                                                        ▼
//!                                              store: durable, then the answer
//! ```
#![forbid(unsafe_code)]

mod admin;
mod args;
mod desk;
mod fault;
mod file;
mod run;
mod server;
mod store;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use romulus_telemetry::AdminClient;
use serde_json::json;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    match carry_out(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("witness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(options) => run::run(&options),
        Command::Init { place, renew } => {
            let dir = place.settings()?.dir;
            let instance = if renew {
                store::renew(&dir)?
            } else {
                store::init(&dir)?
            };
            println!("{}: instance {instance}", dir.display());
            Ok(())
        }
        Command::Show { place, json } => {
            let (instance, records) = store::read(&place.settings()?.dir)?;
            if json {
                println!(
                    "{}",
                    serde_json::to_string_pretty(&admin::view(instance, &records))?
                );
                return Ok(());
            }
            println!("instance {instance}, {} VMs", records.len());
            for (vm, record) in records {
                let note = if record.instance == instance {
                    ""
                } else {
                    "  (of another instance: register again)"
                };
                println!("{vm}: term {}, {:?}{note}", record.term, record.mode);
            }
            Ok(())
        }
        Command::Forget {
            place,
            vm,
            admin: None,
        } => Ok(store::forget(&place.settings()?.dir, &vm)?),
        Command::Forget {
            vm,
            admin: Some(socket),
            ..
        } => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let path = format!("/v1/forget?vm={vm}");
            let answer = runtime.block_on(AdminClient::new(&socket).post(&path, &json!({})))?;
            match answer["error"].as_str() {
                Some(error) => anyhow::bail!("{error}"),
                None => Ok(()),
            }
        }
        Command::Validate { config } => {
            let settings = romulus_config::load::<romulus_config::Witness>(config.as_deref());
            settings.map(drop).context("the settings are not good")
        }
    }
}
