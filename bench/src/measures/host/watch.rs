//! What an agent did while it was watched: by its own word, and by the kernel's.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Instant;

use romulus_e2e::crowd::Crowd;
use serde_json::Value;

use crate::run::Unable;
use crate::stats::float;

const MIB: f64 = 1024.0 * 1024.0;
/// Of the times in /proc/PID/stat: USER_HZ, which is 100 on every x86-64 Linux.
pub(in crate::measures) const TICKS_A_SECOND: f64 = 100.0;

/// What an agent did meanwhile.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    /// From the last byte of a checkpoint to its acknowledgement, in microseconds: the 99th percentile of the last 1,024 of each VM
    /// together, and of those of the VM where it is the longest.
    pub(super) ack_us: f64,
    pub(super) worst_ack_us: f64,
    /// The agent's processor time for a committed page, in microseconds.
    pub(super) page_cpu_us: f64,
    /// The same for an epoch of a VM: of all its threads, and of the one that serves the connections alone.
    pub(super) epoch_cpu_us: f64,
    pub(super) epoch_connections_us: f64,
    /// Pages that were committed in an epoch.
    pub(super) pages_an_epoch: f64,
    /// Pages that were committed a second, of all VMs.
    pub(super) pages_a_second: f64,
    /// The most that the agent's memory, with all that it maps, grew by meanwhile, in MiB.
    pub(super) growth_mib: f64,
    /// The agent's own memory, that of its images' memory files, and that of their staging, in MiB.
    pub(super) agent_mib: f64,
    pub(super) image_mib: f64,
    pub(super) staging_mib: f64,
    /// The largest part of a VM's epochs that began late, in per cent.
    pub(super) late_percent: f64,
    /// How busy all cores of the machine were, in per cent.
    pub(super) busy_percent: f64,
}

/// Counts at one moment.
struct Counts {
    pages: u64,
    /// Of all its threads, and of its main one.
    agent_ticks: u64,
    connections_ticks: u64,
    /// Of all cores: busy, and all.
    machine_ticks: (u64, u64),
    /// Epochs of each VM, and how many of them began late.
    epochs: Vec<(f64, f64)>,
    /// The session of each VM, which is another one when it was not protected in between.
    sessions: Vec<Value>,
}

impl Counts {
    fn now(crowd: &Crowd, names: &[String], pid: i32) -> Result<Self, Unable> {
        let (mut pages, mut epochs, mut sessions) = (0, Vec::new(), Vec::new());
        for name in names {
            let at_agent = crowd.at_agent(name).map_err(Unable::failed("asking the agent"))?;
            pages += number(&at_agent["committed_pages"])?;
            let status = crowd
                .status(name)
                .map_err(Unable::failed("asking a replicator"))?;
            if status["state"] != "protected" {
                return Err(Unable::Wrong(format!("{name} is not protected: {status}")));
            }
            let all = float(number(&status["epochs"])?);
            let on_time = status["epoch_on_time_ratio"].as_f64().unwrap_or(0.0);
            epochs.push((all, all * (1.0 - on_time)));
            sessions.push(status["session"].clone());
        }
        Ok(Self {
            pages,
            agent_ticks: cpu_ticks(pid)?,
            connections_ticks: main_ticks(pid)?,
            machine_ticks: machine_ticks()?,
            epochs,
            sessions,
        })
    }
}

impl Watched {
    /// Watches an agent with these VMs while something goes on.
    pub(super) fn watch(
        crowd: &Crowd,
        names: &[String],
        meanwhile: impl FnOnce() -> Result<(), Unable>,
    ) -> Result<Self, Unable> {
        let failed = || Unable::failed("asking the agent");
        let pid = crowd.agent.pid().map_err(failed())?.as_raw_nonzero().get();
        let before = Counts::now(crowd, names, pid)?;
        let resident_mib = forget_peak(pid)?;
        let begun = Instant::now();
        meanwhile()?;
        let seconds = begun.elapsed().as_secs_f64();
        // First, and of all VMs at once: asking takes the agent's time, too.
        let acks = crowd.agent_status().map_err(failed())?;
        let after = Counts::now(crowd, names, pid)?;
        if before.sessions != after.sessions {
            return Err(Unable::Wrong("a VM was not protected all the time".to_owned()));
        }
        let (ack_us, worst_ack_us) = ack_us(&acks, names)?;
        let pages = float(after.pages.saturating_sub(before.pages));
        let us = |after: u64, before: u64| float(after.saturating_sub(before)) * 1e6 / TICKS_A_SECOND;
        let cpu_us = us(after.agent_ticks, before.agent_ticks);
        let connections_us = us(after.connections_ticks, before.connections_ticks);
        let count = |counts: &Counts| counts.epochs.iter().map(|(all, _)| all).sum::<f64>();
        let epochs = (count(&after) - count(&before)).max(1.0);
        let (image_mib, staging_mib) = image_mib(&crowd.lab.images)?;
        let (busy, all) = (
            after.machine_ticks.0.saturating_sub(before.machine_ticks.0),
            after.machine_ticks.1.saturating_sub(before.machine_ticks.1),
        );
        Ok(Self {
            ack_us,
            worst_ack_us,
            page_cpu_us: cpu_us / pages.max(1.0),
            epoch_cpu_us: cpu_us / epochs,
            epoch_connections_us: connections_us / epochs,
            pages_an_epoch: pages / epochs,
            pages_a_second: pages / seconds,
            growth_mib: (status_mib(pid, "VmHWM:")? - resident_mib).max(0.0),
            agent_mib: status_mib(pid, "RssAnon:")?,
            image_mib,
            staging_mib,
            late_percent: late_percent(&before.epochs, &after.epochs),
            busy_percent: 100.0 * float(busy) / float(all).max(1.0),
        })
    }
}

