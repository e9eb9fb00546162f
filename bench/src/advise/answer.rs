//! From what was seen of a guest to what each length of its epochs would cost, and to the length that suits a goal.
//!
//! ```text
//!   Observed at some lengths ─┐
//!   Link: the way to a backup ┴─► Profile (crates/epoch) ─┬─► Predicted for each length
//!                                                         └─► Recommended: where the replicator's own steering would settle
//! ```

use std::fmt::Write;

use romulus_epoch::{Goal, Limits, Measured, Prediction, Profile, Reach};
use romulus_types::PAGE_BYTES;
use serde::Serialize;

use super::observe::Observed;
use crate::stats::float;

/// Grows when a field changes its meaning or goes.
pub(crate) const SCHEMA: u32 = 1;
/// What is predicted for, in milliseconds.
pub(crate) const LENGTHS_MS: [f64; 12] = [
    5.0, 10.0, 15.0, 20.0, 25.0, 35.0, 50.0, 75.0, 100.0, 125.0, 150.0, 200.0,
];
const NS_A_MS: f64 = 1e6;
/// Lengths that are less than this apart, as a ratio, are one: what differs is noise.
const SAME: f64 = 1.05;

/// The way to a backup that is not there yet, and the backup.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Link {
    pub(crate) bytes_a_second: f64,
    /// There and back.
    pub(crate) round_trip_ns: f64,
    /// What a commit takes at the replicator and the backup, however small it is.
    pub(crate) commit_ns: f64,
    /// What the backup takes for a page that was sent: to decode, digest and stage it.
    pub(crate) page_ns: f64,
}

/// What epochs of a length would be like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Predicted {
    pub(crate) epoch_ms: f64,
    /// At the median.
    pub(crate) pause_ms: f64,
    pub(crate) dirty_pages: f64,
    pub(crate) megabytes_a_second: f64,
    /// From the end of the pause until the backup's answer.
    pub(crate) commit_ms: f64,
    /// By how much later the guest's output arrives, at the median.
    pub(crate) latency_ms: f64,
    /// Of the guest's time.
    pub(crate) overhead_percent: f64,
    /// False where epochs would stretch.
    pub(crate) keeps_pace: bool,
}

/// What an operator wants, and the length that does it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Recommended {
    pub(crate) goal: String,
    /// False when no length reaches it: this is the best one then.
    pub(crate) reached: bool,
    #[serde(flatten)]
    pub(crate) predicted: Predicted,
}

/// All that `bench advise` says.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Answer {
    pub(crate) schema: u32,
    pub(crate) vm: String,
    pub(crate) hypervisor: String,
    pub(crate) guest_pages: u64,
    pub(crate) host: crate::host::Host,
    pub(crate) versions: crate::host::Versions,
    /// What would keep it from being protected as it is.
    pub(crate) in_the_way: Vec<String>,
    /// What was assumed of the link and the backup, and of the guest's first write to a page in an epoch.
    pub(crate) link: Link,
    pub(crate) fault_ns: f64,
    pub(crate) observed: Vec<Observed>,
    pub(crate) predicted: Vec<Predicted>,
    pub(crate) recommended: Vec<Recommended>,
}

impl Default for Link {
    /// 10 Gbit/s within a room, and a backup that does little else.
    fn default() -> Self {
        Self {
            bytes_a_second: 1.25e9,
            round_trip_ns: 200_000.0,
            commit_ns: 1_000_000.0,
            page_ns: 2_000.0,
        }
    }
}

impl Link {
    /// What an epoch that was observed would cost over this link.
    fn measured(&self, seen: &Observed) -> Measured {
        let encode_ns = seen.encode_us.p50 * 1e3;
        let wire_ns = seen.wire_bytes / self.bytes_a_second * 1e9;
        let backup_ns = seen.dirty_pages.p50 * self.page_ns;
        Measured {
            length_ns: seen.epoch_ms * NS_A_MS,
            pause_ns: seen.pause_us.p50 * 1e3,
            dirty_pages: seen.dirty_pages.p50,
            commit_ns: encode_ns + wire_ns + backup_ns + self.round_trip_ns + self.commit_ns,
            slowest_ns: encode_ns.max(wire_ns).max(backup_ns),
            wire_bytes: seen.wire_bytes,
        }
    }

    /// `None` when what was observed is no measurement, such as of lengths that came out the same.
    pub(crate) fn profile(&self, seen: &[Observed]) -> Option<Profile> {
        let mut points: Vec<Measured> = seen.iter().map(|seen| self.measured(seen)).collect();
        // A guest that is too much for short epochs has them all at the same length: one of them says it.
        points.sort_by(|a, b| a.length_ns.total_cmp(&b.length_ns));
        points.dedup_by(|next, before| next.length_ns < SAME * before.length_ns);
        Profile::new(points)
    }
}

