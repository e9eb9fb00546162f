//! The lab by itself: instruments that are not known to be right prove nothing about the daemons.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use romulus_e2e::guest::GuestConfig;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{Host, Paths, Stamp};

const PREFIX: &str = "romt";

fn config() -> StageConfig {
    StageConfig {
        guest: GuestConfig {
            workload: "redis,dirty:300:25".to_owned(),
            ..GuestConfig::default()
        },
        without_daemons: true,
        ..StageConfig::default()
    }
}

#[test]
fn an_unprotected_guest_loses_nothing_and_is_seen_by_every_instrument() -> Result<()> {
    let mut stage = Stage::raise(&Paths::here(), PREFIX, &config())?;
    let from = Stamp::now();
    sleep(Duration::from_secs(3));
    let (latency, requests) = stage.probe.quantiles(from, Stamp::now());
    let seen = stage.from_primary.count_after(from);
    let elsewhere = stage.from_backup.frames().len();
    let report = stage.finish_client()?;
    assert_eq!(
        (report.lost, report.resets, report.refused),
        (0, 0, 0),
        "{:?}",
        report.trouble
    );
    assert!(
        report.acked > 100 && report.acked == report.sent,
        "{} of {}",
        report.acked,
        report.sent
    );
    assert!(
        requests > 50 && latency.p50 > 0.0,
        "{requests} requests, {latency:?}"
    );
    assert!(seen > 100, "the sniffer saw {seen} frames");
    assert_eq!(elsewhere, 0, "frames of the guest came from the backup");
    Ok(())
}

#[test]
fn a_guest_that_is_not_protected_dies_with_its_host_and_the_client_notices() -> Result<()> {
    let stage = Stage::raise(&Paths::here(), PREFIX, &config())?;
    let killed = Stamp::now();
    stage.guest.kill_now()?;
    assert!(
        stage
            .wait_ack_after(killed.plus(Duration::from_millis(100)), Duration::from_secs(3))
            .is_err()
    );
    assert!(
        stage
            .from_primary
            .first_frame(killed.plus(Duration::from_millis(100)))
            .is_none()
    );
    Ok(())
}

#[test]
fn a_cut_cable_is_an_outage_that_the_client_measures() -> Result<()> {
    let mut stage = Stage::raise(&Paths::here(), PREFIX, &config())?;
    let cut = Stamp::now();
    stage.lab.net.set_cable(Host::Primary, false)?;
    sleep(Duration::from_millis(500));
    stage.lab.net.set_cable(Host::Primary, true)?;
    let healed = Stamp::now();
    stage.wait_ack_after(healed, Duration::from_secs(20))?;
    let report = stage.finish_client()?;
    assert_eq!((report.lost, report.resets), (0, 0), "{:?}", report.trouble);
    let (from, to) = report
        .longest_gap_after(cut)
        .expect("acknowledgements on both sides of the cut");
    assert!(
        to.ms_since(from) > 400.0,
        "the client waited {} ms",
        to.ms_since(from)
    );
    Ok(())
}
