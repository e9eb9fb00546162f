//! Whoever is not protected any more is as if it had never been: QEMU's process, its monitor and its host are compared
//! with what they were before.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use romulus_e2e::daemons::ProtectConfig;
use romulus_e2e::guest::{Memory, QemuConfig};
use romulus_e2e::qmp::Qmp;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, Stamp, TAP, TEST_LAB, wait_for};
use rustix::process::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// What was looked at, by its name.
type Traces = BTreeMap<String, Vec<String>>;

/// Everything in which an attachment could show.
fn traces(stage: &Stage, monitor: &mut Qmp) -> Result<Traces> {
    let mut found = Traces::new();
    let pid = stage.guest.pid()?.as_raw_nonzero();
    of_process(&format!("/proc/{pid}"), &mut found)?;
    for command in [
        "query-fdsets",
        "query-migrate-capabilities",
        "query-migrate-parameters",
        "query-chardev",
        "query-block-jobs",
        "query-status",
    ] {
        let reply = monitor.execute(command)?;
        found.insert(command.to_owned(), vec![reply.to_string()]);
    }
    of_host(stage, &mut found)?;
    Ok(found)
}

fn of_process(proc: &str, found: &mut Traces) -> Result<()> {
    let read = |name: &str| {
        let path = format!("{proc}/{name}");
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let smaps = read("smaps")?;
    // uw: write protection by a userfaultfd; um: missing pages by one.
    let watched = smaps
        .lines()
        .filter(|line| line.starts_with("VmFlags:") && (line.contains(" uw") || line.contains(" um")));
    found.insert(
        "ranges of a userfaultfd".into(),
        watched.map(str::to_owned).collect(),
    );
    let maps = read("maps")?;
    let code = maps.lines().filter_map(|line| {
        let (place, rest) = line.split_once(' ')?;
        // The translated code of TCG is the only other executable memory, and stays where it is.
        rest.starts_with("r-xp").then(|| place.to_owned())
    });
    found.insert("mappings of code".into(), code.collect());
    let mut files = Vec::new();
    for entry in fs::read_dir(format!("{proc}/fd")).context("cannot list descriptors")? {
        let link = fs::read_link(entry.context("cannot list descriptors")?.path());
        // One that was closed meanwhile is none; numbers of sockets and pipes differ.
        let Ok(link) = link else { continue };
        let text = link.to_string_lossy().into_owned();
        files.push(text.split(":[").next().unwrap_or_default().to_owned());
    }
    files.sort();
    found.insert("descriptors".into(), files);
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("{proc}/task")).context("cannot list threads")? {
        let task = task.context("cannot list threads")?.path();
        let Ok(status) = fs::read_to_string(task.join("status")) else {
            continue;
        };
        let told = ["Name:", "TracerPid:", "SigBlk:", "SigIgn:", "SigCgt:", "Seccomp:"];
        let lines: Vec<&str> = status
            .lines()
            .filter(|line| told.iter().any(|key| line.starts_with(key)))
            .collect();
        threads.push(lines.join(" "));
    }
    threads.sort();
    found.insert("threads".into(), threads);
    Ok(())
}

fn of_host(stage: &Stage, found: &mut Traces) -> Result<()> {
    let lab = &stage.lab;
    let argv = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    for command in [
        format!("tc qdisc show dev {TAP}"),
        format!("tc filter show dev {TAP} ingress"),
        format!("tc filter show dev {TAP} egress"),
        "ip -brief link".to_owned(),
        format!("cat /proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"),
    ] {
        let told = lab.output_or(Host::Primary, &argv(&command), &[2])?;
        // The names of links only: their state is the kernel's business.
        let words = if command.starts_with("ip") { 1 } else { usize::MAX };
        let lines = told
            .lines()
            .map(|line| line.split_whitespace().take(words).collect::<Vec<_>>().join(" "));
        found.insert(command.clone(), lines.collect());
    }
    let names = fs::read_dir(&lab.run).context("cannot list the folder of FIFOs")?;
    let names = names
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("qemu-")).collect();
    names.sort();
    found.insert("files beside the FIFO".into(), names);
    let pids = lab.output(
        Host::Primary,
        &argv(&format!("ip netns pids {}", lab.net.namespace(Host::Primary))),
    )?;
    let mut running: Vec<String> = pids
        .lines()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{}/comm", pid.trim())).ok())
        .map(|name| name.trim().to_owned())
        // The command that lists them.
        .filter(|name| name != "ip")
        .collect();
    running.sort();
    found.insert("processes".into(), running);
    Ok(())
}

/// What differs, in words.
fn differences(before: &Traces, after: &Traces) -> Vec<String> {
    let differing = before
        .iter()
        .filter(|(name, value)| after.get(*name) != Some(*value));
    differing
        .map(|(name, value)| format!("{name}:\n  before {value:?}\n  after  {:?}", after.get(name)))
        .collect()
}

