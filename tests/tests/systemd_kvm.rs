//! A VM that is protected by packages of this checkout, under a real systemd on every host.

use std::time::Duration;

use anyhow::{Context as _, Result};
use romulus_e2e::client::{Client, ClientConfig};
use romulus_e2e::guest::TestbedConfig;
use romulus_e2e::systemd::{Container, REPLICATOR};
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
    let primary = Container::boot_for_guest(&lab)?;
    primary.start_guest(&lab, &TestbedConfig::default().dirty_pages(100))?;
    primary.systemctl(&["enable", "--now", REPLICATOR])?;
    let status = primary.wait_state("protected", SOON)?;
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
    let told = || {
        primary
            .journal(REPLICATOR)
            .contains("epochs.length")
            .then_some(())
    };
    wait_for("the setting that waits for a restart", SOON, told)?;
    primary.run(&["rm", "/etc/romulus/vms/demo.d/10-more.toml"])?;
    primary.reload(REPLICATOR)?;
    primary.upgrade(&["romulus-replicator"])?;
    let status = primary.wait_state("protected", SOON)?;
    assert_eq!(status["session"], session);
    assert_eq!(primary.property(REPLICATOR, "MainPID")?, pid);

    // A planned restart: not protected first, a new session, no takeover.
    primary.systemctl(&["restart", REPLICATOR])?;
    let status = primary.wait_state("protected", SOON)?;
    assert_ne!(status["session"], session);
    guest_is_where_it_was(&hosts)?;
    let before_stop = client.acked();
    primary.systemctl(&["stop", REPLICATOR])?;
    assert_eq!(primary.property(REPLICATOR, "Result")?, "success");
    wait_for("answers without a replicator", SOON, || {
        (client.acked() > before_stop + 100).then_some(())
    })?;
    guest_is_where_it_was(&hosts)?;
    let report = client.finish(&hosts.lab, SOON)?;
    assert_eq!(
        (report.lost, report.resets, report.refused),
        (0, 0, 0),
        "{:?}",
        report.trouble
    );
    Ok(())
}

#[test]
fn a_replicator_that_dies_is_started_again_and_stops_the_guest_that_its_backup_has_taken_over() -> Result<()>
{
    let (hosts, _) = protected()?;
    let client = Client::start(&hosts.lab, ClientConfig::default())?;
    hosts
        .primary
        .systemctl(&["kill", "--signal=KILL", "--kill-who=main", REPLICATOR])?;
    let taken_over = || {
        let status = hosts.backup.romulus_status().ok()?;
        (status["vms"][0]["standby"] == "active").then_some(())
    };
    wait_for("a takeover", SOON, taken_over).with_context(|| hosts.primary.journal(REPLICATOR))?;
    // It ends with the code for a VM that must not run here, at which systemd does not try again.
    hosts
        .primary
        .wait_property(REPLICATOR, "ActiveState", "failed", SOON)?;
    assert_eq!(hosts.primary.property(REPLICATOR, "ExecMainStatus")?, "5");
    let before = client.acked();
    wait_for("answers from the backup", SOON, || {
        (client.acked() > before + 100).then_some(())
    })?;
    let report = client.finish(&hosts.lab, SOON)?;
    assert_eq!(
        (report.lost, report.resets, report.refused),
        (0, 0, 0),
        "{:?}",
        report.trouble
    );
    Ok(())
}
