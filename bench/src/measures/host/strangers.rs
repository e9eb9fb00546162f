//! `host.strangers` and `host.beset`: what connections that come to nothing cost an agent and the VMs that it protects.

use std::thread::sleep;

use romulus_e2e::Host;
use romulus_e2e::strangers::{Blown, Storm};
use serde::Deserialize;

use super::watch::Watched;
use super::{Common, Pairs, dirty, each, names, notes, pairs, slice_ms};
use crate::measures::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable};

const AGENT_PORT: u16 = 7700;
const SERVICE: &[u8] = b"romulus-pair/1";

/// Settings of what is measured of a beset agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Besieged {
    /// VMs that are protected meanwhile.
    #[serde(default = "four")]
    vms: u16,
    /// What they write.
    #[serde(default = "dirty")]
    dirty: String,
    /// Connections that are begun: every second one is a handshake that is not gone on with, the others are damaged ones and noise.
    #[serde(default = "ten_thousand")]
    connections: u32,
    /// Over how long.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
}

const fn four() -> u16 {
    4
}

const fn ten_thousand() -> u32 {
    10_000
}

impl Besieged {
    fn parameters(&self) -> [(&'static str, Parameter); 4] {
        [
            ("vms", self.vms.into()),
            ("dirty", self.dirty.as_str().into()),
            ("connections", self.connections.into()),
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

    /// While strangers come, and before.
    fn pairs(&self, run: &Run) -> Result<Pairs, Unable> {
        pairs(run, &format!("{self:?}"), || self.beset(run))
    }

    fn beset(&self, run: &Run) -> Result<(Watched, Watched), Unable> {
        let failed = || Unable::failed("besetting the agent");
        let common = self.common();
        let slice = common.slice(run);
        let crowd = common.crowd(run, self.vms, None)?;
        let connections = run.rounds(self.connections).max(250);
        run.say(format!("gathering {connections} strangers"));
        let storm = Storm::gather(&crowd.lab, (Host::Backup, AGENT_PORT), SERVICE, connections);
        let storm = storm.map_err(failed())?;
        let names = names(self.vms);
        run.say("watching before they come");
        let before = Watched::watch(&crowd, &names, || {
            sleep(slice);
            Ok(())
        })?;
        run.say(format!("watching while {connections} strangers come"));
        let mut blown = Blown::default();
        let while_they_came = Watched::watch(&crowd, &names, || {
            let pause = slice / u32::try_from(storm.batches()).unwrap_or(u32::MAX);
            blown = storm.blow(&crowd.lab, pause).map_err(failed())?;
            Ok(())
        })?;
        blown.ensure_arrived().map_err(failed())?;
        Ok((while_they_came, before))
    }

    fn problem(&self) -> Option<String> {
        let problem = self.common().problem();
        problem.or_else(|| outside("connections", self.connections.into(), 250, 1_000_000))
    }
}

/// `host.strangers`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Strangers(Besieged);

impl Measure for Strangers {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let pairs = self.0.pairs(run)?;
        run.found_at(
            self.0.parameters(),
            Finding {
                case: "agent".to_owned(),
                unit: "MiB",
                value: each(&pairs, |(with, _)| with.growth_mib)?,
                reference: Some((
                    "in the same time before".to_owned(),
                    each(&pairs, |(_, before)| before.growth_mib)?,
                )),
                note: Some("the most that its resident memory grew by while they came".to_owned()),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `host.beset`.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Beset(Besieged);

impl Measure for Beset {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let pairs = self.0.pairs(run)?;
        let note = |watched: &Watched| {
            format!(
                "p99 from a last byte to its ack {:.0} us, {:.0} % of the machine busy",
                watched.worst_ack_us, watched.busy_percent
            )
        };
        let before = pairs.first().map_or_else(String::new, |(_, before)| note(before));
        run.found_at(
            self.0.parameters(),
            Finding {
                case: "protected".to_owned(),
                unit: "%",
                value: each(&pairs, |(with, _)| with.late_percent)?,
                reference: Some((
                    "before they came".to_owned(),
                    each(&pairs, |(_, before)| before.late_percent)?,
                )),
                note: Some(format!(
                    "epochs of the worst VM that began late; {}; before: {before}",
                    notes(&pairs, note)
                )),
            },
        );
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}
