//! Named places where a test can kill, stop or end this process.
//!
//! The points are always compiled in and cost one atomic load. `ROMULUS_FAULT=NAME:ACTION`, read once, arms one of
//! them; actions are `sigkill`, `sigstop` and `exit`.

use std::process;
use std::sync::OnceLock;

use rustix::process::{Signal, getpid, kill_process};

/// Every point there is, in the order in which an attachment passes them.
pub const POINTS: &[&str] = &[
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
    "arm.before_command",
    "arm.after_command",
    "arm.holding",
    "arm.draining",
    "arm.after_drain",
    "arm.after_resume",
    "precopy.before_command",
    "precopy.after_command",
    "precopy.holding",
    "precopy.draining",
    "precopy.after_drain",
    "precopy.after_resume",
    "capture.stopped",
    "capture.before_command",
    "capture.after_command",
    "capture.holding",
    "capture.after_barrier",
    "capture.after_harvest",
    "capture.after_copy",
    "capture.draining",
    "capture.after_drain",
    "capture.after_resume",
    "detach.begin",
    "detach.unregistered",
    "standby.before_stream",
    "standby.in_stream",
    "standby.after_stream",
    "standby.loaded",
    "standby.verified",
    "standby.running",
];

/// The environment variable that arms a point.
pub const VARIABLE: &str = "ROMULUS_FAULT";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Exit,
}

fn parse(setting: &str) -> Option<(&str, Action)> {
    let (name, action) = setting.split_once(':')?;
    let action = match action {
        "sigkill" => Action::Kill,
        "sigstop" => Action::Stop,
        "exit" => Action::Exit,
        _ => return None,
    };
    POINTS.contains(&name).then_some((name, action))
}

fn armed() -> Option<&'static (String, Action)> {
    static ARMED: OnceLock<Option<(String, Action)>> = OnceLock::new();
    ARMED
        .get_or_init(|| {
            let setting = std::env::var(VARIABLE).ok()?;
            // A misspelt point would make a kill test pass without a kill.
            let (name, action) = parse(&setting).unwrap_or_else(|| {
                panic!("{VARIABLE}={setting} is not POINT:sigkill|sigstop|exit of a known point")
            });
            Some((name.to_owned(), action))
        })
        .as_ref()
}

/// Passes the point `name`; does not return when a test has armed it to kill or end this process.
///
/// # Panics
/// When `ROMULUS_FAULT` is set and malformed, or, in debug builds, when `name` is not in [`POINTS`].
pub fn point(name: &str) {
    debug_assert!(POINTS.contains(&name), "fault point {name} is not listed");
    let Some((wanted, action)) = armed() else { return };
    if wanted != name {
        return;
    }
    match action {
        Action::Kill => drop(kill_process(getpid(), Signal::KILL)),
        Action::Stop => drop(kill_process(getpid(), Signal::STOP)),
        Action::Exit => process::exit(86),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_points_and_actions_can_be_armed() {
        assert_eq!(
            parse("bootstrap.in_ram:sigkill"),
            Some(("bootstrap.in_ram", Action::Kill))
        );
        assert_eq!(parse("bootstrap.in_ram:explode"), None);
        assert_eq!(parse("nowhere:exit"), None);
        assert_eq!(parse("bootstrap.in_ram"), None);
    }

    #[test]
    fn an_unarmed_point_does_nothing() {
        point("bootstrap.in_ram");
    }
}
