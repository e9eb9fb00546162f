//! A VM that is protected by packages of this checkout, under a real systemd on every host.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use romulus_e2e::client::{Client, ClientConfig};
use romulus_e2e::guest::TestbedConfig;
use romulus_e2e::systemd::{AGENT, Container, REPLICATOR};
use romulus_e2e::{Host, Lab, Paths, TEST_LAB, Vmm, wait_for};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(180);

struct Hosts {
    primary: Container,
    backup: Container,
    _witness: Container,
    lab: Lab,
}

fn protected() -> Result<(Hosts, Value)> {
    let mut lab = Lab::new(Paths::here(), TEST_LAB)?;
    lab.vmm = Vmm::Testbed;
    lab.init_pki()?;
    let witness = Container::boot(&lab, Host::Witness)?;
    witness.start_witness(&lab)?;
    let backup = Container::boot(&lab, Host::Backup)?;
    backup.start_agent(&lab)?;
    let primary = Container::boot_for_vmm(&lab, Host::Primary)?;
    primary.start_guest(&lab, TestbedConfig::default().dirty_pages(100))?;
    let status = primary.protect_guest(&lab)?;
    primary.run(&["romulus", "validate"])?;
    let hosts = Hosts {
        primary,
        backup,
        _witness: witness,
        lab,
    };
    Ok((hosts, status))
}

/// The guest that was there from the beginning runs, and none runs on the backup.
fn guest_is_where_it_was(hosts: &Hosts) -> Result<()> {
    assert_eq!(hosts.primary.property("guest", "SubState")?, "running");
    assert_eq!(hosts.primary.property("guest", "NRestarts")?, "0");
    let backup = hosts.backup.romulus_status()?;
    assert_ne!(backup["vms"][0]["standby"], "active", "{backup}");
    Ok(())
}

/// The status that says that the guest is protected again, in another session.
fn wait_new_session(hosts: &Hosts, session: &Value) -> Result<Value> {
    wait_for("another session", SOON, || {
        let status = hosts.primary.wait_state("protected", SOON).ok()?;
        (status["session"] != *session).then_some(status)
    })
    .with_context(|| hosts.primary.journal(REPLICATOR))
}

fn ensure_nothing_lost(client: Client, hosts: &Hosts) -> Result<()> {
    let report = client.finish(&hosts.lab, SOON)?;
    ensure!(
        (report.lost, report.resets, report.refused) == (0, 0, 0),
        "{} lost, {} resets, {} refused: {:?}",
        report.lost,
        report.resets,
        report.refused,
        report.trouble
    );
    Ok(())
}

fn wait_answers(client: &Client) -> Result<()> {
    let before = client.acked();
    wait_for("answers", SOON, || (client.acked() > before + 100).then_some(()))
}

#[test]
fn what_an_operator_does_to_a_replicators_unit_costs_no_client_anything() -> Result<()> {
    let (hosts, status) = protected()?;
    let (primary, session) = (&hosts.primary, status["session"].clone());
    let client = Client::start(&hosts.lab, ClientConfig::default())?;
    let pid = primary.property(REPLICATOR, "MainPID")?;
    primary.wait_property(REPLICATOR, "StatusText", "protected", SOON)?;

    // Reload and upgrade: the same process in the same session.
    primary.write(
        "/etc/romulus/vms/demo.d/10-more.toml",
        "[epochs]\nlength = \"50ms\"\n[log]\nlevel = \"debug\"\n",
    )?;
    primary.reload(REPLICATOR)?;
    // It waits for a restart.
    primary.wait_journal(REPLICATOR, "epochs.length", SOON)?;
    primary.run(&["rm", "/etc/romulus/vms/demo.d/10-more.toml"])?;
    primary.reload(REPLICATOR)?;
    primary.upgrade(&["romulus-replicator"])?;
    let status = primary.wait_state("protected", SOON)?;
    assert_eq!(status["session"], session);
    assert_eq!(primary.property(REPLICATOR, "MainPID")?, pid);

    // A planned restart: not protected first, a new session, no takeover.
    primary.systemctl(&["restart", REPLICATOR])?;
    wait_new_session(&hosts, &session)?;
    guest_is_where_it_was(&hosts)?;
    primary.systemctl(&["stop", REPLICATOR])?;
    assert_eq!(primary.property(REPLICATOR, "Result")?, "success");
    wait_answers(&client)?;
    guest_is_where_it_was(&hosts)?;
    ensure_nothing_lost(client, &hosts)
}

