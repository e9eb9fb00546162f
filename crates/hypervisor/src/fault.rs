//! Named places where a test can kill, stop or end this process.
//!
//! The points are always compiled in and cost one atomic load. `ROMULUS_FAULT=NAME[@N]:ACTION`, read once, arms one of
//! them, for its N-th pass (the first one when N is left out); actions are `sigkill`, `sigstop`, `exit` and `panic`. With
//! `ROMULUS_FAULT_FROM=FILE` passes are counted from when this file is there: a test makes it in the phase that it aims at. A
//! process that is struck says so on its standard error, so that no test takes another death for this one.
//!
//! The points of the daemons stand here beside the hypervisor's: a process has one list.

use std::io::Write as _;
use std::path::PathBuf;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};

/// Every point of a replicator, in the order in which it first passes them.
pub const REPLICATOR_POINTS: &[&str] = &[
    "attach.locked",
    "attach.guarded",
    "bootstrap.before_migrate",
    "bootstrap.after_migrate",
    "bootstrap.in_ram",
    "bootstrap.before_release",
    "bootstrap.before_restore",
    "bootstrap.in_restore",
    "attach.call_stopped",
    "attach.call_registers_set",
    "attach.call_entered",
    "attach.call_returned",
    "attach.call_restored",
    "attach.registered",
    "replicator.before_ask",
    "replicator.answered",
    "replicator.before_remember",
    "replicator.after_remember",
    "replicator.before_open",
    "replicator.after_open",
    "replicator.connect",
    "replicator.after_hello",
    "replicator.connected",
    "replicator.gate_prepared",
    "arm.before_command",
    "arm.after_command",
    "arm.holding",
    "arm.draining",
    "arm.after_drain",
    "arm.after_resume",
    "replicator.first_copy",
    "precopy.before_command",
    "precopy.after_command",
    "precopy.holding",
    "precopy.draining",
    "precopy.after_drain",
    "precopy.after_resume",
    "replicator.first_copy_sent",
    "capture.before_command",
    "capture.after_command",
    "capture.holding",
    "capture.after_barrier",
    "capture.after_harvest",
    "capture.after_copy",
    "capture.draining",
    "capture.after_drain",
    "capture.after_resume",
    "replicator.captured",
    "replicator.encoded",
    "replicator.commit_queued",
    "replicator.sent",
    "replicator.before_close",
    "replicator.after_close",
    "replicator.before_release",
    "replicator.after_release",
    "capture.stopped",
    "detach.begin",
    "detach.unregistered",
];

/// Every point of a backup's agent. It passes those of `standby.` in each trial, and most of them again in an activation.
pub const AGENT_POINTS: &[&str] = &[
    "agent.hello",
    "agent.before_unusable",
    "agent.after_unusable",
    "agent.before_remember",
    "agent.after_remember",
    "agent.accepted",
    "agent.image_made",
    "agent.first_copy",
    "agent.staged",
    "agent.before_commit",
    "agent.after_commit",
    "agent.before_ack",
    "agent.after_ack",
    "agent.before_apply",
    "agent.in_apply",
    "agent.after_apply",
    "standby.started",
    "standby.before_stream",
    "standby.in_stream",
    "standby.after_stream",
    "standby.loaded",
    "agent.proven",
    "agent.waiting",
    "agent.before_ask",
    "agent.answered",
    "agent.joined",
    "agent.before_consumed",
    "agent.after_consumed",
    "standby.verified",
    "standby.running",
    "agent.activated",
];

fn is_listed(name: &str) -> bool {
    REPLICATOR_POINTS.contains(&name) || AGENT_POINTS.contains(&name)
}

/// The environment variable that arms a point.
pub const VARIABLE: &str = "ROMULUS_FAULT";

/// The environment variable that names the file from whose appearance on passes are counted.
pub const FROM_VARIABLE: &str = "ROMULUS_FAULT_FROM";

/// What a process that is struck says; `NAME@N` follows.
pub const STRUCK: &str = "fault: struck at ";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Exit,
    Panic,
}

