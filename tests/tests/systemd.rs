//! Under a real systemd: see `romulus_e2e::systemd`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::systemd::{AGENT, AgentUnit, BINARIES, Container, REPLICATOR, WITNESS};
use romulus_e2e::{Host, Lab, Paths, TEST_LAB, wait_for};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

#[test]
fn hosts_with_systemd_run_side_by_side_and_reach_each_other_over_the_labs_network() -> Result<()> {
    let lab = Lab::new(Paths::here(), TEST_LAB)?;
    let primary = Container::boot(&lab, Host::Primary)?;
    let backup = Container::boot(&lab, Host::Backup)?;
    for (container, other) in [(&primary, &backup), (&backup, &primary)] {
        assert_eq!(
            container.read("/etc/hostname")?.trim(),
            lab.net.namespace(container.host())
        );
        container.run(&["test", "-x", &format!("{BINARIES}/romulus")])?;
        container.write(
            "/etc/systemd/system/listens.service",
            "[Service]\nExecStart=/bin/sleep infinity\n",
        )?;
        container.systemctl(&["daemon-reload"])?;
        container.systemctl(&["start", "listens"])?;
        container.wait_property("listens", "ActiveState", "active", SOON)?;
        // Units of the same name on two hosts are two units.
        let pid = container.property("listens", "MainPID")?;
        assert_ne!(container.pid_here(&pid)?, other.pid_here("1")?);
        // It fails where there is no such address.
        let target = format!("/dev/udp/{}/9", other.host().ip());
        container.run(&["bash", "-c", &format!("echo > {target}")])?;
    }
    backup.systemctl(&["stop", "listens"])?;
    assert_eq!(primary.property("listens", "ActiveState")?, "active");
    let gone = backup.path("/");
    drop(backup);
    wait_for("the end of a container", SOON, || (!gone.exists()).then_some(()))
}

/// What `systemd-analyze security` says of a unit: 0 is no exposure, 10 the most.
fn exposure(container: &Container, unit: &str) -> Result<f64> {
    let text = container.run(&["systemd-analyze", "security", "--no-pager", unit])?;
    let line = text.lines().last().context("it says nothing")?;
    let number = line.split_whitespace().find_map(|word| word.parse().ok());
    number.with_context(|| format!("no figure in {line:?}"))
}

#[test]
fn packages_install_start_reload_upgrade_and_purge() -> Result<()> {
    let lab = Lab::new(Paths::here(), TEST_LAB)?;
    lab.init_pki()?;
    let witness = Container::boot(&lab, Host::Witness)?;
    witness.start_witness(&lab)?;
    let backup = Container::boot(&lab, Host::Backup)?;
    backup.install(&lab, &["romulus-replicator", "romulus-bench"])?;
    // Its plans come with it.
    backup.run(&["bench", "run", "parts", "--shortest", "--only", "digest"])?;
    backup.start_agent(&lab)?;

    for (container, unit, most) in [
        (&backup, AGENT, 3.0),
        (&backup, REPLICATOR, 3.6),
        (&witness, WITNESS, 1.5),
    ] {
        container.run(&["systemd-analyze", "verify", unit])?;
        let figure = exposure(container, unit)?;
        println!("{unit}: exposure {figure}");
        assert!(figure <= most, "{unit}: {figure}");
    }
    backup.wait_property(AGENT, "StatusText", "0 VMs protected", SOON)?;
    witness.wait_property(WITNESS, "StatusText", "0 VMs have a record", SOON)?;
    let status = backup.romulus_status()?;
    assert_eq!(status["role"], "backup");

    the_command_has_what_a_shell_and_a_reader_want(&backup)?;
    operators_of_a_group_may_ask(&backup, &witness)?;

    reloads_what_can_be_and_names_the_rest(&backup, AGENT, "/etc/romulus/backup-agent.d/90-later.toml")?;
    reloads_what_can_be_and_names_the_rest(&witness, WITNESS, "/etc/romulus/witness.d/90-later.toml")?;

    // The agent and replicators go on as they are; the witness, which nobody misses for a moment, is started again.
    let (agent, old_witness) = (
        backup.property(AGENT, "MainPID")?,
        witness.property(WITNESS, "MainPID")?,
    );
    backup.upgrade(&["romulus-backup-agent", "romulus-replicator", "romulus-bench"])?;
    witness.upgrade(&["romulus-witness"])?;
    assert_eq!(backup.property(AGENT, "MainPID")?, agent);
    assert_ne!(witness.property(WITNESS, "MainPID")?, old_witness);
    backup.systemctl(&["restart", AGENT])?;
    backup.wait_property(AGENT, "ActiveState", "active", SOON)?;

    a_daemon_that_hangs_is_started_again(&backup)?;
    purge_leaves_only_certificates(
        &backup,
        &[
            "romulus-backup-agent",
            "romulus-replicator",
            "romulus-bench",
            "romulus",
        ],
    )?;
    purge_leaves_only_certificates(&witness, &["romulus-witness", "romulus"])
}

fn the_command_has_what_a_shell_and_a_reader_want(container: &Container) -> Result<()> {
    for file in [
        "man/man1/romulus.1",
        "man/man1/romulus-status.1",
        "bash-completion/completions/romulus",
        "zsh/vendor-completions/_romulus",
        "fish/vendor_completions.d/romulus.fish",
        "romulus/prometheus/romulus.rules.yml",
        "romulus/grafana/romulus.json",
    ] {
        container.run(&["test", "-s", &format!("/usr/share/{file}")])?;
    }
    Ok(())
}

