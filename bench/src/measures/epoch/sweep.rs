//! The sweep: for each load of the guest it works alone, and then protected with epochs of each length.
//!
//! Done once for all measures that ask for the same.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use super::stand::{Free, Machine, Protected, Stand};
use super::{repetitions, scaled};
use crate::measures::kvm::dirty_problem;
use crate::measures::outside;
use crate::parameters::Parameter;
use crate::run::{Effort, Run, Unable};

/// Over which settings.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sweep {
    /// Lengths of epochs, in milliseconds.
    #[serde(default = "epoch_ms")]
    pub(super) epoch_ms: Vec<u32>,
    /// Pages that the guest writes in each 25 ms, spread over them.
    #[serde(default = "pages")]
    pages: Vec<u32>,
    /// How large the set is that they are in, in MiB.
    #[serde(default = "set_mib")]
    set_mib: Vec<u32>,
    /// With what they are written.
    #[serde(default = "contents")]
    contents: Vec<String>,
    #[serde(default = "vcpus")]
    vcpus: Vec<u32>,
    /// Every combination; otherwise the first of each list, and each of the others alone in its place.
    #[serde(default)]
    every: bool,
    /// How long the guest is watched in each case.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
    #[serde(default = "memory_mib")]
    memory_mib: u32,
}

fn epoch_ms() -> Vec<u32> {
    vec![5, 10, 25, 50, 100, 200]
}

fn pages() -> Vec<u32> {
    vec![500, 100, 2000]
}

fn set_mib() -> Vec<u32> {
    vec![16, 48]
}

fn contents() -> Vec<String> {
    ["counter", "text", "random"].map(str::to_owned).to_vec()
}

fn vcpus() -> Vec<u32> {
    vec![1, 2]
}

const fn slice_ms() -> u32 {
    3000
}

const fn memory_mib() -> u32 {
    128
}

/// What a guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) pages: u32,
    pub(super) set_mib: u32,
    pub(super) content: String,
    pub(super) vcpus: u32,
}

impl Load {
    /// As the guest is told.
    pub(super) fn dirty(&self) -> String {
        format!("random/{}:{}:25:{}", self.content, self.pages, self.set_mib)
    }

    pub(super) fn name(&self) -> String {
        format!(
            "{}-{}-{}MiB-{}vcpu",
            self.content, self.pages, self.set_mib, self.vcpus
        )
    }

