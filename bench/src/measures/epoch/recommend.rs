//! `epoch.recommend`: for each load of the sweep and each goal, which of the lengths that were tried an operator should take.

use serde::Deserialize;

use super::sweep::{Seen, Sweep};
use crate::measures::Measure;
use crate::parameters::{Parameter, Parameters};
use crate::run::{Finding, Run, Unable};
use crate::stats::Figure;

#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Recommend(Sweep);

/// What an operator wants.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Goal {
    /// At most so much latency is added for the guest's client, at the median.
    LatencyMs(f64),
    /// The guest is slower by at most so much.
    SlowerPercent(f64),
}

const GOALS: [Goal; 2] = [Goal::LatencyMs(10.0), Goal::SlowerPercent(10.0)];

/// What a length cost, at the median of the repetitions.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    epoch_ms: u32,
    added_ms: f64,
    slower_percent: f64,
    megabytes_a_second: f64,
}

impl Goal {
    fn name(self) -> String {
        match self {
            Self::LatencyMs(ms) => format!("at most {ms} ms"),
            Self::SlowerPercent(percent) => format!("at most {percent} % slower"),
        }
    }

    /// The length to take, and whether it does what is wanted. With a goal for latency it is the longest that does, with one for the
    /// guest's speed the shortest: the other cost is the least then. Where none does, the one that comes nearest.
    fn choose(self, costs: &[Cost]) -> Option<(Cost, bool)> {
        let (of, most): (fn(&Cost) -> f64, f64) = match self {
            Self::LatencyMs(most) => (|cost| cost.added_ms, most),
            Self::SlowerPercent(most) => (|cost| cost.slower_percent, most),
        };
        let good = costs.iter().filter(|cost| of(cost) <= most);
        let chosen = match self {
            Self::LatencyMs(_) => good.max_by_key(|cost| cost.epoch_ms),
            Self::SlowerPercent(_) => good.min_by_key(|cost| cost.epoch_ms),
        };
        let nearest = || costs.iter().min_by(|a, b| of(a).total_cmp(&of(b)));
        chosen
            .map(|cost| (*cost, true))
            .or_else(|| nearest().map(|cost| (*cost, false)))
    }
}

/// Of each length that could be measured.
fn costs(seen: &Seen) -> Vec<Cost> {
    let middle = |values: Vec<f64>| Figure::of(&values).map(|figure| figure.p50);
    let cost = |at: &super::sweep::At| {
        let pairs = || seen.free.iter().zip(&at.protected);
        Some(Cost {
            epoch_ms: at.epoch_ms,
            added_ms: middle(
                pairs()
                    .map(|(free, protected)| protected.latency_ms - free.latency_ms)
                    .collect(),
            )?,
            slower_percent: middle(
                pairs()
                    .map(|(free, protected)| 100.0 * (1.0 - free.ns_a_unit / protected.ns_a_unit))
                    .collect(),
            )?,
            megabytes_a_second: middle(at.protected.iter().map(|one| one.megabytes_a_second).collect())?,
        })
    };
    seen.at
        .iter()
        .filter(|at| at.missed.is_none())
        .filter_map(cost)
        .collect()
}

impl Measure for Recommend {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let all = self.0.seen(run)?;
        for goal in GOALS {
            for seen in all.iter() {
                let case = format!("{}/{}", goal.name(), seen.load.name());
                let Some((cost, reached)) = goal.choose(&costs(seen)) else {
                    run.missed(&case, Unable::Wrong("no length could be measured".to_owned()));
                    continue;
                };
                let name = goal.name();
                let goal: [(&str, Parameter); 2] = [
                    ("goal", name.as_str().into()),
                    ("reached", if reached { "yes" } else { "no" }.into()),
                ];
                let at: Parameters = goal.into_iter().chain(seen.load.parameters()).collect();
                let value = Figure::of(&[f64::from(cost.epoch_ms)]);
                let words = format!(
                    "{:.1} ms of added latency, {:.1} % slower, {:.1} MB/s",
                    cost.added_ms, cost.slower_percent, cost.megabytes_a_second
                );
                let finding = Finding {
                    case,
                    unit: "ms",
                    value: value.ok_or_else(|| Unable::Wrong("a length is a number".to_owned()))?,
                    reference: None,
                    note: seen.load.noted(Some(if reached {
                        words
                    } else {
                        format!("no length that was tried does it; this one comes nearest: {words}")
                    })),
                };
                run.found_at(at, finding);
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

#[cfg(test)]
mod tests {
    use super::super::stand::{Free, Protected};
    use super::super::sweep::At;
    use super::*;

    #[test]
    fn a_guest_that_gets_nothing_done_is_slower_by_all_of_it() {
        let protected = |ns_a_unit: f64| Protected {
            ns_a_unit,
            latency_ms: 15.0,
            pause_ms: 1.0,
            lag_ms: 2.0,
            dirty_pages: 100.0,
            on_time_percent: 100.0,
            megabytes_a_second: 1.0,
            replicator_percent: 1.0,
            agent_percent: 1.0,
            vmm_percent: 100.0,
        };
        let at = |epoch_ms: u32, ns_a_unit: f64| At {
            epoch_ms,
            protected: vec![protected(ns_a_unit)],
            missed: None,
        };
        let free = |ns_a_unit: f64| Free {
            ns_a_unit,
            latency_ms: 1.0,
        };
        let load = toml::from_str::<Sweep>("").unwrap().loads().remove(0);
        let mut seen = Seen {
            load,
            free: vec![free(100.0)],
            at: vec![at(5, f64::INFINITY), at(25, 125.0)],
        };
        let slower: Vec<f64> = costs(&seen).iter().map(|cost| cost.slower_percent).collect();
        assert_eq!(slower.len(), 2);
        assert!(
            (slower[0] - 100.0).abs() < 1e-9 && (slower[1] - 20.0).abs() < 1e-9,
            "{slower:?}"
        );
        // Of one that gets nothing done unprotected nothing can be said.
        seen.free = vec![free(f64::INFINITY)];
        assert!(costs(&seen).is_empty());
    }

    fn cost(epoch_ms: u32, added_ms: f64, slower_percent: f64) -> Cost {
        Cost {
            epoch_ms,
            added_ms,
            slower_percent,
            megabytes_a_second: 1.0,
        }
    }

    #[test]
    fn the_goal_is_kept_at_the_least_of_the_other_cost_and_what_cannot_be_kept_is_said() {
        let costs = [
            cost(5, 4.0, 30.0),
            cost(10, 7.0, 15.0),
            cost(25, 14.0, 9.0),
            cost(50, 28.0, 5.0),
        ];
        let choose = |goal: Goal| {
            let (cost, reached) = goal.choose(&costs).unwrap();
            (cost.epoch_ms, reached)
        };
        assert_eq!(choose(Goal::LatencyMs(10.0)), (10, true));
        assert_eq!(choose(Goal::LatencyMs(1.0)), (5, false));
        assert_eq!(choose(Goal::SlowerPercent(10.0)), (25, true));
        assert_eq!(choose(Goal::SlowerPercent(1.0)), (50, false));
        assert_eq!(Goal::LatencyMs(10.0).choose(&[]), None);
    }
}