impl Predicted {
    pub(crate) fn of(prediction: &Prediction) -> Self {
        let epoch = &prediction.epoch;
        Self {
            epoch_ms: epoch.length_ns / NS_A_MS,
            pause_ms: epoch.pause_ns / NS_A_MS,
            dirty_pages: epoch.dirty_pages,
            megabytes_a_second: prediction.bytes_a_second / 1e6,
            commit_ms: epoch.commit_ns / NS_A_MS,
            latency_ms: prediction.held_ns / NS_A_MS,
            overhead_percent: prediction.overhead * 100.0,
            keeps_pace: prediction.keeps_pace,
        }
    }
}

/// In words.
pub(crate) fn goal_words(goal: Goal) -> String {
    match goal {
        Goal::Latency { held_ns } => format!("at most {} ms of added latency", held_ns / NS_A_MS),
        Goal::Overhead { ratio } => format!("at most {} % slower", ratio * 100.0),
    }
}

/// The length for a goal, in whole milliseconds on the side of the goal.
pub(crate) fn recommend(profile: &Profile, goal: Goal, limits: Limits) -> Recommended {
    let (length_ns, reach) = profile.settle(goal, limits);
    let length_ms = length_ns / NS_A_MS;
    let whole_ms = match goal {
        Goal::Latency { .. } => length_ms.floor(),
        Goal::Overhead { .. } => length_ms.ceil(),
    };
    let whole_ns = (whole_ms * NS_A_MS).clamp(limits.least_ns, limits.most_ns);
    Recommended {
        goal: goal_words(goal),
        reached: reach == Reach::Reached,
        predicted: Predicted::of(&profile.at(whole_ns, limits.fault_ns)),
    }
}

/// For people.
pub(crate) fn table(answer: &Answer) -> String {
    let mut text = String::new();
    let mib = |pages: f64| pages * float(PAGE_BYTES as u64) / f64::from(1 << 20);
    let _ = writeln!(
        text,
        "{} ({}), {:.0} MiB: observed without protection",
        answer.vm,
        answer.hypervisor,
        mib(float(answer.guest_pages))
    );
    let _ = writeln!(
        text,
        "{:>8} {:>7} {:>10} {:>10} {:>12} {:>10} {:>9} {:>9}",
        "epoch", "epochs", "pause p50", "pages p50", "dirty MiB/s", "set MiB", "hot MiB", "smaller"
    );
    for seen in &answer.observed {
        let _ = writeln!(
            text,
            "{:>5.1} ms {:>7} {:>7.2} ms {:>10.0} {:>12.1} {:>10.1} {:>9.1} {:>7.1} x",
            seen.epoch_ms,
            seen.epochs,
            seen.pause_us.p50 / 1e3,
            seen.dirty_pages.p50,
            mib(seen.dirty_pages_a_second),
            mib(float(seen.working_set_pages)),
            mib(float(seen.hot_pages)),
            seen.times_smaller,
        );
    }
    let link = &answer.link;
    let _ = writeln!(
        text,
        "\npredicted, with {:.0} Mbit/s and {:.2} ms there and back to the backup",
        link.bytes_a_second * 8.0 / 1e6,
        link.round_trip_ns / NS_A_MS
    );
    let _ = writeln!(
        text,
        "{:>8} {:>10} {:>10} {:>11} {:>14} {:>13}",
        "epoch", "pause p50", "pages p50", "MB/s sent", "added latency", "guest slower"
    );
    for one in &answer.predicted {
        let _ = writeln!(text, "{}", predicted_line(one));
    }
    text.push('\n');
    for one in &answer.recommended {
        let _ = writeln!(text, "{}", recommended_line(one));
    }
    for reason in &answer.in_the_way {
        let _ = writeln!(text, "before it can be protected: {reason}");
    }
    text
}

fn predicted_line(one: &Predicted) -> String {
    format!(
        "{:>5.1} ms {:>7.2} ms {:>10.0} {:>11.1} {:>11.1} ms {:>11.1} %{}",
        one.epoch_ms,
        one.pause_ms,
        one.dirty_pages,
        one.megabytes_a_second,
        one.latency_ms,
        one.overhead_percent,
        if one.keeps_pace { "" } else { "  epochs stretch" }
    )
}

fn recommended_line(one: &Recommended) -> String {
    let at = &one.predicted;
    let costs = format!(
        "{:.1} ms of added latency, {:.1} % slower, {:.1} MB/s",
        at.latency_ms, at.overhead_percent, at.megabytes_a_second
    );
    if one.reached {
        format!("{}: epochs of {:.0} ms ({costs})", one.goal, at.epoch_ms)
    } else {
        format!(
            "{}: no length does it; the best is {:.0} ms ({costs})",
            one.goal, at.epoch_ms
        )
    }
}

#[cfg(test)]
pub(crate) mod samples {
    use super::*;
    use crate::advise::observe::Quantiles;

    pub(crate) const LINK: Link = Link {
        bytes_a_second: 1e9,
        round_trip_ns: 1e5,
        commit_ns: 4e5,
        page_ns: 1e3,
    };

