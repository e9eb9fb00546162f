//! The runs of the model: within each budget nothing is ever broken, and each planted mistake is found.

use stateright::{Checker, HasDiscoveries, Model};

use super::{Budget, Scenario};
use crate::Weakness;

const PLAIN: Budget = Budget {
    sessions: 1,
    captures: 3,
    primary_crashes: 0,
    backup_crashes: 0,
    primary_host_crashes: 0,
    witness_restores: 0,
    unprotects: 0,
    hand_overs: 0,
    guest_changes: 0,
    power_offs: 0,
    guest_losses: 0,
    lies: 0,
    lies_ahead: 0,
    slow_words: false,
};

/// Goes through all states of a budget, and asserts that nothing is broken and everything expected is reached.
fn holds(name: &str, budget: Budget) {
    let checker = Scenario {
        budget,
        weakness: None,
    }
    .checker()
    .threads(2)
    .spawn_dfs()
    .join();
    println!(
        "{name}: {} states, {} deep",
        checker.unique_state_count(),
        checker.max_depth()
    );
    if let Some(path) = checker.discovery("no invariant is broken") {
        panic!(
            "{name}: {}",
            tell(
                &path.into_actions(),
                &Scenario {
                    budget,
                    weakness: None
                }
            )
        );
    }
    checker.assert_properties();
}

/// Asserts that the model finds the planted mistake.
fn finds(weakness: Weakness, budget: Budget) {
    let scenario = Scenario {
        budget,
        weakness: Some(weakness),
    };
    let checker = scenario
        .clone()
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!("{weakness:?}: {} states", checker.unique_state_count());
    let path = checker
        .discovery("no invariant is broken")
        .expect("the planted mistake is found");
    println!("{}", tell(&path.into_actions(), &scenario));
}

/// The steps to a broken invariant, in words.
fn tell(acts: &[super::Act], scenario: &Scenario) -> String {
    let mut world = scenario.init_states().remove(0);
    let mut story = String::new();
    for act in acts {
        story.push_str(&format!("  {act:?}\n"));
        world = scenario
            .next_state(&world, act.clone())
            .expect("the path was found by these steps");
    }
    format!("{}\n{story}", world.violation.unwrap_or("nothing is broken"))
}

#[test]
fn sessions_that_break_and_requests_that_linger_break_nothing() {
    holds(
        "two sessions",
        Budget {
            sessions: 2,
            captures: 6,
            ..PLAIN
        },
    );
}

#[test]
fn crashes_of_both_daemons_break_nothing() {
    let budget = Budget {
        sessions: 2,
        primary_crashes: 1,
        backup_crashes: 1,
        ..PLAIN
    };
    holds(
        "a crash each",
        Budget {
            captures: 4,
            ..budget
        },
    );
    holds(
        "two crashes of the primary",
        Budget {
            primary_crashes: 2,
            backup_crashes: 0,
            ..budget
        },
    );
    holds(
        "two crashes of the backup",
        Budget {
            primary_crashes: 0,
            backup_crashes: 2,
            captures: 4,
            ..budget
        },
    );
}

#[test]
fn the_loss_of_the_primarys_host_breaks_nothing() {
    let budget = Budget {
        sessions: 2,
        captures: 4,
        primary_host_crashes: 1,
        backup_crashes: 1,
        ..PLAIN
    };
    holds("host lost", budget);
}

#[test]
fn orders_in_the_midst_of_crashes_and_partitions_break_nothing() {
    let budget = Budget {
        sessions: 2,
        captures: 4,
        primary_crashes: 1,
        ..PLAIN
    };
    holds(
        "unprotect",
        Budget {
            unprotects: 1,
            ..budget
        },
    );
    holds(
        "hand over",
        Budget {
            hand_overs: 1,
            captures: 5,
            backup_crashes: 1,
            sessions: 1,
            ..budget
        },
    );
    holds(
        "hand over, then unprotect",
        Budget {
            hand_overs: 1,
            unprotects: 1,
            sessions: 1,
            ..budget
        },
    );
}

