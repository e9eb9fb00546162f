//! The parts of a pause, each alone: the same machine as the test VMM's inside of this process, with nobody between us and KVM.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use clap::Parser;
use romulus_guest_core::abi::{PROGRESS, Progress};
use romulus_host_sys::{SharedView, priority, resident_buffer};
use romulus_testbed::cli::{Cli, Command};
use romulus_testbed::machine::Devices;
use romulus_types::PAGE_BYTES;
use romulus_vmm_attach::kvm::blob::{Blob, BlobWriter};
use romulus_vmm_attach::kvm::{KvmParts, Moment};

use super::guest::{Wanted, need_kvm};
use crate::run::{Unable, timed};

const STOP_LIMIT: Duration = Duration::from_secs(60);
const ROUND_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_micros(50);

/// A machine that stands still between two samples.
pub(super) struct Alone {
    parts: KvmParts<Devices>,
    memory: SharedView,
    state: Vec<u8>,
    into: Vec<u8>,
}

/// What each part took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PartsNs {
    pub(super) kick: u64,
    pub(super) harvest: u64,
    pub(super) state: u64,
    pub(super) copy: u64,
    pub(super) dirty_pages: u64,
}

impl PartsNs {
    pub(super) fn sum(&self) -> u64 {
        self.kick + self.harvest + self.state + self.copy
    }
}

impl Alone {
    /// Builds the machine with its guest, tracking armed, and lets it run for the first time.
    pub(super) fn build(wanted: &Wanted) -> Result<Self, Unable> {
        let mut alone = Self::build_still(wanted)?;
        alone
            .parts
            .tracker
            .arm()
            .map_err(Unable::failed("starting to track"))?;
        alone.parts.vcpus.run();
        Ok(alone)
    }

    /// Builds the machine; it never runs.
    pub(super) fn build_still(wanted: &Wanted) -> Result<Self, Unable> {
        need_kvm()?;
        let words = [
            "testbed".to_owned(),
            "run".to_owned(),
            format!("--memory={}", wanted.memory_mib),
            format!("--vcpus={}", wanted.vcpus),
            format!("--tracking={}", wanted.mode.name()),
            format!("--cmdline={}", wanted.words),
        ];
        let cli = Cli::try_parse_from(words.map(OsString::from))
            .map_err(Unable::failed("giving the test VMM its settings"))?;
        let Command::Run(options) = cli.command else {
            return Err(Unable::Wrong(
                "the test VMM took `run` for something else".to_owned(),
            ));
        };
        let parts =
            romulus_testbed::run::build(&options).map_err(Unable::failed("building the machine alone"))?;
        let bytes = u64::from(wanted.memory_mib) << 20;
        let first = parts.ram.regions().iter().zip(parts.ram.files()).next();
        let (_, file) = first
            .filter(|(region, _)| region.gpa == 0 && region.bytes == bytes)
            .ok_or_else(|| Unable::Wrong("the machine's memory is not in one piece".to_owned()))?;
        let memory = SharedView::map(file, 0, bytes).map_err(Unable::failed("mapping the guest's memory"))?;
        memory.populate(0, bytes);
        Ok(Self {
            parts,
            memory,
            state: Vec::new(),
            into: Vec::new(),
        })
    }

