//! The protocol's notices as named events, the same in both daemons' logs and event lists.

use romulus_protocol::{Mode, Notice};
use serde_json::{Value, json};

/// The event's name and its details.
pub fn notice_event(notice: &Notice) -> (&'static str, Value) {
    match notice {
        Notice::Protection(protection) => {
            let (state, reason) = protection.words();
            ("protection", json!({"state": state, "reason": reason}))
        }
        Notice::Paired(term, epoch) => ("paired", json!({"term": term.0, "epoch": epoch.0})),
        Notice::Suspicion { silent_ns } => ("suspicion", json!({"silent_ns": silent_ns})),
        Notice::Grant(term, mode) => ("grant", json!({"term": term.0, "mode": mode_json(mode)})),
        Notice::Refusal(term, mode) => ("refusal", json!({"term": term.0, "mode": mode_json(mode)})),
        Notice::WitnessSilent(tries) => ("witness_silent", json!({"tries": tries})),
        Notice::StaleAnswer { age_ns } => ("stale_answer", json!({"age_ns": age_ns})),
        Notice::HeldTooLong { held_ns } => ("held_too_long", json!({"held_ns": held_ns})),
        Notice::OrderRefused(protection) => {
            let (state, reason) = protection.words();
            ("order_refused", json!({"state": state, "reason": reason}))
        }
        Notice::HandOverFailed => ("hand_over_failed", json!({})),
        Notice::BadPeer(what) => ("bad_peer", json!({"what": what})),
        Notice::ActivationFailed => ("activation_failed", json!({})),
    }
}

/// A record's mode. The session is text: JSON has no numbers of 128 bits.
pub fn mode_json(mode: &Mode) -> Value {
    match mode {
        Mode::Alone { host } => json!({"alone": {"host": host}}),
        Mode::Paired {
            primary,
            backup,
            session,
            first_epoch,
        } => json!({"paired": {
            "primary": primary, "backup": backup, "session": session.to_string(), "first_epoch": first_epoch.0,
        }}),
        Mode::Ended => json!("ended"),
    }
}

#[cfg(test)]
mod tests {
    use romulus_types::{Epoch, HostId, Session, Term};

    use super::*;

    #[test]
    fn a_session_of_128_bits_has_a_place_in_json() {
        let host = |name| HostId::new(name).unwrap();
        let (primary, backup, session) = (host("p"), host("b"), Session(u128::MAX));
        let mode = Mode::Paired {
            primary,
            backup,
            session,
            first_epoch: Epoch(3),
        };
        let (name, detail) = notice_event(&Notice::Grant(Term(2), mode));
        assert_eq!(name, "grant");
        assert_eq!(detail["mode"]["paired"]["session"], "f".repeat(32));
    }
}