/// QEMU's own threads and descriptors come and go, so what differs must do so for good.
fn assert_no_trace(stage: &Stage, monitor: &mut Qmp, before: &Traces) -> Result<()> {
    let mut left = Vec::new();
    let gone = wait_for("the last trace to go", Duration::from_secs(10), || {
        left = differences(before, &traces(stage, monitor).ok()?);
        left.is_empty().then_some(())
    });
    assert!(gone.is_ok(), "traces of the protection:\n{}", left.join("\n"));
    Ok(())
}

fn raise(memory: Memory) -> Result<Stage> {
    let guest = QemuConfig {
        workload: "redis,dirty:200:25".to_owned(),
        memory,
        second_monitor: true,
        ..QemuConfig::default()
    };
    let config = StageConfig {
        guest: guest.into(),
        ..StageConfig::default()
    };
    Stage::raise(&Paths::here(), TEST_LAB, &config)
}

fn without_register() -> ProtectConfig {
    ProtectConfig {
        register: false,
        ..ProtectConfig::default()
    }
}

fn unprotect(stage: &mut Stage) -> Result<()> {
    stage.lab.romulus(Host::Primary, &["unprotect"])?;
    let mut replicator = stage.replicator.take().ok_or_else(|| anyhow!("no replicator"))?;
    let ended = replicator.wait(SOON)?;
    assert!(ended.success(), "{ended}: {}", replicator.tail());
    Ok(())
}

fn nothing_lost(stage: &mut Stage) -> Result<()> {
    stage.wait_ack_after(Stamp::now(), SOON)?;
    stage.ensure_nothing_lost()
}

fn leaves_no_trace(memory: Memory) -> Result<()> {
    let mut stage = raise(memory)?;
    let mut monitor = Qmp::connect(&stage.lab)?;
    let before = traces(&stage, &mut monitor)?;
    stage.protect(&ProtectConfig::default())?;
    sleep(Duration::from_secs(1));
    // That nothing is seen afterwards counts for something only if it is seen now.
    let during = traces(&stage, &mut monitor)?;
    for what in [
        "ranges of a userfaultfd",
        "files beside the FIFO",
        "processes",
        "ip -brief link",
    ] {
        assert_ne!(
            before.get(what),
            during.get(what),
            "the protection does not show in: {what}"
        );
    }
    unprotect(&mut stage)?;
    assert_no_trace(&stage, &mut monitor, &before)?;
    // And once more, this time ended by a signal.
    stage.protect(&without_register())?;
    let replicator = stage
        .replicator
        .as_mut()
        .ok_or_else(|| anyhow!("no replicator"))?;
    replicator.signal(Signal::TERM)?;
    let ended = replicator.wait(SOON)?;
    assert!(ended.success(), "{ended}: {}", replicator.tail());
    assert_no_trace(&stage, &mut monitor, &before)?;
    nothing_lost(&mut stage)
}

#[test]
fn nothing_is_left_of_a_protection_that_has_ended() -> Result<()> {
    leaves_no_trace(Memory::Plain)
}

#[test]
fn nothing_is_left_of_a_protection_of_shared_memory() -> Result<()> {
    leaves_no_trace(Memory::Memfd)
}

#[test]
fn a_replicator_that_was_killed_leaves_nothing_in_qemu_and_the_next_one_removes_the_rest() -> Result<()> {
    let mut stage = raise(Memory::Plain)?;
    let mut monitor = Qmp::connect(&stage.lab)?;
    let before = traces(&stage, &mut monitor)?;
    stage.protect(&ProtectConfig::default())?;
    // Without a backup nobody takes over, so that the guest stays ours.
    stage.agent.take().ok_or_else(|| anyhow!("no agent"))?.kill();
    wait_for("the loss of the backup", SOON, || {
        let status = stage.lab.status(Host::Primary).ok()?;
        (status.get("state").and_then(Value::as_str) == Some("not_protected")).then_some(())
    })?;
    stage
        .replicator
        .take()
        .ok_or_else(|| anyhow!("no replicator"))?
        .kill();
    wait_for("QEMU to be as it was", Duration::from_secs(10), || {
        let now = traces(&stage, &mut monitor).ok()?;
        let same = |what: &str| before.get(what) == now.get(what);
        [
            "ranges of a userfaultfd",
            "descriptors",
            "query-status",
            "query-migrate-capabilities",
        ]
        .into_iter()
        .all(same)
        .then_some(())
    })?;
    stage.agent = Some(stage.lab.start_agent()?);
    stage.protect(&without_register())?;
    unprotect(&mut stage)?;
    assert_no_trace(&stage, &mut monitor, &before)?;
    nothing_lost(&mut stage)
}