    /// Lets the guest run until `enough` says so of its progress, or for `at_least` when nothing is said of it.
    pub(super) fn let_run(
        &mut self,
        at_least: Duration,
        mut enough: impl FnMut(Progress) -> bool,
    ) -> Result<(), Unable> {
        let begun = Instant::now();
        self.parts.vcpus.run();
        std::thread::sleep(at_least);
        loop {
            let mut bytes = [0; Progress::BYTES];
            self.memory
                .copy_to(PROGRESS, &mut bytes)
                .map_err(Unable::failed("reading the guest's progress"))?;
            if Progress::from_bytes(&bytes).is_some_and(&mut enough) {
                return Ok(());
            }
            if begun.elapsed() > ROUND_LIMIT {
                return Err(Unable::Wrong(
                    "the guest in this process does not go on".to_owned(),
                ));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Lets the guest, which says nothing, run for so long.
    pub(super) fn let_sleep(&mut self, duration: Duration) {
        self.parts.vcpus.run();
        std::thread::sleep(duration);
    }

    /// Stops the guest, and takes each part's time, with the priority of the replicator's capture thread. It stands still
    /// afterwards.
    pub(super) fn take_apart(&mut self) -> Result<PartsNs, Unable> {
        priority::raise();
        let parts = self.each_part();
        priority::lower();
        parts
    }

    fn each_part(&mut self) -> Result<PartsNs, Unable> {
        let stopped = self
            .parts
            .vcpus
            .stop(STOP_LIMIT)
            .map_err(Unable::failed("stopping the vCPUs"))?;
        let bitmap = self.parts.ram.bitmap().clone();
        let mut done = Ok(());
        let harvest = timed(|| done = self.parts.tracker.harvest(Moment::Paused, &bitmap));
        done.map_err(Unable::failed("harvesting dirty pages"))?;
        let mut saved = Ok(());
        let state = timed(|| saved = self.save());
        saved?;
        let mut pages: Vec<u64> = Vec::new();
        for (word, first) in (0..bitmap.pages().div_ceil(64)).zip((0_u64..).step_by(64)) {
            let word = usize::try_from(word).map_err(Unable::failed("counting words"))?;
            let bits = bitmap.take(word);
            pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + bit));
        }
        Ok(PartsNs {
            kick: stopped.kick_ns,
            harvest,
            state,
            copy: self.copy(&pages)?,
            dirty_pages: pages.len() as u64,
        })
    }

    fn save(&mut self) -> Result<(), Unable> {
        let parts = &mut self.parts;
        let vcpus = u16::try_from(parts.vcpus.count()).map_err(Unable::failed("counting vCPUs"))?;
        let mut out = BlobWriter::begin(&mut self.state, vcpus);
        for index in 0..vcpus {
            let (saver, vm) = (&mut parts.saver, &parts.vm);
            let delivered = parts.vcpus.timer_delivered(index.into());
            parts
                .vcpus
                .with(index.into(), |fd| {
                    saver.save_vcpu(vm, index, fd, delivered, &mut out)
                })
                .map_err(Unable::failed("reaching a vCPU"))?
                .map_err(Unable::failed("saving a vCPU"))?;
        }
        parts
            .saver
            .save_vm(&parts.vm, &mut out)
            .map_err(Unable::failed("saving the VM"))?;
        out.finish().map_err(Unable::failed("saving the machine"))
    }

    fn copy(&mut self, pages: &[u64]) -> Result<u64, Unable> {
        if self.into.len() < pages.len() * PAGE_BYTES {
            self.into = resident_buffer(2 * pages.len() * PAGE_BYTES);
        }
        let mut copied = Ok(());
        let time_ns = timed(|| {
            for (page, into) in pages.iter().zip(self.into.chunks_mut(PAGE_BYTES)) {
                let done = self.memory.copy_to(page * PAGE_BYTES as u64, into);
                copied = std::mem::replace(&mut copied, Ok(())).and(done);
            }
        });
        copied.map_err(Unable::failed("copying pages"))?;
        Ok(time_ns)
    }

    /// How long it takes to give the machine, which has never run, a saved state.
    pub(super) fn restore(&mut self, state: &[u8]) -> Result<u64, Unable> {
        let blob = Blob::parse(state).map_err(Unable::failed("reading a saved state"))?;
        let parts = &mut self.parts;
        let mut done = Ok(());
        let time_ns = timed(|| {
            done = (|| {
                let step = parts
                    .saver
                    .restore_clock(&parts.vm, &blob)
                    .map_err(Unable::failed("restoring the clock"))?;
                let mut shared = Vec::new();
                for index in 0..blob.vcpus() {
                    let pages = parts
                        .vcpus
                        .with(index.into(), |fd| {
                            parts.saver.restore_vcpu(&parts.vm, index, fd, &blob, &step)
                        })
                        .map_err(Unable::failed("reaching a vCPU"))?
                        .map_err(Unable::failed("restoring a vCPU"))?;
                    shared.push(pages);
                }
                parts
                    .saver
                    .restore_chips(&parts.vm, &blob)
                    .map_err(Unable::failed("restoring the chips"))?;
                for (index, pages) in shared.iter().enumerate() {
                    parts
                        .vcpus
                        .with(index, |fd| parts.saver.share_pages(fd, pages))
                        .map_err(Unable::failed("reaching a vCPU"))?
                        .map_err(Unable::failed("switching a vCPU's clock on"))?;
                }
                Ok(())
            })();
        });
        done.map(|()| time_ns)
    }
}
