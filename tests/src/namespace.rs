//! Network namespaces with names: made, entered and removed by system calls alone.
//!
//! They are where `ip netns` has its own, so that a developer can look into a lab with `ip netns exec NAME …`, and so that a
//! lab finds what an earlier one of its name has left, even when that was killed.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use romulus_host_sys::netns::enter_new;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::process::{Pid, Signal, getpid, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const FOLDER: &str = "/run/netns";
const OF_THREAD: &str = "/proc/thread-self/ns/net";

/// Makes a namespace.
pub(crate) fn make(name: &str) -> Result<()> {
    let path = path_of(name);
    fs::create_dir_all(FOLDER).with_context(|| format!("cannot create {FOLDER}; the lab needs root"))?;
    File::create_new(&path)
        .with_context(|| format!("cannot create {}; the lab needs root", path.display()))?;
    // On a thread of its own, which ends there.
    on_thread(name, || {
        enter_new().context("cannot make a network namespace; the lab needs root")?;
        mount_bind(OF_THREAD, &path).with_context(|| format!("cannot mount {}", path.display()))
    })
}

/// Kills what runs in a namespace, and removes it.
pub(crate) fn remove(name: &str) {
    // What is not there needs no removing: failures are the usual case of a first run.
    for pid in pids(name) {
        let _ = kill_process(pid, Signal::KILL);
    }
    let path = path_of(name);
    let _ = unmount(&path, UnmountFlags::DETACH);
    let _ = fs::remove_file(&path);
}

/// An open namespace, to be entered or to be named to the kernel.
pub(crate) fn open(name: &str) -> Result<File> {
    let path = path_of(name);
    File::open(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// Moves the calling thread to the namespace of this name.
pub(crate) fn enter(name: &str) -> Result<()> {
    enter_file(&open(name)?).with_context(|| format!("cannot enter {name}"))
}

/// Does something in the namespace and brings the calling thread back. Children that it starts stay there.
pub(crate) fn visit<T>(name: &str, work: impl FnOnce() -> T) -> Result<T> {
    /// Brings the thread back however the visit ends.
    struct Home(File);
    impl Drop for Home {
        fn drop(&mut self) {
            enter_file(&self.0).expect("a thread may return to the namespace that it came from");
        }
    }
    let home = Home(File::open(OF_THREAD).with_context(|| format!("cannot open {OF_THREAD}"))?);
    enter(name)?;
    let done = work();
    drop(home);
    Ok(done)
}

/// Does something on a thread of its own in the namespace; what it opens there stays there.
///
/// # Errors
/// When the namespace is gone, or what `work` says.
pub(crate) fn within<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(name, || {
        enter(name)?;
        work()
    })
}

fn on_thread<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(work);
        thread
            .join()
            .map_err(|_| anyhow!("a thread in {name} panicked"))?
    })
}

fn path_of(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

fn enter_file(namespace: &File) -> rustix::io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
}

/// The processes of a namespace but for this one, which may be visiting it.
fn pids(name: &str) -> Vec<Pid> {
    let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let Some(wanted) = identity(&path_of(name)) else {
        return Vec::new();
    };
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter(|entry| identity(&entry.path().join("ns/net")) == Some(wanted))
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter(|pid| *pid != getpid())
        .collect()
}
