//! The daemons of this host, found by their admin sockets.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use romulus_telemetry::AdminClient;
use romulus_types::VmId;
use serde_json::Value;

use crate::args::AdminOptions;

/// Where daemons make their admin sockets.
pub(crate) const RUN_DIR: &str = "/run/romulus";
/// Where the witness's unit has it make its own: it runs as another user.
const WITNESS_RUN_DIR: &str = "/run/romulus-witness";

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

/// One daemon's answer.
pub(crate) struct Answered {
    /// Its admin socket.
    pub(crate) socket: PathBuf,
    /// What it said, or why not.
    pub(crate) answer: anyhow::Result<Value>,
}

/// Asks a daemon.
pub(crate) async fn get(socket: &Path, path: &str) -> anyhow::Result<Value> {
    let asked = AdminClient::new(socket).get(path).await;
    asked.with_context(|| Unreachable(socket.to_owned()))
}

/// Gives a daemon an order.
pub(crate) async fn post(socket: &Path, path: &str) -> anyhow::Result<Value> {
    let asked = AdminClient::new(socket).post(path, &serde_json::json!({})).await;
    asked.with_context(|| Unreachable(socket.to_owned()))
}

/// Asks the socket that was named, or all.
///
/// # Errors
/// When there is none.
pub(crate) async fn ask_all(options: &AdminOptions, path: &str) -> anyhow::Result<Vec<Answered>> {
    let sockets = match &options.admin {
        Some(socket) => vec![socket.clone()],
        None => [RUN_DIR, WITNESS_RUN_DIR]
            .into_iter()
            .flat_map(|dir| sockets(Path::new(dir)))
            .collect(),
    };
    if sockets.is_empty() {
        return Err(anyhow::anyhow!(
            "no admin socket in {RUN_DIR} or {WITNESS_RUN_DIR}: start a daemon, or name a socket with --admin SOCKET"
        ))
        .context(Unreachable(RUN_DIR.into()));
    }
    let mut all = Vec::new();
    for socket in sockets {
        let answer = get(&socket, path).await;
        all.push(Answered { socket, answer });
    }
    Ok(all)
}

/// The socket of the daemon that can carry out an order for a VM.
///
/// # Errors
/// When that is none or not clear.
pub(crate) async fn for_order(options: &AdminOptions, roles: &[&str]) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &options.admin {
        return Ok(socket.clone());
    }
    let mut fit: Vec<(PathBuf, usize)> = Vec::new();
    let mut seen = Vec::new();
    for Answered { socket, answer } in ask_all(options, "/v1/status").await? {
        let Ok(status) = answer else { continue };
        for vm in vms(&status) {
            seen.push(vm["vm"].as_str().unwrap_or("?").to_owned());
            let rank = roles.iter().position(|role| vm["role"] == *role);
            if let Some(rank) = rank.filter(|_| is_wanted(vm, options.vm())) {
                fit.push((socket.clone(), rank));
            }
        }
    }
    // Both of a pair's daemons may run on this host: the first role is the one that is asked.
    let best = fit.iter().map(|(_, rank)| *rank).min();
    fit.retain(|(_, rank)| Some(*rank) == best);
    match (fit.as_slice(), options.vm()) {
        ([(socket, _)], _) => Ok(socket.clone()),
        ([], Some(vm)) => bail!("no daemon on this host has {vm}; it has: {}", seen.join(", ")),
        ([], None) => bail!("no daemon on this host has a VM for which this can be ordered"),
        _ => bail!("name the VM: this host has {}", seen.join(", ")),
    }
}

/// The VMs in a status answer: one of a replicator, several of an agent, none of a witness.
pub(crate) fn vms(status: &Value) -> Vec<&Value> {
    match (status["vms"].as_array(), status["vm"].is_string()) {
        (Some(vms), _) => vms.iter().collect(),
        (None, true) => vec![status],
        (None, false) => vec![],
    }
}

/// Whether this VM's status is the wanted one's; all are when none was named.
pub(crate) fn is_wanted(vm: &Value, wanted: Option<&VmId>) -> bool {
    wanted.is_none_or(|name| vm["vm"] == name.as_str())
}

fn sockets(dir: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::FileTypeExt as _;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_socket = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_socket());
    let mut found: Vec<PathBuf> = entries
        .filter(is_socket)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "sock"))
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_by_their_kind_and_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.sock", "a.sock", "other"] {
            std::os::unix::net::UnixListener::bind(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("c.sock"), "no socket").unwrap();
        let names = sockets(dir.path());
        assert_eq!(names, [dir.path().join("a.sock"), dir.path().join("b.sock")]);
        assert!(sockets(&dir.path().join("nothing")).is_empty());
    }
}
