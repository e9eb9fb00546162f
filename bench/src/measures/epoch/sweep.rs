//! The sweep: under each load the guest works alone, and then protected with epochs of each length.
//!
//! Done once for all measures that ask for the same.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use super::load::{Kind, Load};
use super::stand::{Free, Protected, Stand};
use super::task::{Machine, Task};
use super::{repetitions, scaled};
use crate::measures::kvm::dirty_problem;
use crate::measures::outside;
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
    /// Programs that a Linux under QEMU has at work, each a case; it is then this guest, and not the one that writes pages.
    #[serde(default)]
    workloads: Vec<String>,
    #[serde(default = "vcpus")]
    vcpus: Vec<u32>,
    /// Memory of the replicator for previous versions of pages; with none, each page is encoded alone.
    #[serde(default = "delta_memory_mib")]
    delta_memory_mib: Vec<u32>,
    /// Every combination; otherwise the first of each list, and each of the others alone in its place.
    #[serde(default)]
    every: bool,
    /// How long the guest is watched in each case.
    #[serde(default = "slice_ms")]
    slice_ms: u32,
    /// Of the guest.
    memory_mib: Option<u32>,
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

/// As a replicator has it, and none.
fn delta_memory_mib() -> Vec<u32> {
    vec![64, 0]
}

const fn slice_ms() -> u32 {
    3000
}

const MEMORY_MIB: u32 = 128;
/// A Linux with its programs needs more.
const LINUX_MEMORY_MIB: u32 = 256;

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
            || self.vcpus.is_empty()
            || self.delta_memory_mib.is_empty();
        if empty {
            return Some(
                "epoch_ms, pages, set_mib, contents, vcpus and delta_memory_mib need a value each".to_owned(),
            );
        }
        let each = |key: &str, values: &[u32], least: u64, most: u64| {
            values
                .iter()
                .find_map(|value| outside(key, (*value).into(), least, most))
        };
        each("epoch_ms", &self.epoch_ms, 1, 1000)
            .or_else(|| each("vcpus", &self.vcpus, 1, 4))
            .or_else(|| each("delta_memory_mib", &self.delta_memory_mib, 0, 4096))
            .or_else(|| outside("slice_ms", self.slice_ms.into(), 100, 600_000))
            .or_else(|| {
                if self.workloads.is_empty() {
                    let sets_max = u64::from(self.memory_mib()) / 2;
                    outside("memory_mib", self.memory_mib().into(), 64, 1024)
                        .or_else(|| each("set_mib", &self.set_mib, 1, sets_max))
                        .or_else(|| self.kinds().iter().find_map(|(_, kind)| self.dirty_problem(kind)))
                } else {
                    self.linux_problem()
                }
            })
    }

    fn dirty_problem(&self, kind: &Kind) -> Option<String> {
        match self.load(kind, 0, 0).task() {
            Task::Dirty(dirty) => dirty_problem(&dirty),
            Task::Program(_) => None,
        }
    }

    fn linux_problem(&self) -> Option<String> {
        let others = self.pages != pages() || self.set_mib != set_mib() || self.contents != contents();
        if others {
            return Some("pages, set_mib and contents are of a guest without workloads".to_owned());
        }
        outside("memory_mib", self.memory_mib().into(), 192, 4096)
            .or_else(|| self.workloads.iter().find_map(|program| Task::problem(program)))
    }

    fn memory_mib(&self) -> u32 {
        let usual = if self.workloads.is_empty() {
            MEMORY_MIB
        } else {
            LINUX_MEMORY_MIB
        };
        self.memory_mib.unwrap_or(usual)
    }

    /// Each load once.
    pub(super) fn loads(&self) -> Vec<Load> {
        let mut loads = Vec::new();
        for v in 0..self.vcpus.len() {
            for (others, kind) in self.kinds() {
                for d in 0..self.delta_memory_mib.len() {
                    let others = others + [v, d].iter().filter(|place| **place > 0).count();
                    let load = self.load(&kind, v, d);
                    if (self.every || others <= 1) && !loads.contains(&load) {
                        loads.push(load);
                    }
                }
            }
        }
        loads
    }

    fn load(&self, kind: &Kind, vcpus: usize, deltas: usize) -> Load {
        Load {
            kind: kind.clone(),
            vcpus: self.vcpus[vcpus],
            delta_memory_mib: self.delta_memory_mib[deltas],
        }
    }

    /// What a guest does in any of the loads, and how many of its settings are not the first of their list. A program has one setting, its
    /// name.
    fn kinds(&self) -> Vec<(usize, Kind)> {
        if !self.workloads.is_empty() {
            let programs = self.workloads.iter().enumerate();
            return programs
                .map(|(place, program)| (usize::from(place > 0), Kind::Program(program.clone())))
                .collect();
        }
        let mut kinds = Vec::new();
        for (p, pages) in self.pages.iter().enumerate() {
            for (s, set_mib) in self.set_mib.iter().enumerate() {
                for (c, content) in self.contents.iter().enumerate() {
                    let others = [p, s, c].iter().filter(|place| **place > 0).count();
                    let kind = Kind::Pages {
                        pages: *pages,
                        set_mib: *set_mib,
                        content: content.clone(),
                    };
                    kinds.push((others, kind));
                }
            }
        }
        kinds
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
            let mut stand: Option<(Load, Stand)> = None;
            for seen in &mut all {
                let load = &seen.load;
                if stand.as_ref().is_none_or(|(of, _)| !load.has_guest_of(of)) {
                    // The old lab goes before the new one comes: they have one name.
                    drop(stand.take());
                    run.say("starting a guest");
                    let machine = Machine {
                        memory_mib: self.memory_mib(),
                        vcpus: load.vcpus,
                        task: load.task(),
                    };
                    stand = Some((load.clone(), Stand::raise(&machine, run.seed())?));
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
        if let Task::Dirty(dirty) = seen.load.task() {
            stand.write(&dirty)?;
        }
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
            stand.protect(&seen.load.settings(at.epoch_ms))?;
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
        assert_eq!(loads.len(), 8);
        assert_eq!(
            loads[0].task(),
            Task::Dirty("random/counter:500:25:16".to_owned())
        );
        assert!(
            loads
                .iter()
                .all(|load| loads.iter().filter(|one| *one == load).count() == 1)
        );
        assert_eq!(sweep("every = true").loads().len(), 72);
    }

    #[test]
    fn programs_of_a_linux_stand_in_the_place_of_pages() {
        let linux = sweep("workloads = ['redis', 'sqlite']\nvcpus = [1, 2]");
        let names: Vec<String> = linux.loads().iter().map(Load::name).collect();
        assert_eq!(
            names,
            [
                "linux-redis-1vcpu",
                "linux-redis-1vcpu-no-deltas",
                "linux-sqlite-1vcpu",
                "linux-redis-2vcpu"
            ]
        );
        assert_eq!((linux.problem(), linux.memory_mib()), (None, 256));
        assert_eq!(sweep("").memory_mib(), 128);
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
            "delta_memory_mib = []",
            "workloads = ['emacs']",
            "workloads = ['sqlite']\npages = [7]",
            "workloads = ['sqlite']\nmemory_mib = 64",
            "memory_mib = 32",
            "slice_ms = 1",
        ] {
            assert!(sweep(wrong).problem().is_some(), "{wrong}");
        }
    }
}