/// Of all VMs of the agent together, and of the worst of those that are named.
fn ack_us(status: &Value, names: &[String]) -> Result<(f64, f64), Unable> {
    let p99 = |of: &Value| number(&of["receive_to_ack_recent_us"]["p99"]).map(float);
    let mut worst = 0.0_f64;
    for name in names {
        let vms = status["vms"].as_array().into_iter().flatten();
        let vm = vms.into_iter().find(|vm| vm["vm"] == **name);
        worst = worst.max(p99(vm.unwrap_or(&Value::Null))?);
    }
    Ok((p99(status)?, worst))
}

/// Of the VM with the most.
fn late_percent(before: &[(f64, f64)], after: &[(f64, f64)]) -> f64 {
    let of_one = |((all_before, late_before), (all, late)): (&(f64, f64), &(f64, f64))| {
        100.0 * (late - late_before).max(0.0) / (all - all_before).max(1.0)
    };
    before.iter().zip(after).map(of_one).fold(0.0, f64::max)
}

pub(in crate::measures) fn number(value: &Value) -> Result<u64, Unable> {
    value
        .as_u64()
        .ok_or_else(|| Unable::Wrong(format!("{value} is no number of a status")))
}

fn read(path: &str) -> Result<String, Unable> {
    fs::read_to_string(path).map_err(Unable::failed("reading what the kernel says"))
}

/// User and system time of a process, in ticks.
pub(in crate::measures) fn cpu_ticks(pid: i32) -> Result<u64, Unable> {
    ticks(&format!("/proc/{pid}/stat"))
}

/// The same of its main thread alone.
fn main_ticks(pid: i32) -> Result<u64, Unable> {
    ticks(&format!("/proc/{pid}/task/{pid}/stat"))
}

fn ticks(stat: &str) -> Result<u64, Unable> {
    let stat = read(stat)?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields = after_name.split_whitespace().skip(11).take(2);
    Ok(fields.filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// Time of all cores in which they did something, and all time, in ticks.
fn machine_ticks() -> Result<(u64, u64), Unable> {
    let stat = read("/proc/stat")?;
    // user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in the first two.
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<u64> = fields.take(8).filter_map(|field| field.parse().ok()).collect();
    let all = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    Ok((all - idle, all))
}

/// Has the kernel count the most memory that a process has from now on; gives what it has, in MiB.
fn forget_peak(pid: i32) -> Result<f64, Unable> {
    // 5: the peak becomes what is resident (proc_pid_clear_refs(5)).
    let written = fs::write(format!("/proc/{pid}/clear_refs"), "5");
    written.map_err(Unable::failed("resetting the agent's peak of memory"))?;
    status_mib(pid, "VmRSS:")
}

/// What the kernel says of a process's memory under this name, in MiB.
fn status_mib(pid: i32, name: &str) -> Result<f64, Unable> {
    let status = read(&format!("/proc/{pid}/status"))?;
    let field = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = field.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let kib = kib.ok_or_else(|| Unable::Wrong("the kernel does not tell the agent's memory".to_owned()))?;
    Ok(float(kib) / 1024.0)
}

/// Memory of all files of images: of the guests' memory, and of everything else.
fn image_mib(folder: &Path) -> Result<(f64, f64), Unable> {
    let (mut memory, mut others) = (0, 0);
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(Unable::failed("listing the images"))?;
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_string_lossy().starts_with("ram-") {
                memory += metadata.blocks() * 512;
            } else {
                others += metadata.blocks() * 512;
            }
        }
    }
    Ok((float(memory) / MIB, float(others) / MIB))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_is_that_of_the_watched_time_and_of_the_vm_with_the_most() {
        let before = [(100.0, 50.0), (100.0, 0.0)];
        assert!((late_percent(&before, &[(300.0, 50.0), (300.0, 20.0)]) - 10.0).abs() < 1e-9);
        assert!(late_percent(&before, &before) < 1e-9);
    }

    #[test]
    fn the_kernel_says_what_this_process_and_the_machine_have_used() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let resident_mib = forget_peak(pid).unwrap();
        let filled = vec![1_u8; 64 << 20];
        assert!(
            status_mib(pid, "VmHWM:").unwrap() > resident_mib + 60.0,
            "{}",
            filled[1]
        );
        assert!(status_mib(pid, "RssAnon:").unwrap() > 60.0);
        cpu_ticks(pid).unwrap();
        main_ticks(pid).unwrap();
        let (busy, all) = machine_ticks().unwrap();
        assert!(busy > 0 && busy < all);
    }
}
