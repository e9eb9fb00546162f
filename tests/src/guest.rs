//! The guest: a stock QEMU, started as any operator would, with nothing of ours on its command line.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal};

use crate::lab::{wait_for, word};
use crate::netns::{GUEST_IP, GUEST_IP6, Host, TAP};
use crate::resp::Redis;
use crate::{Lab, Process};

/// The guest's Ethernet address.
pub const MAC: &str = "52:54:00:77:00:02";
/// The port of its redis.
pub const REDIS_PORT: u16 = 6379;

/// How the guest's memory is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Plain `-m`: private anonymous memory.
    Plain,
    /// A shared memfd, as libvirt gives guests that share memory.
    Memfd,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// `tcg` or `kvm`.
    pub accel: String,
    /// The machine type.
    pub machine: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// How the memory is made.
    pub memory: Memory,
    /// Virtual processors.
    pub vcpus: u32,
    /// What runs in the guest; see `tests/guest/init`.
    pub workload: String,
    /// Whether the guest steers its clock by the RTC.
    pub clock_remedy: bool,
    /// Give it a second monitor, as an operator may, so that a test can ask beside the replicator.
    pub second_monitor: bool,
    /// Leave out QEMU's default devices.
    pub no_defaults: bool,
    /// Further arguments of QEMU.
    pub extra: Vec<String>,
}

impl Default for GuestConfig {
    fn default() -> GuestConfig {
        GuestConfig {
            accel: "tcg".to_owned(),
            machine: "q35".to_owned(),
            memory_mib: 256,
            memory: Memory::Plain,
            vcpus: 1,
            workload: "redis".to_owned(),
            clock_remedy: false,
            second_monitor: false,
            no_defaults: true,
            extra: Vec::new(),
        }
    }
}

impl GuestConfig {
    /// QEMU's command line, for a guest on the primary.
    #[must_use]
    pub fn argv(&self, lab: &Lab) -> Vec<String> {
        let mut machine = format!("{},accel={}", self.machine, self.accel);
        let mut argv = vec!["qemu-system-x86_64".to_owned()];
        let mut add = |words: &[&str]| argv.extend(words.iter().map(|word| (*word).to_owned()));
        add(&["-name", "demo", "-display", "none"]);
        if self.no_defaults {
            add(&["-nodefaults"]);
        }
        if self.memory == Memory::Memfd {
            machine.push_str(",memory-backend=ram0");
            add(&[
                "-object",
                &format!("memory-backend-memfd,id=ram0,size={}M,share=on", self.memory_mib),
            ]);
        }
        add(&[
            "-M",
            &machine,
            "-m",
            &self.memory_mib.to_string(),
            "-smp",
            &self.vcpus.to_string(),
        ]);
        add(&[
            "-kernel",
            &word(&lab.paths.kernel()),
            "-initrd",
            &word(&lab.paths.initramfs()),
        ]);
        add(&["-append", &self.kernel_line()]);
        add(&[
            "-netdev",
            &format!("tap,id=net0,ifname={TAP},script=no,downscript=no"),
        ]);
        add(&["-device", &format!("virtio-net-pci,netdev=net0,mac={MAC}")]);
        add(&[
            "-chardev",
            &format!("file,id=console,path={}", word(&console(lab))),
        ]);
        add(&["-serial", "chardev:console"]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", word(&qmp(lab)))]);
        if self.second_monitor {
            add(&[
                "-qmp",
                &format!("unix:{},server=on,wait=off", word(&second_qmp(lab))),
            ]);
        }
        argv.extend(self.extra.iter().cloned());
        argv
    }

    fn kernel_line(&self) -> String {
        let clock = if self.clock_remedy { " clock=remedy" } else { "" };
        format!(
            "console=ttyS0 quiet panic=-1 ip4={GUEST_IP}/24 ip6={GUEST_IP6}/64 gw=10.77.0.1 wl={}{clock}",
            self.workload
        )
    }
}

/// The socket of the guest's monitor.
#[must_use]
pub fn qmp(lab: &Lab) -> PathBuf {
    lab.run_path("qmp.sock")
}

/// The socket of its second monitor.
#[must_use]
pub fn second_qmp(lab: &Lab) -> PathBuf {
    lab.run_path("qmp2.sock")
}

/// Where the guest's console goes.
#[must_use]
pub fn console(lab: &Lab) -> PathBuf {
    lab.logs.join("console.log")
}

/// A guest that runs on the primary.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    console: PathBuf,
}

impl Guest {
    /// Starts it; it takes some seconds to boot.
    ///
    /// # Errors
    /// When the guest has not been built or QEMU cannot be started.
    pub fn start(lab: &Lab, config: &GuestConfig) -> Result<Guest> {
        for needed in [lab.paths.kernel(), lab.paths.initramfs()] {
            if !needed.exists() {
                bail!("{} is missing: run `cargo xtask setup`", needed.display());
            }
        }
        let console = console(lab);
        // What an earlier guest said there must not be taken for this one's.
        File::create(&console).with_context(|| format!("cannot create {}", console.display()))?;
        let process = lab.spawn(Host::Primary, "qemu", &config.argv(lab))?;
        Ok(Guest { process, console })
    }

    /// Waits until its first process has said that it is ready.
    ///
    /// # Errors
    /// When QEMU ends or the time is over.
    pub fn wait_ready(&mut self, at_most: Duration) -> Result<()> {
        let waited = wait_for("the guest's boot", at_most, || {
            if let Some(status) = self.process.ended() {
                return Some(Err(anyhow!("QEMU ended ({status}): {}", self.process.tail())));
            }
            if has_line(&self.console, "Kernel panic") {
                return Some(Err(anyhow!(
                    "the guest's kernel panics; see {}",
                    self.console.display()
                )));
            }
            has_line(&self.console, "guest: ready").then_some(Ok(()))
        });
        waited.map_err(|error| {
            anyhow!(
                "{error}; the console: {}",
                crate::process::tail_of(&self.console, 5)
            )
        })?
    }

    /// Waits until its redis answers a client.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_redis(&mut self, lab: &Lab, at_most: Duration) -> Result<()> {
        wait_for("redis in the guest", at_most, || {
            Redis::connect(lab, Duration::from_millis(500)).ok()?.ping().ok()
        })
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its process, to be waited for or killed.
    pub fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The id of its process.
    ///
    /// # Errors
    /// As [`Process::pid`].
    pub fn pid(&self) -> Result<Pid> {
        self.process.pid()
    }

    /// Kills it at once.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn kill_now(&self) -> Result<()> {
        self.process.signal(Signal::KILL)
    }
}

fn has_line(path: &Path, text: &str) -> bool {
    let bytes = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).contains(text)
}