    pub(super) fn parameters(&self) -> [(&'static str, Parameter); 4] {
        [
            ("dirty_pages", self.pages.into()),
            ("set_mib", self.set_mib.into()),
            ("content", (&self.content).into()),
            ("vcpus", self.vcpus.into()),
        ]
    }
}

/// What was seen of a load, by repetition.
pub(super) struct Seen {
    pub(super) load: Load,
    pub(super) free: Vec<Free>,
    pub(super) at: Vec<At>,
}

/// With epochs of one length.
pub(super) struct At {
    pub(super) epoch_ms: u32,
    pub(super) protected: Vec<Protected>,
    /// Why it could not be measured.
    pub(super) missed: Option<String>,
}

/// What was seen last, and how: measures that ask for the same share it.
struct Last {
    sweep: Sweep,
    effort: Effort,
    seen: Arc<Vec<Seen>>,
}

static LAST: Mutex<Option<Last>> = Mutex::new(None);

impl Sweep {
    pub(super) fn problem(&self) -> Option<String> {
        let empty = self.epoch_ms.is_empty()
            || self.pages.is_empty()
            || self.set_mib.is_empty()
            || self.contents.is_empty()
            || self.vcpus.is_empty();
        if empty {
            return Some("epoch_ms, pages, set_mib, contents and vcpus need a value each".to_owned());
        }
        let each = |key: &str, values: &[u32], least: u64, most: u64| {
            values
                .iter()
                .find_map(|value| outside(key, (*value).into(), least, most))
        };
        let sets_max = u64::from(self.memory_mib) / 2;
        each("epoch_ms", &self.epoch_ms, 1, 1000)
            .or_else(|| outside("memory_mib", self.memory_mib.into(), 64, 1024))
            .or_else(|| each("set_mib", &self.set_mib, 1, sets_max))
            .or_else(|| each("vcpus", &self.vcpus, 1, 4))
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 100, 600_000))
            .or_else(|| self.loads().iter().find_map(|load| dirty_problem(&load.dirty())))
    }

    /// Each load once.
    pub(super) fn loads(&self) -> Vec<Load> {
        let mut loads = Vec::new();
        for (v, vcpus) in self.vcpus.iter().enumerate() {
            for (p, pages) in self.pages.iter().enumerate() {
                for (s, set_mib) in self.set_mib.iter().enumerate() {
                    for (c, content) in self.contents.iter().enumerate() {
                        let others = [v, p, s, c].iter().filter(|place| **place > 0).count();
                        let load = Load {
                            pages: *pages,
                            set_mib: *set_mib,
                            content: content.clone(),
                            vcpus: *vcpus,
                        };
                        if (self.every || others <= 1) && !loads.contains(&load) {
                            loads.push(load);
                        }
                    }
                }
            }
        }
        loads
    }

    /// What there is to see, from the measure before if it asked for the same.
    pub(super) fn seen(&self, run: &Run) -> Result<Arc<Vec<Seen>>, Unable> {
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref()
            && (&last.sweep, last.effort) == (self, run.effort())
        {
            return Ok(Arc::clone(&last.seen));
        }
        let seen = Arc::new(self.look(run)?);
        *last = Some(Last {
            sweep: self.clone(),
            effort: run.effort(),
            seen: Arc::clone(&seen),
        });
        Ok(seen)
    }

    fn look(&self, run: &Run) -> Result<Vec<Seen>, Unable> {
        let (mut loads, mut lengths) = (self.loads(), self.epoch_ms.clone());
        if run.effort() == Effort::Shortest {
            loads.truncate(1);
            lengths.truncate(2);
        }
        let mut all: Vec<Seen> = loads
            .into_iter()
            .map(|load| Seen {
                load,
                free: Vec::new(),
                at: lengths
                    .iter()
                    .map(|epoch_ms| At {
                        epoch_ms: *epoch_ms,
                        protected: Vec::new(),
                        missed: None,
                    })
                    .collect(),
            })
            .collect();
        for repetition in 0..repetitions(run) {
            let mut stand: Option<(u32, Stand)> = None;
            for seen in &mut all {
                let vcpus = seen.load.vcpus;
                if stand.as_ref().is_none_or(|(of, _)| *of != vcpus) {
                    // The old lab goes before the new one comes: they have one name.
                    drop(stand.take());
                    run.say("starting a guest");
                    let machine = Machine {
                        memory_mib: self.memory_mib,
                        vcpus,
                        dirty: seen.load.dirty(),
                    };
                    stand = Some((vcpus, Stand::raise(&machine, run.seed())?));
                }
                let (_, stand) = stand.as_mut().expect("it was just raised");
                self.look_at(run, repetition, stand, seen)?;
            }
        }
        Ok(all)
    }

    fn look_at(&self, run: &Run, repetition: u32, stand: &mut Stand, seen: &mut Seen) -> Result<(), Unable> {
        let slice = scaled(run, self.slice_ms);
        let say = |what: &str| {
            run.tell(format!(
                "{}, {what}, {} of {}",
                seen.load.name(),
                repetition + 1,
                repetitions(run)
            ));
        };
        say("unprotected");
        stand.write(&seen.load.dirty())?;
        let free = match stand.free(slice) {
            Ok(free) => free,
            Err(Unable::Wrong(why)) => {
                for at in &mut seen.at {
                    at.missed = Some(format!("unprotected: {why}"));
                }
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        seen.free.push(free);
        for at in &mut seen.at {
            say(&format!("epochs of {} ms", at.epoch_ms));
            stand.protect(&format!("[epochs]\nlength = \"{}ms\"\n", at.epoch_ms))?;
            match stand.protected(slice) {
                Ok(protected) => at.protected.push(protected),
                // A guest that has no time left at this length says nothing of the other lengths.
                Err(Unable::Wrong(why)) => at.missed = Some(why),
                Err(error) => return Err(error),
            }
            stand.unprotect()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(text: &str) -> Sweep {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn each_setting_varies_alone_around_the_first_of_each_or_all_of_them_together() {
        let loads = sweep("").loads();
        assert_eq!(loads.len(), 7);
        assert_eq!(loads[0].dirty(), "random/counter:500:25:16");
        assert!(
            loads
                .iter()
                .all(|load| loads.iter().filter(|one| *one == load).count() == 1)
        );
        assert_eq!(sweep("every = true").loads().len(), 36);
    }

    #[test]
    fn what_cannot_be_measured_is_said_before() {
        assert_eq!(sweep("").problem(), None);
        for wrong in [
            "epoch_ms = []",
            "epoch_ms = [0]",
            "pages = [0]",
            "set_mib = [100]",
            "contents = ['verse']",
            "vcpus = [5]",
            "memory_mib = 32",
            "slice_ms = 1",
        ] {
            assert!(sweep(wrong).problem().is_some(), "{wrong}");
        }
    }
}
