//! What the status counts.

use super::*;
use std::time::Duration;

#[test]
fn the_time_from_the_last_byte_to_the_acknowledgement_is_that_of_each_commit_and_of_this_session_only() {
    let status = VmStatus::new(VmId::new("vm").expect("a name"), "backup");
    let (at, ms) = (Instant::now(), Duration::from_millis);
    status.commit_received(Epoch(1), at);
    status.commit_received(Epoch(2), at + ms(1));
    status.commit_received(Epoch(3), at + ms(2));
    // One answer acknowledges both.
    status.commit_acked(Epoch(2), at + ms(5));
    let recent = &status.json()["receive_to_ack_recent_us"];
    assert_eq!((&recent["count"], &recent["max"]), (&json!(2), &json!(5000)));
    // The third was never acknowledged, and the next session's third is another one.
    status.session_begins();
    status.commit_received(Epoch(1), at + ms(100));
    status.commit_acked(Epoch(1), at + ms(101));
    let recent = &status.json()["receive_to_ack_recent_us"];
    assert_eq!((&recent["count"], &recent["max"]), (&json!(3), &json!(5000)));
    assert_eq!(recent["p50"], 4000);
}

#[test]
fn a_checkpoint_that_is_refused_counts_once_and_a_bad_message_as_well() {
    let status = VmStatus::new(VmId::new("vm").expect("a name"), "backup");
    let (bad, worse) = (Session(1), Session(2));
    let refused = || status.json()["refused_input"].clone();
    status.set_progress(Term(1), Some(bad), Epoch::NONE);
    status.refuse_session(bad, "a page twice".into());
    let _ = status.notice(&Notice::BadPeer("a checkpoint was not what it should be"));
    assert_eq!(refused(), 1);
    status.set_progress(Term(1), Some(worse), Epoch::NONE);
    let _ = status.notice(&Notice::BadPeer("it paired what is not committed"));
    assert_eq!(refused(), 2);
}

#[test]
fn what_is_kept_of_acknowledgements_is_bounded() {
    let status = VmStatus::new(VmId::new("vm").expect("a name"), "backup");
    let at = Instant::now();
    for epoch in 1..=3000 {
        status.commit_received(Epoch(epoch), at);
    }
    assert_eq!(status.lock().unacked.len(), UNACKED_MAX);
    for epoch in 3001..=6000 {
        status.commit_received(Epoch(epoch), at);
        status.commit_acked(Epoch(epoch), at);
    }
    assert_eq!(status.json()["receive_to_ack_recent_us"]["count"], RECENT_ACKS);
}