#[test]
fn a_guest_that_changes_powers_off_or_dies_breaks_nothing() {
    let budget = Budget {
        sessions: 2,
        captures: 4,
        ..PLAIN
    };
    holds(
        "change",
        Budget {
            guest_changes: 1,
            primary_crashes: 1,
            ..budget
        },
    );
    holds(
        "power-off",
        Budget {
            power_offs: 1,
            primary_crashes: 1,
            ..budget
        },
    );
    holds(
        "guest lost",
        Budget {
            guest_losses: 1,
            backup_crashes: 1,
            ..budget
        },
    );
}

#[test]
fn a_witness_restored_from_an_old_copy_grants_nothing_twice() {
    holds(
        "restore",
        Budget {
            witness_restores: 1,
            captures: 4,
            primary_crashes: 1,
            ..PLAIN
        },
    );
}

#[test]
fn a_host_that_lies_about_the_record_breaks_nothing() {
    let budget = Budget {
        lies: 1,
        lies_ahead: 1,
        slow_words: true,
        ..PLAIN
    };
    holds(
        "lies",
        Budget {
            backup_crashes: 1,
            ..budget
        },
    );
    holds(
        "lies to a pair",
        Budget {
            captures: 4,
            ..budget
        },
    );
}

#[test]
fn the_word_of_the_witness_on_a_hello_may_come_at_any_time() {
    let budget = Budget {
        slow_words: true,
        sessions: 2,
        ..PLAIN
    };
    holds(
        "two hellos",
        Budget {
            captures: 4,
            ..budget
        },
    );
    holds(
        "a crash of the backup",
        Budget {
            backup_crashes: 1,
            ..budget
        },
    );
    holds(
        "a crash of the primary",
        Budget {
            primary_crashes: 1,
            ..budget
        },
    );
}

/// Everything that the planted mistakes need.
const ROUGH: Budget = Budget {
    sessions: 2,
    captures: 5,
    primary_crashes: 1,
    backup_crashes: 1,
    ..PLAIN
};

#[test]
fn a_stale_image_after_running_alone_and_resynchronising_is_not_activated() {
    finds(Weakness::TakeOverFromOldSession, ROUGH);
}

#[test]
fn a_grant_that_was_never_consumed_is_consumed_after_a_restart() {
    finds(Weakness::ForgetGrant, ROUGH);
}

#[test]
fn a_grant_whose_reply_was_lost_is_still_a_grant() {
    finds(Weakness::NewNonceForEachTry, ROUGH);
}

#[test]
fn a_request_that_is_granted_after_the_link_healed_is_resolved_first() {
    finds(Weakness::AbandonPairing, ROUGH);
    finds(Weakness::TrustReadRecord, ROUGH);
}

#[test]
fn pairing_never_names_a_commit_that_predates_the_closed_gate() {
    finds(Weakness::PairBeforeGateCommit, ROUGH);
}

#[test]
fn unprotecting_during_a_partition_asks_the_witness() {
    finds(
        Weakness::OpenWithoutAsking,
        Budget {
            unprotects: 1,
            captures: 4,
            ..PLAIN
        },
    );
}

#[test]
fn a_witness_restored_from_an_old_copy_is_not_believed() {
    finds(
        Weakness::TrustAnyWitness,
        Budget {
            witness_restores: 1,
            captures: 4,
            ..PLAIN
        },
    );
}

#[test]
fn an_answer_that_arrives_after_the_takeover_releases_only_what_the_survivor_has() {
    finds(Weakness::AckAfterTakeover, ROUGH);
}

#[test]
fn a_hello_is_not_believed_with_a_commit_in_hand_nor_before() {
    finds(
        Weakness::BelieveHello,
        Budget {
            lies: 1,
            captures: 4,
            ..PLAIN
        },
    );
    finds(
        Weakness::BelieveHello,
        Budget {
            lies_ahead: 1,
            ..PLAIN
        },
    );
}

#[test]
fn the_model_finds_the_plain_mistakes_too() {
    for weakness in [
        Weakness::ReleaseBeforeAck,
        Weakness::AckWhileUnresolved,
        Weakness::TakeOverWithoutGrant,
        Weakness::ActivateTwice,
    ] {
        finds(weakness, ROUGH);
    }
}
