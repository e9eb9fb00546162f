//! `scale`: how many VMs a backup host carries, on paper and in simulation.
//!
//! ```text
//!   costs.rs       rows of reports, or measured in a few seconds ─► what each step of a checkpoint costs
//!   shape.rs       the fleet, and the work of each step
//!   simulation/    the fleet on one clock, with the real protocol's pace (pair.rs), threads and cores (cores.rs)
//!   tally.rs       epochs on time, lags, what was full; keeps the books
//!   search.rs      the most VMs that hold
//!   check.rs       the same for an agent that was measured: what the model is worth
//! ```
//!
//! Nothing here takes time but what `costs.rs` measures: the same costs and seed give the same figures.

mod check;
mod cores;
mod costs;
mod pair;
mod search;
mod shape;
mod simulation;
mod table;
mod tally;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub(crate) use check::ScaleCheck;
pub(crate) use table::table;

use crate::contents::Content;
use crate::measures::{Measure, outside};
use crate::parameters::Parameter;
use crate::read;
use crate::report::Report;
use crate::run::{Effort, Finding, Run, Unable};
use crate::stats::{Figure, float};
use costs::Rows;
use search::{Most, most};
use shape::{Costs, Shape, whole};
use simulation::simulate;
use tally::Outcome;

const MIB: u64 = 1 << 20;
/// What an agent's host has left besides images and staging, as the agent itself demands it.
const HOST_MIB: u64 = 256;
/// Before anything is counted: the pair is made, and what begins at once has spread.
const WARM_EPOCHS: u64 = 20;
/// More are not simulated when it is only to be seen that it runs.
const SHORTEST_VMS_MAX: u64 = 8;
/// More VMs are not tried.
const VMS_MAX: u64 = 4096;

/// Settings of `scale`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Scale {
    /// Reports whose costs are used; what none has is measured at the start.
    pub(crate) costs: Vec<PathBuf>,
    /// How pages change.
    content: Content,
    /// Each a row for each link and each number of backup hosts.
    vms: Vec<u64>,
    link_gbit: Vec<f64>,
    backups: Vec<u64>,
    /// Hosts that the VMs are spread over, and their cores.
    vms_a_host: u64,
    host_cores: u64,
    agent_cores: u64,
    /// Threads of an agent that serve connections: ours has one.
    connection_threads: u64,
    agent_memory_gib: u64,
    staging_max_mib: u64,
    /// Of each guest.
    memory_mib: u64,
    round_trip_us: u64,
    epoch_ms: u64,
    in_flight_max: u64,
    dirty_pages: u64,
    working_set_pages: u64,
    spread_percent: u64,
    state_bytes: u64,
    /// Simulated.
    watched_ms: u64,
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            costs: Vec::new(),
            content: Content::Scattered,
            vms: vec![1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
            link_gbit: vec![10.0, 100.0],
            vms_a_host: 16,
            host_cores: 16,
            backups: vec![1],
            agent_cores: 32,
            connection_threads: 1,
            agent_memory_gib: 1024,
            staging_max_mib: 1024,
            memory_mib: 4096,
            round_trip_us: 100,
            epoch_ms: 25,
            in_flight_max: 4,
            dirty_pages: 500,
            working_set_pages: 16_384,
            spread_percent: 20,
            state_bytes: 12_000,
            watched_ms: 2000,
        }
    }
}

impl Scale {
    /// So many VMs of it.
    fn shape(&self, run: &Run, vms: u64, hosts: Backups, repetition: u64) -> Shape {
        let epoch_ns = self.epoch_ms * 1_000_000;
        let watched_ns = if shortest(run) {
            epoch_ns * 10
        } else {
            self.watched_ms * 1_000_000
        };
        Shape {
            seed: run.seed() ^ (repetition << 32),
            vms,
            vms_a_host: self.vms_a_host,
            host_cores: self.host_cores,
            backups: hosts.count,
            agent_cores: self.agent_cores,
            connection_threads: self.connection_threads,
            link_gbit: hosts.link_gbit,
            round_trip_ns: self.round_trip_us * 1000,
            epoch_ns,
            in_flight_max: self.in_flight_max,
            dirty_pages: self.dirty_pages,
            working_set_pages: self.working_set_pages,
            spread: float(self.spread_percent) / 100.0,
            state_bytes: self.state_bytes,
            guest_ns: 0,
            one_machine: false,
            receive_window_bytes: 16 * MIB,
            warm_ns: epoch_ns * WARM_EPOCHS,
            watched_ns,
        }
    }

    /// VMs whose images and staging the backups' memory has room for.
    fn vms_in_memory(&self, backups: u64) -> u64 {
        let each = (self.agent_memory_gib * 1024).saturating_sub(self.staging_max_mib + HOST_MIB);
        each / self.memory_mib * backups
    }