#[derive(Debug, PartialEq, Eq)]
struct Armed {
    name: String,
    /// The pass that is struck, from 1.
    pass: u64,
    action: Action,
    /// Passes are counted once this is there.
    from: Option<PathBuf>,
}

fn parse(setting: &str) -> Option<Armed> {
    let (place, action) = setting.split_once(':')?;
    let action = match action {
        "sigkill" => Action::Kill,
        "sigstop" => Action::Stop,
        "exit" => Action::Exit,
        "panic" => Action::Panic,
        _ => return None,
    };
    let (name, pass) = match place.split_once('@') {
        Some((name, pass)) => (name, pass.parse().ok().filter(|pass| *pass > 0)?),
        None => (place, 1),
    };
    is_listed(name).then(|| Armed {
        name: name.to_owned(),
        pass,
        action,
        from: None,
    })
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    ARMED
        .get_or_init(|| {
            let setting = std::env::var(VARIABLE).ok()?;
            // A misspelt point would make a kill test pass without a kill.
            let armed = parse(&setting).unwrap_or_else(|| {
                panic!("{VARIABLE}={setting} is not POINT[@N]:sigkill|sigstop|exit|panic of a known point")
            });
            Some(Armed {
                from: std::env::var_os(FROM_VARIABLE).map(PathBuf::from),
                ..armed
            })
        })
        .as_ref()
}

/// Whether a test has armed the point `name`: for a point that costs something to have.
pub fn is_armed(name: &str) -> bool {
    armed().is_some_and(|armed| armed.name == name)
}

/// Passes the point `name`; does not return when a test has armed it to kill or end this process.
///
/// # Panics
/// When a test has armed it for that, when `ROMULUS_FAULT` is set and malformed, or, in debug builds, when `name` is not in a list.
pub fn point(name: &str) {
    static PASSES: AtomicU64 = AtomicU64::new(0);
    debug_assert!(is_listed(name), "fault point {name} is not listed");
    let Some(armed) = armed().filter(|armed| armed.name == name) else {
        return;
    };
    if armed.from.as_ref().is_some_and(|file| !file.exists()) {
        return;
    }
    if PASSES.fetch_add(1, Ordering::Relaxed) + 1 != armed.pass {
        return;
    }
    // One write, unbuffered: the process may be gone after it.
    let _ = std::io::stderr().write_all(format!("{STRUCK}{name}@{}\n", armed.pass).as_bytes());
    match armed.action {
        Action::Kill => drop(kill_process(getpid(), Signal::KILL)),
        Action::Stop => drop(kill_process(getpid(), Signal::STOP)),
        Action::Exit => process::exit(86),
        Action::Panic => panic!("{STRUCK}{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_points_and_actions_can_be_armed() {
        let armed = |name: &str, pass, action| {
            Some(Armed {
                name: name.to_owned(),
                pass,
                action,
                from: None,
            })
        };
        assert_eq!(
            parse("bootstrap.in_ram:sigkill"),
            armed("bootstrap.in_ram", 1, Action::Kill)
        );
        assert_eq!(
            parse("agent.after_ack@40:sigstop"),
            armed("agent.after_ack", 40, Action::Stop)
        );
        assert_eq!(
            parse("agent.before_ack:panic"),
            armed("agent.before_ack", 1, Action::Panic)
        );
        for wrong in [
            "bootstrap.in_ram:explode",
            "nowhere:exit",
            "bootstrap.in_ram",
            "agent.after_ack@0:sigkill",
            "agent.after_ack@x:sigkill",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn no_point_is_listed_twice() {
        let all: Vec<&str> = REPLICATOR_POINTS.iter().chain(AGENT_POINTS).copied().collect();
        for (position, point) in all.iter().enumerate() {
            assert!(!all[..position].contains(point), "{point}");
        }
    }

    #[test]
    fn an_unarmed_point_does_nothing() {
        point("bootstrap.in_ram");
    }
}
