//! `scale.check`: the model beside a real agent, for the one that `host.*` measured.
//!
//! There, guests, replicators and agent share one machine, so that the model does, too. Taken from the report's single VM: what an epoch costs
//! the agent, and the rest of the machine. Told by the model, and compared: the same for many VMs.

use std::path::PathBuf;

use serde::Deserialize;

use super::costs::Rows;
use super::shape::{Costs, Shape, whole};
use super::simulation::simulate;
use super::tally::Outcome;
use super::{nothing, rows};
use crate::contents::Content;
use crate::measures::Measure;
use crate::parameters::Parameter;
use crate::report::Row;
use crate::run::{Finding, Run, Unable};
use crate::stats::{Figure, float};

/// Of the lab's replicators.
const EPOCH_NS: u64 = 25_000_000;
const EPOCHS_WATCHED: u64 = 400;

/// Settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScaleCheck {
    /// A report with `host.connections`, and perhaps `host.ack`.
    report: PathBuf,
    /// Other reports with costs.
    #[serde(default)]
    costs: Vec<PathBuf>,
    /// Cores of the machine that it was measured on.
    cores: u64,
}

impl Measure for ScaleCheck {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let mut paths = vec![self.report.clone()];
        paths.extend(self.costs.clone());
        let mut rows = rows(&paths)?;
        // What the lab's guests do: one counter in each page.
        rows.complete(run, Content::Counter)?;
        let measured = Measured::of(&rows)?;
        let costs = measured.agent(rows.costs(Content::Counter, run)?);
        let shape = |vms| Shape {
            guest_ns: measured.rest_ns(self.cores, &costs),
            ..lab(run.seed(), vms, self.cores, whole(measured.one_pages))
        };
        let one = simulate(&shape(1), &costs);
        let many = simulate(&shape(measured.vms), &costs);
        self.tell(run, &measured, &one, &many)
    }

    fn problem(&self) -> Option<String> {
        crate::measures::outside("cores", self.cores, 1, 4096)
    }
}

/// What a report says of one VM and of many.
struct Measured {
    vms: u64,
    one_pages: f64,
    pages: f64,
    /// The agent's time for an epoch of the single VM: all threads, and the connections' alone.
    one_epoch_us: f64,
    one_connections_us: f64,
    one_busy: f64,
    busy: f64,
    connections_us: f64,
    /// Its time for a page, and the acknowledgements' 99th percentile of the worst VM: one VM, many.
    page_us: Option<(f64, f64)>,
    ack_us: Option<(f64, f64)>,
}

impl Measured {
    fn of(rows: &Rows) -> Result<Self, Unable> {
        let row = rows.row("host.connections").ok_or_else(|| {
            Unable::Wrong(
                "the report has no host.connections: measure it with the plan backup-host".to_owned(),
            )
        })?;
        let parameter = |name: &str| {
            let found = row.parameters.get(name).and_then(Parameter::number);
            found.ok_or_else(|| Unable::Wrong(format!("host.connections does not say its {name}")))
        };
        let both = |row: Option<&Row>| row.and_then(|row| row.reference.zip(row.value));
        let (one_connections_us, connections_us) = both(Some(row)).ok_or_else(nothing)?;
        Ok(Self {
            vms: whole(parameter("vms")?).clamp(1, super::VMS_MAX),
            one_pages: parameter("one_pages_an_epoch")?.max(1.0),
            pages: parameter("pages_an_epoch")?.max(1.0),
            one_epoch_us: parameter("one_epoch_us")?,
            one_connections_us,
            one_busy: parameter("one_busy_percent")? / 100.0,
            busy: parameter("busy_percent")? / 100.0,
            connections_us,
            page_us: both(rows.row("host.cpu")),
            ack_us: both(rows.row("host.ack")),
        })
    }

    /// The costs, with what a real agent's epoch takes besides: threads that wake up, the kernel's part of files and sockets.
    fn agent(&self, mut costs: Costs) -> Costs {
        let pages = whole(self.one_pages);
        let bytes = whole(self.one_pages * (costs.page_bytes + super::shape::ENTRY_BYTES)) + STATE_BYTES;
        let connections_ns = self.one_connections_us * 1e3 - costs.receive.byte_ns * float(bytes);
        costs.receive.epoch_ns = (connections_ns / 2.0).max(0.0);
        let store = [costs.decode, costs.verify, costs.commit, costs.apply];
        let store_ns: u64 = store.iter().map(|cost| cost.of(true, pages, bytes)).sum();
        let rest_ns = (self.one_epoch_us - self.one_connections_us) * 1e3 - float(store_ns);
        costs.commit.epoch_ns += rest_ns.max(0.0);
        costs
    }

