//! `image.commit`: what the agent does with a checkpoint when its pages are decoded, against copying them once more.
//!
//! A real image in memory (a folder in /dev/shm, or the folder for temporary files where there is none). Each checkpoint changes pages
//! all over it, from one version to another and back, so that its digest is checked as it is for a guest.

use std::path::Path;

use romulus_image::{Expected, HostFiles, Image, ImageError, Limits, device_state_digest};
use romulus_page_codec::{ImageDigest, Page, page_digest};
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, RamBlock, RamLayout, Session, Term, VmId};
use serde::Deserialize;

use super::codec::copy;
use super::{Measure, outside};
use crate::contents::{distinct, noise};
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::Unit;

/// As a KVM guest of one vCPU has it.
const STATE_BYTES: usize = 12_000;
const SESSION: Session = Session(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Commit {
    /// Pages of a checkpoint, each number two rows.
    #[serde(default = "pages")]
    pages: Vec<u32>,
    /// The guest's memory.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

fn pages() -> Vec<u32> {
    vec![64, 1024, 4096]
}

const fn memory_mib() -> u32 {
    64
}

const fn rounds() -> u32 {
    20
}

impl Measure for Commit {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let shm = Path::new("/dev/shm");
        let folder = if shm.is_dir() {
            tempfile::tempdir_in(shm)
        } else {
            tempfile::tempdir()
        };
        let folder = folder.map_err(Unable::failed("making a folder"))?;
        for pages in &self.pages {
            let mut random = run.random();
            let all = u64::from(self.memory_mib) << 20 >> PAGE_BYTES.trailing_zeros();
            let changing = distinct(&mut random, (*pages).into(), all);
            let versions = [0, 1].map(|_| changing.iter().map(|_| noise(&mut random)).collect());
            let dir = folder.path().join(pages.to_string());
            std::fs::create_dir(&dir).map_err(Unable::failed("making a folder"))?;
            let mut guest = Guest::new(&dir, u64::from(self.memory_mib) << 20, changing, versions)?;
            let mut into = guest.versions[0].clone();
            let mut failed = None;
            let mut time = |work: &mut dyn FnMut() -> Result<(), ImageError>| {
                timed(|| failed = failed.take().or(work().err()))
            };
            let [copying, committing, applying] =
                run.in_turn(&format!("{pages} pages"), self.rounds, |one| {
                    if one == 0 {
                        return Ok(copy(&guest.versions[0], &mut into));
                    }
                    let commit_ns = time(&mut || guest.commit());
                    let apply_ns = time(&mut || guest.image.apply());
                    Ok(if one == 1 { commit_ns } else { apply_ns })
                })?;
            if let Some(error) = failed {
                return Err(Unable::failed("committing a checkpoint")(error));
            }
            for (what, timings) in [("commit", &committing), ("apply", &applying)] {
                let at = [("what", what.into()), ("pages", (*pages).into())];
                if let Some((value, reference)) = timings.figure(Unit::US).zip(copying.figure(Unit::US)) {
                    let finding = Finding {
                        case: format!("{what}/{pages}"),
                        unit: Unit::US.name,
                        value,
                        reference: Some(("memcpy of the pages".to_owned(), reference)),
                        note: None,
                    };
                    run.found_at(at, finding);
                }
            }
            guest
                .image
                .remove()
                .map_err(Unable::failed("removing the image"))?;
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        let mut pages = self.pages.iter();
        outside("memory_mib", self.memory_mib.into(), 1, 1 << 14)
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
            .or_else(|| pages.find_map(|pages| outside("pages", (*pages).into(), 1, 1 << 16)))
    }
}

/// A guest that changes between two versions, and its image.
struct Guest {
    image: Image<HostFiles>,
    /// Pages that change.
    changing: Vec<PageIndex>,
    versions: [Vec<Page>; 2],
    /// Of these pages.
    digests: [Vec<Digest>; 2],
    epoch: Epoch,
    digest: ImageDigest,
    state: Vec<u8>,
}

impl Guest {
    /// With the first of the versions committed and applied.
    fn new(dir: &Path, bytes: u64, changing: Vec<u64>, versions: [Vec<Page>; 2]) -> Result<Self, Unable> {
        let block = RamBlock {
            name: "ram".into(),
            bytes,
        };
        let layout = RamLayout::new(vec![block]).map_err(Unable::failed("laying out the memory"))?;
        let vm = VmId::new("bench").map_err(Unable::failed("naming the image"))?;
        let made = Image::create_in(dir, &vm, layout, Limits::default());
        let changing: Vec<PageIndex> = changing.into_iter().map(PageIndex).collect();
        let digests = [0, 1].map(|version: usize| {
            let pages = changing.iter().zip(&versions[version]);
            pages.map(|(index, page)| page_digest(*index, page)).collect()
        });
        let mut guest = Self {
            image: made.map_err(Unable::failed("making an image"))?,
            changing,
            versions,
            digests,
            epoch: Epoch::NONE,
            digest: ImageDigest::ZERO,
            state: (0..=u8::MAX).cycle().take(STATE_BYTES).collect(),
        };
        guest.fill().map_err(Unable::failed("filling an image"))?;
        Ok(guest)
    }

    fn fill(&mut self) -> Result<(), ImageError> {
        self.image.begin_sync(SESSION)?;
        let pages = self.changing.iter().zip(&self.versions[0]);
        for ((index, page), digest) in pages.zip(&self.digests[0]) {
            self.image.sync_page(*index, page)?;
            self.digest.replace(Digest(0), *digest);
        }
        self.commit()?;
        self.image.apply()
    }

    /// Stages the next version, as the agent does, and commits it. The first commit says what the image holds already.
    fn commit(&mut self) -> Result<(), ImageError> {
        let first = self.epoch == Epoch::NONE;
        self.epoch = self.epoch.next();
        let [old, new] = if self.epoch.0.is_multiple_of(2) {
            [0, 1]
        } else {
            [1, 0]
        };
        let mut pages_digest = ImageDigest::ZERO;
        self.image.begin(SESSION, self.epoch)?;
        if !first {
            let pages = self.changing.iter().zip(&self.versions[new]);
            let digests = self.digests[old].iter().zip(&self.digests[new]);
            for ((index, page), (old, new)) in pages.zip(digests) {
                self.image.stage_page(*index, page)?;
                pages_digest.replace(Digest(0), *new);
                self.digest.replace(*old, *new);
            }
        }
        self.image.stage_device_state(&self.state)?;
        self.image.verify_and_commit(&Expected {
            session: SESSION,
            epoch: self.epoch,
            term: Term(1),
            page_count: if first { 0 } else { self.changing.len() as u64 },
            pages_digest: pages_digest.digest(),
            device_state_bytes: self.state.len() as u64,
            device_state_digest: device_state_digest(&self.state),
            image_digest: self.digest.digest(),
            first,
        })
    }
}