/// No user but root needs to be root for it: the agent's group is a setting's, the witness's is its unit's.
fn operators_of_a_group_may_ask(backup: &Container, witness: &Container) -> Result<()> {
    let group = "/etc/romulus/backup-agent.d/20-group.toml";
    backup.write(group, "admin_group = \"operator\"\n")?;
    backup.systemctl(&["restart", AGENT])?;
    for (container, group, role) in [
        (backup, "operator", "backup"),
        (witness, "romulus-witness", "witness"),
    ] {
        let as_one = |group: &str| {
            let regid = format!("--regid={group}");
            container.output(&[
                "setpriv",
                "--reuid=nobody",
                &regid,
                "--clear-groups",
                "romulus",
                "status",
                "--json",
            ])
        };
        let answer: Value = serde_json::from_slice(&as_one(group)?.stdout)?;
        assert_eq!(answer["daemons"][0]["status"]["role"], role, "{answer}");
        // 4: the daemon does not answer.
        assert_eq!(as_one("nogroup")?.status.code(), Some(4));
    }
    backup.run(&["rm", group])?;
    backup.systemctl(&["restart", AGENT])?;
    backup.wait_property(AGENT, "StatusText", "0 VMs protected", SOON)
}

fn reloads_what_can_be_and_names_the_rest(container: &Container, unit: &str, file: &str) -> Result<()> {
    let pid = container.property(unit, "MainPID")?;
    container.write(file, "vms_max = 5\n[log]\nlevel = \"debug\"\n")?;
    container.reload(unit)?;
    container.wait_journal(unit, "these settings wait for a restart", SOON)?;
    container.wait_journal(unit, "log.level", SOON)?;
    container.write(file, "vms_max = 0\n")?;
    let refused = container.output(&["systemctl", "reload", unit])?;
    assert!(
        !refused.status.success(),
        "settings that are not good were reloaded"
    );
    container.run(&["rm", file])?;
    container.reload(unit)?;
    assert_eq!(container.property(unit, "MainPID")?, pid);
    container.wait_property(unit, "ActiveState", "active", SOON)
}

fn a_daemon_that_hangs_is_started_again(container: &Container) -> Result<()> {
    container.write(
        &format!("/etc/systemd/system/{AGENT}.d/10-soon.conf"),
        "[Service]\nWatchdogSec=5s\nTimeoutAbortSec=1s\n",
    )?;
    container.systemctl(&["daemon-reload"])?;
    container.systemctl(&["restart", AGENT])?;
    let pid = container.property(AGENT, "MainPID")?;
    container.systemctl(&["kill", "--signal=STOP", "--kill-who=main", AGENT])?;
    wait_for("a new agent", SOON, || {
        let now = container.property(AGENT, "MainPID").ok()?;
        (now != pid && now != "0").then_some(())
    })?;
    container.wait_journal(AGENT, "Watchdog timeout", SOON)?;
    container.wait_property(AGENT, "ActiveState", "active", SOON)
}

fn purge_leaves_only_certificates(container: &Container, packages: &[&str]) -> Result<()> {
    let mut argv = vec!["dpkg", "--purge"];
    argv.extend_from_slice(packages);
    container.run(&argv)?;
    let find = [
        "find",
        "/etc",
        "/usr",
        "/var",
        "/run",
        "/dev/shm",
        "-xdev",
        "-name",
        "*romulus*",
    ];
    let left = container.run(&find)?;
    // The drop-in and the tree's stamp are this test's; logs are journald's; keys are the operator's.
    let expected = |line: &str| {
        [
            "/etc/romulus",
            "/etc/romulus-tree",
            "/etc/systemd/system/romulus-backup-agent.service.d",
        ]
        .contains(&line)
            || line.starts_with("/var/lib/systemd/")
    };
    let unexpected: Vec<&str> = left.lines().filter(|line| !expected(line)).collect();
    assert!(unexpected.is_empty(), "left behind: {unexpected:?}");
    assert_eq!(container.run(&["ls", "/etc/romulus"])?.trim(), "pki");
    let failed = container.systemctl(&["--failed", "--no-legend"])?;
    assert_eq!(failed.trim(), "");
    Ok(())
}

/// All that attaching to a QEMU takes is allowed by the replicator's unit: ptrace, page tables, its memory, the gate.
#[test]
fn a_replicators_unit_protects_a_guest_of_qemu_and_leaves_it_as_it_was() -> Result<()> {
    let lab = Lab::new(Paths::here(), TEST_LAB)?;
    lab.init_pki()?;
    let witness = Container::boot(&lab, Host::Witness)?;
    witness.start_witness(&lab)?;
    let _agent = AgentUnit::start(&lab, "", "")?;
    let primary = Container::boot_for_vmm(&lab, Host::Primary)?;
    primary.start_guest(&lab, QemuConfig::default().dirty_pages(100))?;
    let guest = primary.property("guest", "MainPID")?;
    let status = primary.protect_guest(&lab)?;
    let (session, epoch) = (status["session"].clone(), status["committed"].as_u64());
    wait_for("commits", SOON, || {
        let status = primary.romulus_status().ok()?;
        (status["committed"].as_u64() > epoch.map(|epoch| epoch + 40)).then_some(())
    })
    .with_context(|| primary.journal(REPLICATOR))?;
    let status = primary.wait_state("protected", SOON)?;
    assert_eq!(status["session"], session, "{status}");
    primary.systemctl(&["stop", REPLICATOR])?;
    assert_eq!(primary.property(REPLICATOR, "Result")?, "success");
    assert_eq!(primary.property("guest", "MainPID")?, guest);
    assert_eq!(primary.property("guest", "SubState")?, "running");
    Ok(())
}
