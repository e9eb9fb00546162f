//! The most VMs that hold.

use super::tally::Outcome;

/// What was found.
#[derive(Debug, PartialEq)]
pub(super) struct Most {
    /// The most VMs that held, 0 when not even one did.
    pub(super) vms: u64,
    /// What is in the way of one more, or of none.
    pub(super) limit: String,
}

/// Doubles the VMs until they do not hold, then halves the way between: `simulate` is asked about so many VMs, at most `vms_max`.
/// It takes for granted that fewer VMs hold where more do.
pub(super) fn most(vms_max: u64, simulate: impl Fn(u64) -> Outcome) -> Most {
    let (mut holds, mut next) = (0, 1);
    let mut breaks = loop {
        let outcome = simulate(next);
        if !outcome.holds() {
            break (next, outcome);
        }
        holds = next;
        if next == vms_max {
            return Most {
                vms: vms_max,
                limit: format!("more were not tried; {}", outcome.limit()),
            };
        }
        next = (next * 2).min(vms_max);
    };
    while breaks.0 - holds > 1 {
        let middle = u64::midpoint(holds, breaks.0);
        let outcome = simulate(middle);
        if outcome.holds() {
            holds = middle;
        } else {
            breaks = (middle, outcome);
        }
    }
    Most {
        vms: holds,
        limit: format!("{} more: {}", breaks.0 - holds, breaks.1.limit()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape::Shape;
    use super::super::simulation::simulate;
    use super::super::tally::Place;
    use super::super::tests::{costs, shape};
    use super::*;

    fn outcome(holds: bool) -> Outcome {
        Outcome {
            epochs: 1,
            on_time: if holds { 1.0 } else { 0.0 },
            lags_ns: Vec::new(),
            acks_ns: Vec::new(),
            pages: 1,
            watched_ns: 1,
            used: vec![(Place::BackupLink, 0.97)],
            agent_ns: 0,
            connections_ns: 0,
            staged_pages_max: 0,
            given_up: 0,
        }
    }

    #[test]
    fn the_last_number_that_holds_is_found_wherever_it_is() {
        for last in [0, 1, 2, 3, 63, 64, 65, 100] {
            let most = most(100, |vms| outcome(vms <= last));
            assert_eq!(most.vms, last);
            assert!(most.limit.contains("the backup's link"), "{most:?}");
            assert_eq!(most.limit.contains("not tried"), last == 100);
        }
    }

    #[test]
    fn a_link_that_is_small_saturates_near_what_it_carries() {
        let of = |vms| {
            let shape = Shape {
                link_gbit: 1.0,
                ..shape(vms)
            };
            simulate(&shape, &costs())
        };
        let most = most(256, of);
        // 500 pages of 216 bytes and 10,000 bytes, with the headers of packets: 1.024 ms of 25.
        assert!((20..=24).contains(&most.vms), "{most:?}");
        assert!(most.limit.contains("link"), "{most:?}");
    }
}
