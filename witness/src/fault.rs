//! Named places where a test can kill or stop this process.
//!
//! `ROMULUS_FAULT=NAME:ACTION`, read once, arms one of them for its first pass; actions are `sigkill` and `sigstop`.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Signal, getpid, kill_process};

/// Every point, in the order in which a granted request passes them.
pub(crate) const POINTS: [&str; 7] = [
    "store.before_write",
    "store.half_written",
    "store.written",
    "store.synced",
    "store.renamed",
    "store.durable",
    "reply.sent",
];

/// The environment variable that arms a point.
const VARIABLE: &str = "ROMULUS_FAULT";

fn parse(setting: &str) -> Option<(&'static str, Signal)> {
    let (name, action) = setting.split_once(':')?;
    let signal = match action {
        "sigkill" => Signal::KILL,
        "sigstop" => Signal::STOP,
        _ => return None,
    };
    POINTS
        .into_iter()
        .find(|point| *point == name)
        .map(|point| (point, signal))
}

/// Passes the point `name`; a test may have armed it.
///
/// # Panics
/// When the variable is set and names no point and action: a misspelt one would make a kill test pass without a kill.
pub(crate) fn point(name: &'static str) {
    static STRUCK: AtomicBool = AtomicBool::new(false);
    static ARMED: OnceLock<Option<(&'static str, Signal)>> = OnceLock::new();
    debug_assert!(POINTS.contains(&name), "fault point {name} is not listed");
    let armed = ARMED.get_or_init(|| {
        let setting = std::env::var(VARIABLE).ok()?;
        Some(parse(&setting).unwrap_or_else(|| panic!("{VARIABLE}={setting} is not POINT:sigkill|sigstop")))
    });
    if let Some((wanted, signal)) = armed
        && *wanted == name
        // One that was stopped and goes on is not to be stopped again.
        && !STRUCK.swap(true, Ordering::Relaxed)
    {
        // As every daemon says it, so that no test takes another death for this one.
        eprintln!("fault: struck at {name}@1");
        // Sending a signal to oneself does not fail.
        let _ = kill_process(getpid(), *signal);
    }
}
