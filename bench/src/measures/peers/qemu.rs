//! A stock QEMU that is measured, and its monitor.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use romulus_e2e::Paths;
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp, QmpError};
use romulus_testbed::firmware::{self, Payload};
use serde_json::{Value, json};

use crate::run::Unable;
use crate::stats::float;

const PROGRAM: &str = "qemu-system-x86_64";
/// Nothing takes so long, unless something is broken.
pub(super) const LIMIT: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(20);

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Ring 3 under KVM, which does this all the time.
    Firmware(Payload),
    /// Debian's kernel under TCG, which writes to so many pages every 25 ms.
    Linux { pages: u32 },
}

impl Kind {
    pub(super) fn memory_mib(self) -> u64 {
        match self {
            Self::Firmware(_) => firmware::MEMORY_MIB,
            Self::Linux { .. } => 256,
        }
    }
}

/// A QEMU. Killed when dropped.
pub(super) struct Qemu {
    process: Child,
    pub(super) monitor: Qmp,
    /// Another monitor, for whoever attaches.
    pub(super) socket: PathBuf,
    console: PathBuf,
    said: PathBuf,
}

impl Qemu {
    /// Starts a guest; with `incoming` one that waits for its state.
    pub(super) fn start(kind: Kind, dir: &Path, name: &str, incoming: bool) -> Result<Self, Unable> {
        let place = |what: &str| dir.join(format!("{name}-{what}"));
        let (own, socket, console, said) = (place("own"), place("qmp"), place("console"), place("said"));
        let mut command = Command::new(PROGRAM);
        command.args(["-nodefaults", "-display", "none", "-no-user-config"]);
        command.args(["-m", &format!("{}M", kind.memory_mib())]);
        for socket in [&own, &socket] {
            let path = socket.display();
            command.args(["-qmp", &format!("unix:{path},server=on,wait=off")]);
        }
        match kind {
            Kind::Firmware(payload) => {
                let path = place("firmware");
                std::fs::write(&path, firmware::image(payload))
                    .map_err(Unable::failed("writing the firmware"))?;
                command
                    .args(["-M", "pc,accel=kvm", "-cpu", "qemu64", "-bios"])
                    .arg(path);
            }
            Kind::Linux { pages } => linux(&mut command, pages, &console)?,
        }
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let output = File::create(&said).map_err(Unable::failed("making a file"))?;
        let errors = output.try_clone().map_err(Unable::failed("making a file"))?;
        let started = command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn();
        let mut process = started.map_err(|_| Unable::Missing {
            what: format!("there is no {PROGRAM}"),
            remedy: "install qemu-system-x86".to_owned(),
        })?;
        match connect(&own, &mut process) {
            Ok(mut monitor) => {
                monitor.set_command_timeout(LIMIT);
                Ok(Self {
                    process,
                    monitor,
                    socket,
                    console,
                    said,
                })
            }
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                let said = std::fs::read_to_string(&said).unwrap_or_default();
                let what = format!("QEMU does not answer ({error}); it said {said:?}");
                Err(Unable::Wrong(what))
            }
        }
    }

    pub(super) fn ask(&mut self, command: &'static str, arguments: Value) -> Result<Value, Unable> {
        let answer = self.monitor.execute(command, arguments);
        answer.map_err(|error| {
            let said = std::fs::read_to_string(&self.said).unwrap_or_default();
            Unable::Wrong(format!("QEMU's {command} failed: {error}; it said {said:?}"))
        })
    }

    /// Switches capabilities of migration on.
    pub(super) fn capable(&mut self, names: &[&str]) -> Result<(), Unable> {
        let all: Vec<Value> = names
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.ask("migrate-set-capabilities", json!({"capabilities": all}))?;
        Ok(())
    }

    /// Waits until the guest works.
    pub(super) fn wait_for_work(&mut self, kind: Kind) -> Result<(), Unable> {
        match kind {
            Kind::Firmware(_) => self.wait_for_more_than(8),
            Kind::Linux { .. } => self.wait_until(|qemu| {
                let text = std::fs::read(&qemu.console).unwrap_or_default();
                Ok(String::from_utf8_lossy(&text).contains("counter 4"))
            }),
        }
    }

    /// Until the guest of firmware has done more rounds than that.
    pub(super) fn wait_for_more_than(&mut self, rounds: u64) -> Result<(), Unable> {
        self.wait_until(|qemu| Ok(qemu.count()? > rounds))
    }

    fn wait_until(&mut self, mut works: impl FnMut(&mut Self) -> Result<bool, Unable>) -> Result<(), Unable> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if works(self)? {
                return Ok(());
            }
            let ended = self.process.try_wait().ok().flatten();
            if ended.is_some() || Instant::now() > deadline {
                let said = std::fs::read_to_string(&self.said).unwrap_or_default();
                return Err(Unable::Wrong(format!(
                    "the guest does not work ({ended:?}); QEMU said {said:?}"
                )));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// How many rounds the guest of firmware has done.
    pub(super) fn count(&mut self) -> Result<u64, Unable> {
        let answer = self.ask(
            "human-monitor-command",
            json!({"command-line": format!("xp /1gx {:#x}", firmware::COUNT_AT)}),
        )?;
        let text = answer.as_str().unwrap_or_default();
        let digits = text.trim().rsplit("0x").next().unwrap_or_default();
        u64::from_str_radix(digits, 16).map_err(|_| Unable::Wrong(format!("QEMU's memory is {text:?}")))
    }

    /// What it took for a round since it had done so many, in microseconds.
    pub(super) fn round_us(&mut self, before: u64, began: Instant) -> Result<f64, Unable> {
        let rounds = self.count()?.saturating_sub(before);
        Ok(began.elapsed().as_secs_f64() * 1e6 / float(rounds.max(1)))
    }

    /// Times from `STOP` to `RESUME` by QEMU's own clock, in microseconds, of what it did until now or does until there are so many.
    /// An event of the name `ends` is an error: what is measured ended with it.
    pub(super) fn pauses_us(
        &mut self,
        count: usize,
        limit: Duration,
        ends: &str,
    ) -> Result<Vec<u64>, Unable> {
        let deadline = Instant::now() + limit;
        let (mut pauses, mut stopped) = (Vec::new(), VecDeque::new());
        while pauses.len() < count {
            let event = self.monitor.next_event(deadline);
            let Some(event) = event.map_err(Unable::failed("waiting for QEMU"))? else {
                break;
            };
            match event.name.as_str() {
                "STOP" => stopped.push_back(event.at_us()),
                "RESUME" => pauses.extend(stopped.pop_back().map(|at| event.at_us().saturating_sub(at))),
                name if name == ends => {
                    let what = format!("QEMU ended what is measured: {} {}", event.name, event.data);
                    return Err(Unable::Wrong(what));
                }
                _ => {}
            }
        }
        if self.monitor.take_events_lost() > 0 {
            return Err(Unable::Wrong("QEMU said more than was read".to_owned()));
        }
        Ok(pauses)
    }
}

/// To a monitor that is there in a moment.
fn connect(socket: &Path, process: &mut Child) -> Result<Qmp, QmpError> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let ended = process.try_wait().ok().flatten().is_some();
        match Qmp::connect(socket, deadline) {
            Err(_) if !ended && Instant::now() < deadline => std::thread::sleep(LOOK),
            connected => return connected,
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The guest of the end-to-end tests.
fn linux(command: &mut Command, pages: u32, console: &Path) -> Result<(), Unable> {
    let assets = Paths::here().assets;
    let (kernel, initramfs) = (assets.join("vmlinuz"), assets.join("initramfs.cpio.gz"));
    if !kernel.exists() || !initramfs.exists() {
        return Err(Unable::Missing {
            what: format!("{} has no guest", assets.display()),
            remedy: "run cargo xtask setup".to_owned(),
        });
    }
    command.args(["-M", "q35,accel=tcg", "-kernel"]).arg(kernel);
    command.arg("-initrd").arg(initramfs).arg("-append");
    command.arg(format!(
        "console=ttyS0 quiet panic=-1 wl=counter:500,dirty:{pages}:25"
    ));
    command.arg("-serial").arg(format!("file:{}", console.display()));
    Ok(())
}