#[test]
fn what_an_operator_does_to_the_agents_unit_costs_no_client_anything() -> Result<()> {
    let (hosts, status) = protected()?;
    let (primary, backup) = (&hosts.primary, &hosts.backup);
    let session = status["session"].clone();
    let client = Client::start(&hosts.lab, ClientConfig::default())?;
    let pid = backup.property(AGENT, "MainPID")?;

    // Who may speak for which VMs changes for the next session; the one that there is goes on.
    let allow = "/etc/romulus/backup-agent.d/50-allow.toml";
    backup.write(allow, "[[allow]]\nhost = \"other\"\nvms = [\"*\"]\n")?;
    backup.reload(AGENT)?;
    backup.wait_journal(AGENT, "settings_reloaded", SOON)?;
    let before = primary.wait_state("protected", SOON)?;
    wait_answers(&client)?;
    let status = primary.wait_state("protected", SOON)?;
    assert_eq!([&before["session"], &status["session"]], [&session, &session]);
    primary.systemctl(&["restart", REPLICATOR])?;
    let mut last = Value::Null;
    let refused = wait_for("a refusal", SOON, || {
        last = primary.romulus_status().ok()?;
        last["detail"]
            .as_str()?
            .contains("do not allow primary")
            .then_some(())
    });
    refused.with_context(|| last.to_string())?;
    backup.run(&["rm", allow])?;
    backup.reload(AGENT)?;
    let session = wait_new_session(&hosts, &session)?["session"].clone();

    // An upgrade leaves it as it is; a restart, when it suits the operator, costs a session.
    backup.upgrade(&["romulus-backup-agent"])?;
    assert_eq!(primary.wait_state("protected", SOON)?["session"], session);
    assert_eq!(backup.property(AGENT, "MainPID")?, pid);
    backup.systemctl(&["restart", AGENT])?;
    wait_new_session(&hosts, &session)?;
    guest_is_where_it_was(&hosts)?;

    // Without an agent no standby waits for anything.
    backup.systemctl(&["stop", AGENT])?;
    assert_eq!(standbys(backup)?, "");
    wait_answers(&client)?;
    ensure_nothing_lost(client, &hosts)
}

fn standbys(backup: &Container) -> Result<String> {
    let words = ["list-units", "--no-legend", "--plain", "romulus-standby-*.scope"];
    Ok(backup.systemctl(&words)?.trim().to_owned())
}

#[test]
fn a_replicator_that_dies_is_started_again_and_stops_the_guest_that_its_backup_has_taken_over() -> Result<()>
{
    let (hosts, _) = protected()?;
    let (primary, backup) = (&hosts.primary, &hosts.backup);
    let client = Client::start(&hosts.lab, ClientConfig::default())?;
    // On a busy machine the next replicator might be quicker than the backup, and keep the guest where it is.
    let wait = "[Service]\nExecStartPre=/bin/sh -c \"until [ -e /run/may-start ]; do sleep 0.1; done\"\n";
    primary.write(&format!("/etc/systemd/system/{REPLICATOR}.d/10-wait.conf"), wait)?;
    primary.systemctl(&["daemon-reload"])?;
    primary.systemctl(&["kill", "--signal=KILL", "--kill-who=main", REPLICATOR])?;
    let active = || {
        let status = backup.romulus_status().ok()?["vms"][0].clone();
        (status["standby"] == "active").then_some(status["standby_pid"].clone())
    };
    let guest = wait_for("a takeover", SOON, active).with_context(|| primary.journal(REPLICATOR))?;
    primary.write("/run/may-start", "")?;
    // It ends with the code for a VM that must not run here, at which systemd does not try again.
    primary.wait_property(REPLICATOR, "ActiveState", "failed", SOON)?;
    assert_eq!(primary.property(REPLICATOR, "ExecMainStatus")?, "5");
    wait_answers(&client)?;

    let journal = backup.journal(AGENT);
    ensure!(
        !journal.contains("not_announced") && !journal.contains("not_joined"),
        "{journal}"
    );

    // The guest is a unit of its own: no restart, upgrade or removal of the agent is its end.
    backup.upgrade(&["romulus-backup-agent"])?;
    backup.systemctl(&["restart", AGENT])?;
    assert_eq!(wait_for("the guest", SOON, active)?, guest);
    wait_answers(&client)?;
    let said = backup.run(&["dpkg", "--purge", "romulus-backup-agent"])?;
    assert!(said.contains("a VM that was taken over runs here"), "{said}");
    assert_eq!(standbys(backup)?.lines().count(), 1);
    wait_answers(&client)?;
    ensure_nothing_lost(client, &hosts)
}
