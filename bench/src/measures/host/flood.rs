//! `host.flood` and `host.late`: what the others get of an agent beside a VM that floods it.

use serde::Deserialize;

use super::watch::Watched;
use super::{Common, Pairs, dirty, each, notes, pairs, slice_ms};
use crate::measures::Measure;
use crate::measures::kvm::dirty_problem;
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable};

/// Settings of what is measured beside a guest that floods.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flooded {
    /// VMs that do not flood.
    #[serde(default = "four")]
    vms: u16,
    /// What they write.
    #[serde(default = "dirty")]
    dirty: String,
    /// What the flooding guest writes.
    #[serde(default = "flood")]
    flood: String,
    #[serde(default = "slice_ms")]
    slice_ms: u32,
}

const fn four() -> u16 {
    4
}

fn flood() -> String {
    "random/random:4000:25:48".to_owned()
}

impl Flooded {
    fn parameters(&self) -> [(&'static str, Parameter); 4] {
        [
            ("vms", self.vms.into()),
            ("dirty", self.dirty.as_str().into()),
            ("flood", self.flood.as_str().into()),
            ("slice_ms", self.slice_ms.into()),
        ]
    }

    fn common(&self) -> Common {
        Common {
            vms: self.vms,
            dirty: self.dirty.clone(),
            slice_ms: self.slice_ms,
        }
    }

    /// With the flood and without.
    fn pairs(&self, run: &Run) -> Result<Pairs, Unable> {
        let common = self.common();
        pairs(run, &format!("{self:?}"), || {
            let without = common.watched(run, self.vms, None)?;
            Ok((common.watched(run, self.vms, Some(&self.flood))?, without))
        })
    }

    fn problem(&self) -> Option<String> {
        self.common().problem().or_else(|| dirty_problem(&self.flood))
    }
}

/// `host.flood`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Flood(Flooded);

impl Measure for Flood {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let pairs = self.0.pairs(run)?;
        let note = |watched: &Watched| format!("{:.0} % of the machine busy", watched.busy_percent);
        run.found_at(
            self.0.parameters(),
            Finding {
                case: "others".to_owned(),
                unit: "us",
                value: each(&pairs, |(with, _)| with.worst_ack_us)?,
                reference: Some((
                    "without the flood".to_owned(),
                    each(&pairs, |(_, without)| without.worst_ack_us)?,
                )),
                note: Some(format!("p99 of the worst of the others; {}", notes(&pairs, note))),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.late`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Late(Flooded);

impl Measure for Late {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let pairs = self.0.pairs(run)?;
        run.found_at(
            self.0.parameters(),
            Finding {
                case: "others".to_owned(),
                unit: "%",
                value: each(&pairs, |(with, _)| with.late_percent)?,
                reference: Some((
                    "without the flood".to_owned(),
                    each(&pairs, |(_, without)| without.late_percent)?,
                )),
                note: Some("epochs of the worst of the others that began late beside the flood".to_owned()),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}
