//! A Linux in a stock QEMU under TCG, as the end-to-end tests boot it, without their lab.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use romulus_e2e::{Kernel, Paths};
use romulus_host_sys::child::die_with_thread;
use romulus_host_sys::read_maps;
use romulus_hypervisor::qemu::source::{AttachOptions, GuardianProgram, QemuSource};
use romulus_hypervisor::source::GuestSource;
use tempfile::TempDir;

use crate::advise::attach::GUARDIAN;
use crate::run::Unable;

const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Nothing is cut short for what is measured.
const PAUSE_LIMIT_NS: u64 = 10_000_000_000;

/// Programs that the end-to-end tests' Linux can have at work, as its tool knows them. After each round of one it says `work PROGRAM UNITS`.
pub(super) const PROGRAMS: [&str; 4] = ["sqlite", "compile", "redis-benchmark", "stress-ng"];

/// Which machine.
pub(super) struct Wanted<'a> {
    pub(super) memory_mib: u32,
    /// All of its memory is there from the start.
    pub(super) populated: bool,
    /// It has those programs.
    pub(super) programs: bool,
    /// A tap in the namespace of the calling thread.
    pub(super) tap: Option<&'a str>,
    /// What its kernel, and with that its workload, is told.
    pub(super) kernel_words: String,
}

/// A QEMU, killed when dropped.
pub(super) struct Guest {
    process: Child,
    folder: TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Guest {
    /// Starts it. The guest is not up yet.
    pub(super) fn boot(wanted: &Wanted<'_>) -> Result<Self, Unable> {
        let paths = Paths::here();
        let kernel = paths.kernel(Kernel::Cloud);
        let initramfs = if wanted.programs {
            paths.initramfs_with_programs()
        } else {
            paths.initramfs(Kernel::Cloud)
        };
        if !kernel.exists() || !initramfs.exists() {
            return Err(Unable::Missing {
                what: format!("{} has no guest", paths.assets.display()),
                remedy: "run cargo xtask setup".to_owned(),
            });
        }
        let folder = tempfile::Builder::new()
            .prefix("romulus-bench-")
            .tempdir()
            .map_err(Unable::failed("making a folder"))?;
        let memory_mib = wanted.memory_mib;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-display", "none"])
            .args(["-m", &memory_mib.to_string()]);
        if wanted.populated {
            command
                .arg("-object")
                .arg(format!(
                    "memory-backend-ram,id=ram0,size={memory_mib}M,prealloc=on"
                ))
                .args(["-M", "q35,accel=tcg,memory-backend=ram0"]);
        } else {
            command.args(["-M", "q35,accel=tcg"]);
        }
        if let Some(tap) = wanted.tap {
            command
                .args(["-device", "virtio-net-pci,netdev=net0"])
                .arg("-netdev")
                .arg(format!("tap,id=net0,ifname={tap},script=no,downscript=no"));
        }
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        command
            .arg("-append")
            .arg(format!("console=ttyS0 quiet panic=-1 {}", wanted.kernel_words));
        command
            .arg("-serial")
            .arg(format!("file:{}", folder.path().join("console").display()))
            .arg("-qmp")
            .arg(format!(
                "unix:{},server=on,wait=off",
                folder.path().join("qmp").display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // It must not outlive the run that measures it.
        let process = die_with_thread(&mut command)
            .spawn()
            .map_err(Unable::failed("starting qemu-system-x86_64"))?;
        Ok(Self { process, folder })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits until the guest has said so on its console.
    pub(super) fn wait_for_word(&self, word: &str) -> Result<(), Unable> {
        let begun = Instant::now();
        while !self.console().contains(word) {
            if begun.elapsed() > BOOT_LIMIT {
                return Err(Unable::Wrong("the guest in QEMU did not boot".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Waits until a program at work in the guest has ended another round.
    pub(super) fn wait_for_round(&self, program: &str) -> Result<(), Unable> {
        let said = || units_said(&self.console(), program).map_err(Unable::Wrong);
        let (begun, before) = (Instant::now(), said()?);
        while said()? == before {
            if begun.elapsed() > BOOT_LIMIT {
                return Err(Unable::Wrong(format!("{program} in the guest does not go on")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// What the guest has said so far.
    fn console(&self) -> String {
        let bytes = std::fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Attaches, and begins to track what is written.
    pub(super) fn attach(&self) -> Result<QemuSource, Unable> {
        let exe = std::env::current_exe().map_err(Unable::failed("finding this program"))?;
        let guardian = GuardianProgram {
            exe,
            args: vec![GUARDIAN.to_owned()],
        };
        let qmp: PathBuf = self.folder.path().join("qmp");
        let mut options = AttachOptions::new(&qmp, guardian);
        self.folder.path().clone_into(&mut options.fifo_dir);
        options
            .allow
            .disposable
            .extend(["serial0", "net0"].map(str::to_owned));
        options.pause_limit_ns = PAUSE_LIMIT_NS;
        let mut source = QemuSource::attach(options).map_err(Unable::failed("attaching to QEMU"))?;
        source
            .bootstrap()
            .map_err(Unable::failed("reading the machine"))?;
        source.arm().map_err(Unable::failed("starting to track"))?;
        Ok(source)
    }

    /// Where its main memory is.
    pub(super) fn memory(&self, memory_mib: u32) -> Result<(u64, u64), Unable> {
        let maps = read_maps(self.pid()).map_err(Unable::failed("reading QEMU's memory map"))?;
        let bytes = u64::from(memory_mib) << 20;
        let found = maps.iter().find(|mapping| mapping.bytes() >= bytes);
        found
            .map(|mapping| (mapping.start, mapping.start + bytes))
            .ok_or_else(|| Unable::Wrong("QEMU has no mapping as large as its memory".to_owned()))
    }
}

/// What a program at work said last on a guest's console, in a whole line; `None` before its first round.
///
/// # Errors
/// The words of one that went wrong, or of another one.
pub(super) fn units_said(console: &str, program: &str) -> Result<Option<u64>, String> {
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    let Some(words) = whole
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("work "))
    else {
        return Ok(None);
    };
    words
        .strip_prefix(program)
        .and_then(|units| units.trim().parse().ok())
        .map(Some)
        .ok_or_else(|| format!("the guest said: work {words}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_line_of_a_program_counts_and_a_bad_one_is_an_error() {
        let units = |console: &str| units_said(console, "sqlite");
        assert_eq!(units("guest: ready wl=redis,work:sqlite\r\n"), Ok(None));
        assert_eq!(
            units("work sqlite 25\r\nwork sqlite 50\r\nwork sql"),
            Ok(Some(50))
        );
        assert_eq!(units("work sqlite 25\r\nwork sqlite 5"), Ok(Some(25)));
        assert!(units("work sqlite 25\r\nwork BAD sqlite: lost\r\n").is_err());
        assert!(units("work compile 3\r\n").is_err());
    }
}
