//! A guest that is measured, in a VMM of its own.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use romulus_guest_core::abi::{PROGRESS, Progress};
use romulus_host_sys::{SharedView, monotonic_ns};
use romulus_vmm_attach::client::{Attachment, Client};
use tempfile::TempDir;

use super::Mode;
use crate::run::Unable;

/// From its start to its socket, and to the guest's first sign of life.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The guest writes its progress each millisecond; so long without it and it does not live.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_micros(50);

/// Which machine.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) memory_mib: u32,
    pub(super) vcpus: u32,
    pub(super) mode: Mode,
    /// The guest's command line.
    pub(super) words: String,
}

/// What a guest had done by a moment.
#[derive(Clone, Copy, Debug)]
pub(in crate::measures) struct Done {
    /// The moment, on this host's CLOCK_MONOTONIC, in nanoseconds.
    pub(in crate::measures) at_ns: u64,
    pub(in crate::measures) progress: Progress,
}

/// A running VMM; ended when dropped.
pub(super) struct Guest {
    process: Child,
    pub(super) socket: PathBuf,
    memory: SharedView,
    folder: TempDir,
}

/// Says what to do where there is no KVM.
pub(in crate::measures) fn need_kvm() -> Result<(), Unable> {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|error| Unable::Missing {
        what: format!("/dev/kvm cannot be used ({error})"),
        remedy: "load kvm_intel, kvm_amd or kvm_pvm, allow nested virtualisation, or join the group kvm"
            .to_owned(),
    })
}

/// This program as the test VMM, to which arguments are added.
pub(super) fn testbed() -> Result<Command, Unable> {
    let exe = std::env::current_exe().map_err(Unable::failed("finding this program"))?;
    let mut command = Command::new(exe);
    command.arg("testbed");
    Ok(command)
}

impl Guest {
    pub(super) fn start(wanted: &Wanted) -> Result<Self, Unable> {
        Self::start_with(wanted, &[])
    }

    /// With further arguments of the test VMM.
    pub(super) fn start_with(wanted: &Wanted, arguments: &[&str]) -> Result<Self, Unable> {
        need_kvm()?;
        let folder = tempfile::Builder::new()
            .prefix("romulus-bench-")
            .tempdir()
            .map_err(Unable::failed("making a folder"))?;
        let (socket, errors) = (folder.path().join("attach"), folder.path().join("errors"));
        let stderr = File::create(&errors).map_err(Unable::failed("making a file"))?;
        let mut process = testbed()?
            .args(["run", "--name", "bench", "--serial", "none"])
            .args(["--memory", &wanted.memory_mib.to_string()])
            .args(["--vcpus", &wanted.vcpus.to_string()])
            .args(["--tracking", wanted.mode.name()])
            .args(["--cmdline", &wanted.words])
            .args(arguments)
            .arg("--attach")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(Unable::failed("starting the test VMM"))?;
        let mapped = connected(&mut process, &socket, &errors).and_then(|attachment| all_memory(&attachment));
        match mapped {
            Ok(memory) => Ok(Self {
                process,
                socket,
                memory,
                folder,
            }),
            Err(error) => {
                end(&mut process);
                Err(error)
            }
        }
    }

    /// What it has done, right after it has said so. Needs `progress=on`.
    pub(super) fn done(&mut self) -> Result<Done, Unable> {
        let before = self.look()?;
        let deadline = Instant::now() + SILENCE_LIMIT;
        loop {
            let at_ns = monotonic_ns();
            let now = self.look()?;
            if let Some(progress) = now
                && now != before
            {
                return Ok(Done { at_ns, progress });
            }
            if Instant::now() > deadline {
                return Err(self.silent());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until the dirtier has completed a period, and returns what was done by then.
    pub(super) fn next_round(&mut self, after: u64) -> Result<Progress, Unable> {
        let deadline = Instant::now() + SILENCE_LIMIT;
        loop {
            match self.look()? {
                Some(progress) if progress.dirty_rounds > after => return Ok(progress),
                _ if Instant::now() > deadline => return Err(self.silent()),
                _ => std::thread::sleep(POLL),
            }
        }
    }

    fn look(&self) -> Result<Option<Progress>, Unable> {
        progress_in(&self.memory)
    }

    fn silent(&mut self) -> Unable {
        Unable::Wrong(format!(
            "the guest does not go on: {}",
            last_words(&mut self.process, &self.folder.path().join("errors"))
        ))
    }
}

/// What a guest has done, as it stands in its memory; `None` while it is being written.
pub(in crate::measures) fn progress_in(memory: &SharedView) -> Result<Option<Progress>, Unable> {
    let mut bytes = [0; Progress::BYTES];
    memory
        .copy_to(PROGRESS, &mut bytes)
        .map_err(Unable::failed("reading the guest's progress"))?;
    Ok(Progress::from_bytes(&bytes))
}

impl Drop for Guest {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

fn end(process: &mut Child) {
    let _ = process.kill();
    let _ = process.wait();
}

fn connected(process: &mut Child, socket: &Path, errors: &Path) -> Result<Attachment, Unable> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        match Client::connect(socket, "bench", START_LIMIT) {
            Ok((_, attachment)) => return Ok(attachment),
            Err(error) if Instant::now() > deadline => {
                return Err(Unable::failed("connecting to the test VMM")(error));
            }
            Err(_) => {}
        }
        if matches!(process.try_wait(), Ok(Some(_))) {
            return Err(Unable::Wrong(format!(
                "the test VMM ended: {}",
                last_words(process, errors)
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Maps the guest's memory (what is under the hole), and has the kernel provide all of it: a guest that has run for long has
/// written every page once, and what a page's first touch costs is no part of a checkpoint.
pub(in crate::measures) fn all_memory(attachment: &Attachment) -> Result<SharedView, Unable> {
    let machine = attachment.welcome.machine.as_ref();
    let first = machine.and_then(|machine| machine.regions.first());
    let found = first
        .zip(attachment.regions.first())
        .filter(|(region, _)| region.gpa == 0);
    let (region, file) =
        found.ok_or_else(|| Unable::Wrong("the VMM told of no memory at address 0".to_owned()))?;
    let memory = SharedView::map(file, region.fd_offset, region.bytes)
        .map_err(Unable::failed("mapping the guest's memory"))?;
    memory.populate(0, region.bytes);
    Ok(memory)
}

/// What a process said before it ended, if it did.
fn last_words(process: &mut Child, errors: &Path) -> String {
    let text = std::fs::read_to_string(errors).unwrap_or_default();
    let last = text.lines().last().unwrap_or("it said nothing");
    match process.try_wait() {
        Ok(Some(status)) => format!("{status}; {last}"),
        _ => format!("it runs; {last}"),
    }
}
