//! The protocol's notices as named events, the same in both daemons' logs and event lists.

use romulus_protocol::Notice;
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
        Notice::Grant(term, mode) => ("grant", json!({"term": term.0, "mode": mode})),
        Notice::Refusal(term, mode) => ("refusal", json!({"term": term.0, "mode": mode})),
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
