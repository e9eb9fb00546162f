//! A real QEMU with a real Linux guest, under TCG, for the tests of this crate.
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub(crate) mod saved;

pub(crate) mod attach;

pub(crate) mod on_kvm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use romulus_hypervisor::qemu::qmp::Qmp;
use tempfile::TempDir;

/// Where `cargo xtask setup` puts the guest's kernel and initramfs.
pub(crate) fn assets() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/assets");
    let dir = std::env::var_os("ROMULUS_ASSETS").map_or_else(default, PathBuf::from);
    for file in ["vmlinuz", "initramfs.cpio.gz"] {
        assert!(
            dir.join(file).exists(),
            "{} is missing: run cargo xtask setup",
            dir.join(file).display()
        );
    }
    dir.canonicalize().unwrap()
}

/// Arguments that boot the test guest with these workloads (see tests/guest-tool).
pub(crate) fn linux(workloads: &str) -> Vec<String> {
    let assets = assets();
    let file = |name: &str| assets.join(name).display().to_string();
    // Emulated on a busy host, a timer may seem to be broken to a kernel that checks it while it boots.
    let append = format!("console=ttyS0 quiet panic=-1 no_timer_check wl={workloads}");
    [
        "-kernel",
        &file("vmlinuz"),
        "-initrd",
        &file("initramfs.cpio.gz"),
        "-append",
        &append,
    ]
    .map(str::to_owned)
    .to_vec()
}

/// A QEMU process, killed when dropped.
pub(crate) struct Guest {
    pub(crate) process: Child,
    pub(crate) dir: TempDir,
    pub(crate) argv: Vec<String>,
}

impl Guest {
    /// Starts `qemu-system-x86_64` with these arguments, a QMP socket and the serial line in a file.
    pub(crate) fn start(arguments: &[&str], more: &[String]) -> Self {
        let dir = tempfile::Builder::new().prefix("romulus-hv-").tempdir().unwrap();
        let mut argv = vec!["qemu-system-x86_64".to_owned()];
        argv.extend(arguments.iter().map(|a| (*a).to_owned()));
        argv.extend_from_slice(more);
        argv.extend(["-display".to_owned(), "none".to_owned()]);
        argv.extend([
            "-serial".to_owned(),
            format!("file:{}", dir.path().join("serial").display()),
        ]);
        argv.extend([
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", dir.path().join("qmp").display()),
        ]);
        let process = Command::new(&argv[0])
            .args(&argv[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.path().join("stderr")).unwrap())
            .spawn()
            .expect("qemu-system-x86_64 runs: run cargo xtask setup");
        Self { process, dir, argv }
    }

    pub(crate) fn qmp_path(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// Connects to its QMP socket, once it is there.
    pub(crate) fn qmp(&mut self) -> Qmp {
        let path = self.qmp_path();
        self.connect(&path)
    }

    /// The same of another of its monitors.
    pub(crate) fn connect(&mut self, socket: &Path) -> Qmp {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match Qmp::connect(socket, Instant::now() + Duration::from_secs(10)) {
                Ok(qmp) => return qmp,
                Err(error) => {
                    let ended = self.process.try_wait().unwrap();
                    assert!(
                        ended.is_none() && Instant::now() < deadline,
                        "{error}: {}",
                        self.stderr()
                    );
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    pub(crate) fn serial(&self) -> String {
        read_lossy(&self.dir.path().join("serial"))
    }

    /// Waits until the guest's console shows `text`.
    pub(crate) fn wait_for(&self, text: &str) {
        wait_for(&self.dir.path().join("serial"), text);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Waits until the file shows `text`.
pub(crate) fn wait_for(path: &Path, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !read_lossy(path).contains(text) {
        assert!(
            Instant::now() < deadline,
            "{text:?} never came; the console says:\n{}",
            read_lossy(path)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The values of `counter N` lines, without a last one that may be cut.
pub(crate) fn counters(console: &str) -> Vec<u64> {
    let whole = &console[..console.rfind('\n').map_or(0, |end| end + 1)];
    whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("counter ")?.parse().ok())
        .collect()
}
