//! Commands that go to a daemon's admin socket.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use romulus_telemetry::AdminClient;
use serde_json::Value;

use crate::args::{AdminOptions, FailoverOptions};
use crate::{exit, render};

/// Where daemons make their admin sockets.
const RUN_DIR: &str = "/run/romulus";

/// The daemon could not be reached.
#[derive(Debug)]
pub(crate) struct Unreachable(PathBuf);

impl std::fmt::Display for Unreachable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "no daemon answers on {}: is it running, and may you open its socket?",
            self.0.display()
        )
    }
}

impl std::error::Error for Unreachable {}

/// `romulus status`.
pub(crate) async fn status(options: AdminOptions) -> anyhow::Result<u8> {
    let answer = get(&options, "status").await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        print!("{}", render::status(&answer));
    }
    Ok(if render::is_protected(&answer) {
        exit::OK
    } else {
        exit::NOT_PROTECTED
    })
}

/// `romulus events`.
pub(crate) async fn events(options: AdminOptions) -> anyhow::Result<u8> {
    let answer = get(&options, "events").await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        print!("{}", render::events(&answer));
    }
    Ok(exit::OK)
}

/// `romulus failover`.
pub(crate) async fn failover(options: FailoverOptions) -> anyhow::Result<u8> {
    let mut flags = Vec::new();
    if options.force {
        flags.push("force=true");
    }
    if options.fenced {
        flags.push("fenced=true");
    }
    order(options.admin, "failover", &flags).await
}

/// `romulus unprotect` and `romulus failover`.
pub(crate) async fn order(options: AdminOptions, verb: &str, flags: &[&str]) -> anyhow::Result<u8> {
    let socket = socket(&options)?;
    let mut path = route(&options, verb);
    for flag in flags {
        path.push(if path.contains('?') { '&' } else { '?' });
        path.push_str(flag);
    }
    let answer = AdminClient::new(&socket)
        .post(&path, &serde_json::json!({}))
        .await
        .with_context(|| Unreachable(socket.clone()))?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else if let Some(error) = answer["error"].as_str() {
        bail!("{error}");
    } else if answer["done"] == true {
        println!("{verb}: done");
    } else {
        println!(
            "{verb}: {}",
            answer["next"]
                .as_str()
                .unwrap_or("under way; see `romulus status`")
        );
    }
    Ok(if answer["error"].is_null() {
        exit::OK
    } else {
        exit::FAILED
    })
}

async fn get(options: &AdminOptions, what: &str) -> anyhow::Result<Value> {
    let socket = socket(options)?;
    let path = route(options, what);
    AdminClient::new(&socket)
        .get(&path)
        .await
        .with_context(|| Unreachable(socket.clone()))
}

fn route(options: &AdminOptions, what: &str) -> String {
    match &options.vm {
        Some(vm) => format!("/v1/{what}?vm={vm}"),
        None => format!("/v1/{what}"),
    }
}

/// The socket named, or the only one there is.
fn socket(options: &AdminOptions) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &options.admin {
        return Ok(socket.clone());
    }
    let mut found = sockets(Path::new(RUN_DIR));
    match found.len() {
        0 => bail!("no admin socket in {RUN_DIR}: name one with --admin SOCKET"),
        1 => Ok(found.remove(0)),
        _ => {
            let names: Vec<_> = found.iter().map(|p| p.display().to_string()).collect();
            bail!(
                "several daemons run here: name one with --admin SOCKET: {}",
                names.join(", ")
            )
        }
    }
}

fn sockets(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "sock"))
        .collect()
}
