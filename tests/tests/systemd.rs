//! Under a real systemd: see `romulus_e2e::systemd`.

use std::time::Duration;

use anyhow::Result;
use romulus_e2e::systemd::{BINARIES, Container};
use romulus_e2e::{Host, Lab, Paths, TEST_LAB, wait_for};

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