    /// What everything on the machine but the agent and what the model knows of the replicator does for an epoch.
    fn rest_ns(&self, cores: u64, costs: &Costs) -> u64 {
        let pages = whole(self.one_pages);
        let bytes = whole(self.one_pages * (costs.page_bytes + super::shape::ENTRY_BYTES)) + STATE_BYTES;
        let known = [costs.capture, costs.encode, costs.send];
        let known_ns: u64 = known.iter().map(|cost| cost.of(true, pages, bytes)).sum();
        let all_ns = self.one_busy * float(cores * EPOCH_NS) - self.one_epoch_us * 1e3;
        whole(all_ns - float(known_ns))
    }
}

/// Device state of the test VMM's guest.
const STATE_BYTES: u64 = 12_000;

/// The lab of the end-to-end tests.
fn lab(seed: u64, vms: u64, cores: u64, dirty_pages: u64) -> Shape {
    Shape {
        seed,
        vms,
        vms_a_host: vms,
        host_cores: cores,
        backups: 1,
        agent_cores: cores,
        connection_threads: 1,
        // Two ends of a pair of virtual devices: no link that could be full.
        link_gbit: 1000.0,
        round_trip_ns: 0,
        epoch_ns: EPOCH_NS,
        in_flight_max: 4,
        dirty_pages: dirty_pages.max(1),
        working_set_pages: 16_384,
        spread: 0.1,
        state_bytes: STATE_BYTES,
        guest_ns: 0,
        one_machine: true,
        receive_window_bytes: 16 << 20,
        warm_ns: EPOCH_NS * super::WARM_EPOCHS,
        watched_ns: EPOCH_NS * EPOCHS_WATCHED,
    }
}

impl ScaleCheck {
    fn tell(&self, run: &mut Run, measured: &Measured, one: &Outcome, many: &Outcome) -> Result<(), Unable> {
        let page_us = |outcome: &Outcome| float(outcome.agent_ns) / 1e3 / float(outcome.pages.max(1));
        let connections_us =
            |outcome: &Outcome| float(outcome.connections_ns) / 1e3 / float(outcome.epochs.max(1));
        let busy = |outcome: &Outcome| {
            let host = outcome
                .used
                .iter()
                .find(|(place, _)| *place == super::tally::Place::HostCores);
            host.map_or(0.0, |(_, part)| 100.0 * part)
        };
        let ack = |outcome: &Outcome| outcome.ack_us(0.99).unwrap_or_default();
        let told = [
            ("cpu", 1, "us", page_us(one), measured.page_us.map(|(one, _)| one)),
            (
                "cpu",
                measured.vms,
                "us",
                page_us(many),
                measured.page_us.map(|(_, many)| many),
            ),
            (
                "connections",
                measured.vms,
                "us",
                connections_us(many),
                Some(measured.connections_us),
            ),
            ("busy", 1, "%", busy(one), Some(measured.one_busy * 100.0)),
            ("busy", measured.vms, "%", busy(many), Some(measured.busy * 100.0)),
            ("ack", 1, "us", ack(one), measured.ack_us.map(|(one, _)| one)),
            (
                "ack",
                measured.vms,
                "us",
                ack(many),
                measured.ack_us.map(|(_, many)| many),
            ),
        ];
        for (what, vms, unit, value, reference) in told {
            let reference = reference.and_then(|value| Figure::of(&[value]));
            run.found_at(
                [("what", what.into()), ("vms", Parameter::Whole(vms))],
                Finding {
                    case: format!("{what}/{vms}"),
                    unit,
                    value: Figure::of(&[value]).ok_or_else(nothing)?,
                    reference: reference.map(|figure| ("measured".to_owned(), figure)),
                    note: Some(format!(
                        "{:.1} pages an epoch of one VM, {:.1} of many; in the way of many: {}",
                        measured.one_pages,
                        measured.pages,
                        many.limit()
                    )),
                },
            );
        }
        Ok(())
    }
}