    /// A guest that writes other pages all the time, up to 1,000 of them.
    pub(crate) fn seen(epoch_ms: f64) -> Observed {
        let pages = 1000.0 * (1.0 - (-epoch_ms / 50.0).exp());
        let both = |p50: f64| Quantiles { p50, p99: 2.0 * p50 };
        Observed {
            asked_ms: epoch_ms,
            epoch_ms,
            epochs: 100,
            pause_us: both(100.0 + pages * 0.25),
            dirty_pages: both(pages),
            dirty_pages_a_second: pages * 1e3 / epoch_ms,
            encode_us: both(pages),
            wire_bytes: 5000.0 + pages * 500.0,
            state_bytes: 5000.0,
            times_smaller: 8.0,
            working_set_pages: 1000,
            hot_pages: 10,
            kinds: vec![("delta", 100)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::samples::{LINK, seen};
    use super::*;

    const LIMITS: Limits = Limits {
        least_ns: 5e6,
        most_ns: 200e6,
        fault_ns: 2000.0,
    };

    fn profile() -> Profile {
        LINK.profile(&[10.0, 25.0, 75.0, 200.0].map(seen)).unwrap()
    }

    #[test]
    fn longer_epochs_are_predicted_to_send_less_to_slow_the_guest_less_and_to_hold_its_output_longer() {
        let profile = profile();
        let all = LENGTHS_MS.map(|ms| Predicted::of(&profile.at(ms * NS_A_MS, LIMITS.fault_ns)));
        for pair in all.windows(2) {
            assert!(pair[0].latency_ms < pair[1].latency_ms, "{pair:?}");
            assert!(pair[0].overhead_percent > pair[1].overhead_percent, "{pair:?}");
            assert!(
                pair[0].megabytes_a_second > pair[1].megabytes_a_second,
                "{pair:?}"
            );
        }
    }

    #[test]
    fn what_is_recommended_keeps_the_goal_and_a_goal_beyond_reach_is_said_to_be() {
        let latency = recommend(&profile(), Goal::Latency { held_ns: 10e6 }, LIMITS);
        assert!(
            latency.reached && latency.predicted.latency_ms <= 10.0,
            "{latency:?}"
        );
        assert!(
            latency.predicted.latency_ms > 8.5,
            "no shorter than it must be: {latency:?}"
        );
        let slower = recommend(&profile(), Goal::Overhead { ratio: 0.03 }, LIMITS);
        assert!(
            slower.reached && slower.predicted.overhead_percent <= 3.2,
            "{slower:?}"
        );
        let both = [Goal::Latency { held_ns: 1e6 }, Goal::Overhead { ratio: 0.000_1 }];
        for goal in both {
            assert!(!recommend(&profile(), goal, LIMITS).reached, "{goal:?}");
        }
    }

    #[test]
    fn the_table_has_what_was_observed_every_length_the_goals_and_what_is_in_the_way() {
        let profile = profile();
        let predicted = LENGTHS_MS.map(|ms| Predicted::of(&profile.at(ms * NS_A_MS, LIMITS.fault_ns)));
        let goals = [Goal::Latency { held_ns: 10e6 }, Goal::Latency { held_ns: 1e6 }];
        let answer = Answer {
            schema: SCHEMA,
            vm: "demo".to_owned(),
            hypervisor: "VMM at /run/demo.sock".to_owned(),
            guest_pages: 65_536,
            host: crate::host::Host::this(),
            versions: crate::host::Versions::this(),
            in_the_way: vec!["disk \"disk0\" is not replicated".to_owned()],
            link: LINK,
            fault_ns: LIMITS.fault_ns,
            observed: [10.0, 25.0, 75.0, 200.0].map(seen).to_vec(),
            predicted: predicted.to_vec(),
            recommended: goals.map(|goal| recommend(&profile, goal, LIMITS)).to_vec(),
        };
        let table = table(&answer);
        for words in [
            "demo (VMM at /run/demo.sock), 256 MiB",
            "\n 75.0 ms     100",
            "\n125.0 ms",
            "at most 10 ms of added latency: epochs of 1",
            "at most 1 ms of added latency: no length does it; the best is 5 ms",
            "before it can be protected: disk \"disk0\"",
        ] {
            assert!(table.contains(words), "{words}: {table}");
        }
    }

    #[test]
    fn a_slow_link_is_said_to_make_epochs_stretch() {
        let slow = Link {
            bytes_a_second: 1e6,
            ..LINK
        };
        let profile = slow.profile(&[10.0, 25.0].map(seen)).unwrap();
        assert!(!profile.at(10e6, 0.0).keeps_pace);
    }

    #[test]
    fn lengths_that_came_out_the_same_are_one() {
        assert!(LINK.profile(&[10.0, 10.0].map(seen)).is_some());
        assert!(LINK.profile(&[]).is_none());
    }
}
