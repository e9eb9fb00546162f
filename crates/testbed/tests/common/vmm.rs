//! A process of the VMM, ended with the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use romulus_host_sys::child::die_with_thread;
use romulus_vmm_attach::client::{Attachment, Client};
use rustix::process::{Pid, Signal, kill_process};

/// How long a VMM may take to listen, or to end.
const SOON: Duration = Duration::from_secs(30);

/// A `testbed` that runs.
pub struct Vmm {
    child: Child,
    /// Where it can be attached to.
    pub socket: PathBuf,
    console: PathBuf,
}

impl Vmm {
    /// Starts, to end with this thread at the latest, `program COMMAND --attach FOLDER/NAME.sock [--tap TAP] --serial FOLDER/serial WORDS`.
    pub fn start(
        program: &Path,
        folder: &Path,
        name: &str,
        command: &str,
        tap: Option<&str>,
        words: &[&str],
    ) -> Vmm {
        let socket = folder.join(format!("{name}.sock"));
        let console = folder.join("serial");
        let mut start = Command::new(program);
        start
            .arg(command)
            .arg("--attach")
            .arg(&socket)
            .arg("--serial")
            .arg(&console);
        if let Some(tap) = tap {
            start.args(["--tap", tap]);
        }
        start.args(words);
        let child = die_with_thread(&mut start).spawn().unwrap();
        Vmm {
            child,
            socket,
            console,
        }
    }

    /// Attaches, as soon as the VMM listens.
    pub fn attach(&mut self) -> (Client, Attachment) {
        let begin = Instant::now();
        loop {
            match Client::connect(&self.socket, "test", Duration::from_secs(5)) {
                Ok(attached) => return attached,
                Err(error) => assert!(begin.elapsed() < SOON, "{error}"),
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the VMM has ended: {ended:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(begin.elapsed() < SOON, "the VMM goes on");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops it like a process that gets no time, or lets it go on.
    pub fn stop(&self, stop: bool) {
        let signal = if stop { Signal::STOP } else { Signal::CONT };
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it as a power cut would, without waiting for the end.
    pub fn strike(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        self.strike();
        let _ = self.child.wait();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            // Where the guest says what its self-checks have found.
            let console = std::fs::read_to_string(&self.console).unwrap_or_default();
            eprintln!("console at {}:\n{console}", self.console.display());
        }
    }
}
