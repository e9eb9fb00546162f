//! Each planted mistake is found, by a checker that knows nothing of it. (`schedules.rs` shows that the code without
//! mistakes passes the same seeds.)
#![forbid(unsafe_code)]

use romulus_sim::{Mistake, Violation, run};

/// All of these seeds are among those that `schedules.rs` runs without a mistake.
const SEEDS: u64 = 4000;

fn found(mistake: Mistake) -> Violation {
    let broken = (0..SEEDS).find_map(|seed| Some((seed, run(seed, Some(mistake), false).violation?)));
    let (seed, violation) = broken.unwrap_or_else(|| panic!("{mistake:?} is not found in {SEEDS} schedules"));
    println!("{mistake:?}: seed {seed}: {violation}");
    violation
}

#[test]
fn a_release_before_the_ack_is_found() {
    let violation = found(Mistake::ReleaseBeforeAck);
    assert!(matches!(
        violation,
        Violation::ReleaseBeforeAck { .. } | Violation::OutputBeforeCommit { .. }
    ));
}

#[test]
fn a_release_by_a_stale_answer_is_found() {
    assert_eq!(
        found(Mistake::ReleaseByStaleAnswer),
        Violation::PrimarySpokeInBackupsTerm
    );
}

#[test]
fn acking_with_a_request_unresolved_is_found() {
    assert_eq!(found(Mistake::AckWhileUnresolved), Violation::AckWhileUnresolved);
}

#[test]
fn a_takeover_without_a_grant_is_found() {
    let violation = found(Mistake::TakeOverWithoutGrant);
    assert!(matches!(
        violation,
        Violation::BackupSpokeUngranted | Violation::OutputLost { .. }
    ));
}

#[test]
fn a_takeover_from_an_older_sessions_image_is_found() {
    let violation = found(Mistake::TakeOverFromOldSession);
    assert!(matches!(
        violation,
        Violation::ActivatedWithoutCommit | Violation::OutputLost { .. }
    ));
}

#[test]
fn pairing_at_a_commit_from_before_the_closed_gate_is_found() {
    let violation = found(Mistake::PairBeforeGateCommit);
    assert!(matches!(
        violation,
        Violation::OutputLost { .. } | Violation::OutputBeforeCommit { .. }
    ));
}

#[test]
fn believing_a_hello_is_found() {
    let violation = found(Mistake::BelieveHello);
    assert!(matches!(violation, Violation::LiarLetIn | Violation::FalseTerm));
}

#[test]
fn starting_another_standby_after_one_had_everything_is_found() {
    let violation = found(Mistake::RetryAfterTheEnd);
    assert!(matches!(
        violation,
        Violation::ActivatedTwice | Violation::ActivatedWithoutCommit
    ));
}

#[test]
fn a_page_left_out_of_a_checkpoint_is_found() {
    assert!(matches!(
        found(Mistake::PageLeftOut),
        Violation::WrongMemory { .. }
    ));
}

#[test]
fn dirty_pages_forgotten_by_an_aborted_capture_are_found() {
    assert!(matches!(
        found(Mistake::DirtyForgotten),
        Violation::WrongMemory { .. }
    ));
}

#[test]
fn a_commit_applied_twice_is_found() {
    let violation = found(Mistake::CommitAppliedTwice);
    assert!(matches!(
        violation,
        Violation::WrongMemory { .. } | Violation::Invalid { .. }
    ));
}

#[test]
fn an_old_list_of_what_the_backup_holds_is_found() {
    assert!(matches!(
        found(Mistake::OldListOfHeldPages),
        Violation::Invalid { .. } | Violation::WrongMemory { .. }
    ));
}
