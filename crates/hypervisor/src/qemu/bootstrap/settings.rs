//! QEMU's migration settings, set for the bootstrap and put back afterwards, and freeing a guest that a bootstrap holds.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{BootstrapError, text};
use crate::fault;
use crate::qemu::qmp::{Monitor, QmpError};

/// How long QEMU may take to let the guest go.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a migration whose reader is gone may take to notice, before it is cancelled.
const NOTICE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_micros(500);
/// Unlimited: the stream goes to a socket of this host.
const BANDWIDTH_MAX: u64 = 1 << 40;

const COLO: &str = "x-colo";
const IGNORE_SHARED: &str = "x-ignore-shared";

/// The migration settings that a bootstrap changes, as they were before. A guardian keeps them for [`rescue`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationSettings {
    capabilities: Vec<(String, bool)>,
    max_bandwidth: u64,
    downtime_limit_ms: u64,
    tls_creds: String,
}

impl MigrationSettings {
    /// Reads them.
    ///
    /// # Errors
    /// [`QmpError`] when QEMU does not answer as known.
    pub fn read(monitor: &mut dyn Monitor) -> Result<Self, QmpError> {
        let capabilities = read_capabilities(monitor)?;
        let command = "query-migrate-parameters";
        let parameters = monitor.execute(command, Value::Null)?;
        let number = |key: &'static str| {
            let number = parameters.get(key).and_then(Value::as_u64);
            number.ok_or(QmpError::Reply {
                command: command.to_owned(),
                what: key,
            })
        };
        Ok(Self {
            capabilities,
            max_bandwidth: number("max-bandwidth")?,
            downtime_limit_ms: number("downtime-limit")?,
            tls_creds: parameters
                .get("tls-creds")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
        })
    }

    /// Sets what a bootstrap needs: COLO, no other capability that changes the stream, and no TLS.
    pub(super) fn prepare(
        &self,
        monitor: &mut dyn Monitor,
        shared_ram: bool,
        downtime_limit_ms: u64,
    ) -> Result<(), QmpError> {
        let wanted = |name: &str| name == COLO || (name == IGNORE_SHARED && shared_ram);
        let target = self
            .capabilities
            .iter()
            .map(|(name, _)| (name.clone(), wanted(name)));
        set_capabilities(monitor, &self.capabilities, target)?;
        let mut parameters =
            json!({ "max-bandwidth": BANDWIDTH_MAX, "downtime-limit": downtime_limit_ms.max(1) });
        if !self.tls_creds.is_empty() {
            parameters["tls-creds"] = json!("");
        }
        monitor.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Puts everything back. The capability x-colo comes last: it tells [`rescue`] that there is something to put back.
    ///
    /// # Errors
    /// [`QmpError`] when QEMU refuses.
    pub fn restore(&self, monitor: &mut dyn Monitor) -> Result<(), QmpError> {
        let mut parameters =
            json!({ "max-bandwidth": self.max_bandwidth, "downtime-limit": self.downtime_limit_ms });
        if !self.tls_creds.is_empty() {
            parameters["tls-creds"] = json!(self.tls_creds);
        }
        monitor.execute("migrate-set-parameters", parameters)?;
        fault::point("bootstrap.in_restore");
        let now = read_capabilities(monitor)?;
        set_capabilities(monitor, &now, self.capabilities.iter().cloned())
    }
}

fn read_capabilities(monitor: &mut dyn Monitor) -> Result<Vec<(String, bool)>, QmpError> {
    let command = "query-migrate-capabilities";
    let reply = monitor.execute(command, Value::Null)?;
    let list = reply.as_array().ok_or(QmpError::Reply {
        command: command.to_owned(),
        what: "a list",
    })?;
    let capability = |entry: &Value| {
        let state = entry.get("state").and_then(Value::as_bool);
        let state = state.ok_or(QmpError::Reply {
            command: command.to_owned(),
            what: "state",
        })?;
        Ok((text(entry, "capability", command)?, state))
    };
    list.iter().map(capability).collect()
}

/// Sets those of `target` that differ from `now`, in one command: QEMU checks combinations.
fn set_capabilities(
    monitor: &mut dyn Monitor,
    now: &[(String, bool)],
    target: impl Iterator<Item = (String, bool)>,
) -> Result<(), QmpError> {
    let changes: Vec<Value> = target
        .filter(|change| {
            now.iter()
                .any(|(name, state)| *name == change.0 && *state != change.1)
        })
        .map(|(name, state)| json!({ "capability": name, "state": state }))
        .collect();
    if !changes.is_empty() {
        monitor.execute("migrate-set-capabilities", json!({ "capabilities": changes }))?;
    }
    Ok(())
}