    /// VMs whose bytes the links of the backups carry, if nothing else were in the way.
    fn vms_on_links(&self, shape: &Shape, costs: &Costs) -> f64 {
        let parts = shape::parts(1, self.dirty_pages, costs, self.state_bytes);
        let ns: u64 = parts.iter().map(|part| shape.wire_ns(part.bytes)).sum();
        float(shape.epoch_ns * shape.backups) / float(ns.max(1))
    }
}

/// The backup hosts of a fleet.
#[derive(Clone, Copy)]
struct Backups {
    count: u64,
    /// Of each.
    link_gbit: f64,
}

impl Backups {
    fn parameters(self) -> [(&'static str, Parameter); 2] {
        [
            ("backups", Parameter::Whole(self.count)),
            ("link_gbit", Parameter::Number(self.link_gbit)),
        ]
    }

    /// A part of a row's name.
    fn case(self) -> String {
        let link = format!("{}-gbit", self.link_gbit);
        match self.count {
            1 => link,
            count => format!("{link}/{count}-backups"),
        }
    }
}

/// A figure of an outcome.
type Of = dyn Fn(&Outcome) -> Option<f64>;

/// Whether it is only to be seen that it runs.
fn shortest(run: &Run) -> bool {
    run.effort() == Effort::Shortest
}

/// The rows of reports.
fn rows(paths: &[PathBuf]) -> Result<Rows, Unable> {
    let read = |path: &PathBuf| {
        let report = read::report(path).map_err(Unable::failed("reading a report"))?;
        Ok((file_name(path), report))
    };
    let reports: Result<Vec<(String, Report)>, Unable> = paths.iter().map(read).collect();
    Ok(Rows::of(reports?))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

impl Measure for Scale {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let mut rows = rows(&self.costs)?;
        rows.complete(run, self.content)?;
        let costs = rows.costs(self.content, run)?;
        self.tell_costs(run, &costs, &rows)?;
        for hosts in self.backups() {
            let one = self.outcomes(run, &costs, 1, hosts);
            let few = |vms: &&u64| !shortest(run) || **vms <= SHORTEST_VMS_MAX;
            let vms: Vec<u64> = self.vms.iter().filter(few).copied().collect();
            for vms in &vms {
                run.say(format!("{vms} VMs, {}", hosts.case()));
                let outcomes = self.outcomes(run, &costs, *vms, hosts);
                self.tell(run, (*vms, hosts), &outcomes, &one)?;
            }
            self.saturation(run, &costs, hosts)?;
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let mut vms = self.vms.iter();
        let (mut links, mut backups) = (self.link_gbit.iter(), self.backups.iter());
        let wrong_link = |gbit: &f64| {
            let wrong = !(0.01..=10_000.0).contains(gbit);
            wrong.then(|| format!("link_gbit = {gbit}: it must be 0.01 to 10000"))
        };
        let limits = [
            ("vms_a_host", self.vms_a_host, 1, VMS_MAX),
            ("host_cores", self.host_cores, 1, 4096),
            ("agent_cores", self.agent_cores, 1, 4096),
            ("connection_threads", self.connection_threads, 1, 4096),
            ("agent_memory_gib", self.agent_memory_gib, 1, 1 << 20),
            ("staging_max_mib", self.staging_max_mib, 1, 1 << 30),
            ("memory_mib", self.memory_mib, 1, 1 << 24),
            ("round_trip_us", self.round_trip_us, 1, 1_000_000),
            ("epoch_ms", self.epoch_ms, 1, 10_000),
            ("in_flight_max", self.in_flight_max, 1, 256),
            ("working_set_pages", self.working_set_pages, 2, 1 << 30),
            (
                "dirty_pages",
                self.dirty_pages,
                1,
                self.working_set_pages.saturating_sub(1).max(1),
            ),
            ("spread_percent", self.spread_percent, 0, 100),
            ("state_bytes", self.state_bytes, 1, 64 * MIB),
            ("watched_ms", self.watched_ms, 100, 600_000),
        ];
        let mut limits = limits.into_iter();
        limits
            .find_map(|(key, value, least, most)| outside(key, value, least, most))
            .or_else(|| vms.find_map(|vms| outside("vms", *vms, 1, VMS_MAX)))
            .or_else(|| backups.find_map(|count| outside("backups", *count, 1, VMS_MAX)))
            .or_else(|| links.find_map(wrong_link))
    }
}

impl Scale {
    /// Every number of backup hosts with every link.
    fn backups(&self) -> Vec<Backups> {
        let with = |count: &u64| {
            let count = *count;
            let links = self.link_gbit.iter();
            links.map(move |link_gbit| Backups {
                count,
                link_gbit: *link_gbit,
            })
        };
        self.backups.iter().flat_map(with).collect()
    }

    /// One for each repetition, each with its own seed.
    fn outcomes(&self, run: &Run, costs: &Costs, vms: u64, hosts: Backups) -> Vec<Outcome> {
        (0..u64::from(run.repetitions()))
            .map(|repetition| simulate(&self.shape(run, vms, hosts, repetition), costs))
            .collect()
    }

    fn tell(
        &self,
        run: &mut Run,
        (vms, hosts): (u64, Backups),
        outcomes: &[Outcome],
        one: &[Outcome],
    ) -> Result<(), Unable> {
        let first = outcomes.first().ok_or_else(nothing)?;
        let staged_mib = float(first.staged_pages_max) * 4.0 / 1024.0;
        let seconds = float(first.watched_ns) / 1e9;
        let note = format!(
            "{}; {:.0} pages a second, {staged_mib:.0} MiB staged{}",
            first.limit(),
            float(first.pages) / seconds,
            if staged_mib > float(self.staging_max_mib * hosts.count) {
                ": it spills to a disk"
            } else {
                ""
            },
        );
        let each = |outcomes: &[Outcome], of: &Of| {
            let values: Option<Vec<f64>> = outcomes.iter().map(of).collect();
            values.and_then(|values| Figure::of(&values))
        };
        let figures: [(&str, &'static str, &Of); 3] = [
            ("late", "%", &|outcome| Some(100.0 * (1.0 - outcome.on_time))),
            ("lag p50", "ms", &|outcome| outcome.lag_ms(0.5)),
            ("lag p99", "ms", &|outcome| outcome.lag_ms(0.99)),
        ];
        for (what, unit, of) in figures {
            let [backups, link] = hosts.parameters();
            let at = [
                ("what", what.into()),
                backups,
                link,
                ("vms", Parameter::Whole(vms)),
            ];
            let case = format!("{}/{}/{vms}", what.replace(' ', "-"), hosts.case());
            let value = each(outcomes, of).ok_or_else(nothing)?;
            let finding = Finding {
                case,
                unit,
                value,
                reference: each(one, of).map(|figure| ("one VM".to_owned(), figure)),
                note: Some(note.clone()),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }

    fn saturation(&self, run: &mut Run, costs: &Costs, hosts: Backups) -> Result<(), Unable> {
        run.say(format!("the most VMs, {}", hosts.case()));
        let shape = self.shape(run, 1, hosts, 0);
        let in_memory = self.vms_in_memory(hosts.count);
        let Most { vms, limit } = most(if shortest(run) { SHORTEST_VMS_MAX } else { VMS_MAX }, |vms| {
            simulate(&Shape { vms, ..shape.clone() }, costs)
        });
        let (vms, limit) = if in_memory < vms {
            let words = format!(
                "the memory of the backups: room for the images of {in_memory}; without that {vms}, then {limit}"
            );
            (in_memory, words)
        } else {
            (vms, format!("{limit}; memory has room for {in_memory}"))
        };
        let figure = |number: f64| Figure::of(&[number]).ok_or_else(nothing);
        let [backups, link] = hosts.parameters();
        run.found_at(
            [("what", "most".into()), backups, link],
            Finding {
                case: format!("most/{}", hosts.case()),
                unit: "VMs",
                value: figure(float(vms))?,
                reference: Some((
                    "what the link alone would carry".to_owned(),
                    figure(float(whole(self.vms_on_links(&shape, costs).floor())))?,
                )),
                note: Some(limit),
            },
        );
        Ok(())
    }

    /// What everything follows from.
    fn tell_costs(&self, run: &mut Run, costs: &Costs, rows: &Rows) -> Result<(), Unable> {
        let pages = self.dirty_pages;
        let bytes = whole(float(pages) * (costs.page_bytes + shape::ENTRY_BYTES)) + self.state_bytes;
        let steps = [
            ("capture", costs.capture),
            ("encode", costs.encode),
            ("send", costs.send),
            ("receive", costs.receive),
            ("decode", costs.decode),
            ("verify", costs.verify),
            ("commit", costs.commit),
            ("apply", costs.apply),
        ];
        for (step, cost) in steps {
            let us = float(cost.of(true, pages, bytes)) / 1e3;
            let note = format!(
                "{:.0} us for a checkpoint, {:.0} ns for a page, {:.2} ns for a byte; {:.0} bytes a page; {}",
                cost.epoch_ns / 1e3,
                cost.page_ns,
                cost.byte_ns,
                costs.page_bytes,
                rows.sources.join("; "),
            );
            run.found_at(
                [("what", "cost".into()), ("step", step.into())],
                Finding {
                    case: format!("cost/{step}"),
                    unit: "us",
                    value: Figure::of(&[us]).ok_or_else(nothing)?,
                    reference: None,
                    note: Some(note),
                },
            );
        }
        Ok(())
    }
}

fn nothing() -> Unable {
    Unable::Wrong("the simulation had no figures".to_owned())
}
