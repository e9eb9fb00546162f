//! From QEMU's events to what they mean for a protected guest.

use crate::qemu::qmp::QmpEvent;
use crate::source::GuestEvent;

/// What one event means, if anything.
pub(super) fn meaning(event: &QmpEvent) -> Option<GuestEvent> {
    match event.name.as_str() {
        "STOP" | "SUSPEND" | "SUSPEND_DISK" => Some(GuestEvent::Paused),
        "RESUME" | "WAKEUP" => Some(GuestEvent::Resumed),
        "RESET" => Some(GuestEvent::Reset),
        "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR" | "MEMORY_DEVICE_SIZE_CHANGE" | "ACPI_DEVICE_OST" => {
            Some(GuestEvent::DevicesChanged)
        }
        // A reset with -no-reboot ends as a shutdown, too; both are on purpose.
        "SHUTDOWN" => Some(
            match event.data.get("reason").and_then(|reason| reason.as_str()) {
                Some("guest-panic" | "host-error") => GuestEvent::Crashed,
                _ => GuestEvent::PoweredOff,
            },
        ),
        "GUEST_PANICKED" | "GUEST_CRASHLOADED" => Some(GuestEvent::Crashed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn event(name: &str, data: Value) -> QmpEvent {
        QmpEvent {
            name: name.into(),
            data,
            seconds: 0,
            microseconds: 0,
        }
    }

    #[test]
    fn a_power_off_is_told_from_a_crash() {
        let shutdown = |reason: &str| meaning(&event("SHUTDOWN", json!({"guest": true, "reason": reason})));
        assert_eq!(shutdown("guest-shutdown"), Some(GuestEvent::PoweredOff));
        assert_eq!(shutdown("host-qmp-quit"), Some(GuestEvent::PoweredOff));
        assert_eq!(shutdown("guest-panic"), Some(GuestEvent::Crashed));
        assert_eq!(meaning(&event("RTC_CHANGE", Value::Null)), None);
        assert_eq!(meaning(&event("STOP", Value::Null)), Some(GuestEvent::Paused));
    }
}