pub(super) fn run_state(monitor: &mut dyn Monitor) -> Result<String, QmpError> {
    let reply = monitor.execute("query-status", Value::Null)?;
    text(&reply, "status", "query-status")
}

/// The state of the last migration, or `None` when there never was one.
pub(super) fn migration_state(monitor: &mut dyn Monitor) -> Result<Option<String>, QmpError> {
    let reply = monitor.execute("query-migrate", Value::Null)?;
    Ok(reply
        .get("status")
        .and_then(Value::as_str)
        .filter(|s| *s != "none")
        .map(str::to_owned))
}

pub(super) fn migration_error(monitor: &mut dyn Monitor) -> Result<String, QmpError> {
    let reply = monitor.execute("query-migrate", Value::Null)?;
    let words = reply
        .get("error-desc")
        .or_else(|| reply.get("status"))
        .and_then(Value::as_str);
    Ok(words.unwrap_or("no reason given").to_owned())
}

pub(super) fn is_over(state: &str) -> bool {
    matches!(state, "completed" | "failed" | "cancelled")
}

/// Ends our migration, whatever state it is in, and waits until the guest runs.
pub(super) fn release(monitor: &mut dyn Monitor) -> Result<(), BootstrapError> {
    let begun = Instant::now();
    let mut cancelled = false;
    while let Some(state) = migration_state(monitor)? {
        if is_over(&state) {
            break;
        }
        if begun.elapsed() > RELEASE_TIMEOUT {
            return Err(BootstrapError::NotFreed(format!(
                "held by a migration that is {state}"
            )));
        }
        if state == "colo" {
            // Refused only when the state has changed since we asked.
            tolerate_refusal(monitor.execute("x-colo-lost-heartbeat", Value::Null))?;
        } else if !cancelled && begun.elapsed() > NOTICE {
            tolerate_refusal(monitor.execute("migrate_cancel", Value::Null))?;
            cancelled = true;
        }
        std::thread::sleep(POLL);
    }
    wait_until_runs(monitor)
}

fn wait_until_runs(monitor: &mut dyn Monitor) -> Result<(), BootstrapError> {
    let begun = Instant::now();
    loop {
        let state = run_state(monitor)?;
        match state.as_str() {
            // QEMU's migration thread lets the guest go a little after it has ended the migration.
            "finish-migrate" | "postmigrate" | "colo" => {
                if begun.elapsed() > RELEASE_TIMEOUT {
                    return Err(BootstrapError::NotFreed(state));
                }
                if begun.elapsed() > NOTICE {
                    tolerate_refusal(monitor.execute("cont", Value::Null))?;
                }
                std::thread::sleep(POLL);
            }
            // Running; or paused, crashed, powered off by somebody else meanwhile, which is theirs to say.
            _ => return Ok(()),
        }
    }
}

fn tolerate_refusal(reply: Result<Value, QmpError>) -> Result<(), QmpError> {
    match reply {
        Err(error) if !error.is_refusal() => Err(error),
        _ => Ok(()),
    }
}

/// What [`rescue`] found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescued {
    /// Nothing held the guest and the settings were as they should be.
    Nothing,
    /// Only settings were left behind; they are put back.
    Settings,
    /// A bootstrap held the guest or was under way; it is ended and the guest goes on.
    Guest,
}

/// Ends what a bootstrap left behind whose process died: lets the guest go on and puts the settings back, to `settings`
/// where they are known, otherwise to QEMU's default of no COLO.
///
/// Without the capability x-colo nothing is touched: such a migration is somebody else's.
///
/// # Errors
/// [`BootstrapError`] when QEMU does not answer or the guest does not go on.
pub fn rescue(
    monitor: &mut dyn Monitor,
    settings: Option<&MigrationSettings>,
) -> Result<Rescued, BootstrapError> {
    let capabilities = read_capabilities(monitor)?;
    if !capabilities.iter().any(|(name, state)| name == COLO && *state) {
        return Ok(Rescued::Nothing);
    }
    let held = migration_state(monitor)?.is_some_and(|state| !is_over(&state));
    release(monitor)?;
    match settings {
        Some(settings) => settings.restore(monitor)?,
        None => {
            let off = [COLO, IGNORE_SHARED].map(|name| (name.to_owned(), false));
            set_capabilities(monitor, &capabilities, off.into_iter())?;
        }
    }
    Ok(if held { Rescued::Guest } else { Rescued::Settings })
}
