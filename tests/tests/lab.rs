//! The lab by itself: instruments that are not known to be right prove nothing about the daemons.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use romulus_e2e::client::ClientConfig;
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::qmp::Qmp;
use romulus_e2e::scenario::slip_ratio;
use romulus_e2e::stage::{Stage, StageConfig};
use romulus_e2e::{GUEST_IP, Host, Paths, Stamp, TEST_LAB};

fn guest() -> QemuConfig {
    QemuConfig {
        workload: "redis,dirty:300:25".to_owned(),
        ..QemuConfig::default()
    }
}

fn config() -> StageConfig {
    StageConfig {
        guest: guest().into(),
        without_daemons: true,
        ..StageConfig::default()
    }
}

#[test]
fn an_unprotected_guest_loses_nothing_and_is_seen_by_every_instrument() -> Result<()> {
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config())?;
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
    let stage = Stage::raise(&Paths::here(), TEST_LAB, &config())?;
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
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config())?;
    // A gap has two ends: the client must have been answered before.
    stage.wait_ack_after(Stamp::now(), Duration::from_secs(20))?;
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

fn redis_cli(stage: &Stage, words: &[&str]) -> Result<String> {
    let mut argv = vec!["redis-cli".to_owned(), "-h".to_owned(), GUEST_IP.to_string()];
    argv.extend(words.iter().map(|word| (*word).to_owned()));
    stage.lab.output(Host::Client, &argv)
}

#[test]
fn an_acknowledged_write_that_vanishes_is_counted_as_lost() -> Result<()> {
    // So many keys that none is written twice.
    let client = ClientConfig {
        keys: 1_000_000,
        ..ClientConfig::default()
    };
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &StageConfig { client, ..config() })?;
    sleep(Duration::from_secs(1));
    assert_eq!(redis_cli(&stage, &["del", "w:5", "w:7"])?.trim(), "2");
    let report = stage.finish_client()?;
    assert_eq!((report.lost, report.resets), (2, 0), "{:?}", report.trouble);
    Ok(())
}

#[test]
fn a_connection_that_is_closed_is_counted_although_nothing_is_lost() -> Result<()> {
    let mut stage = Stage::raise(&Paths::here(), TEST_LAB, &config())?;
    sleep(Duration::from_secs(1));
    redis_cli(&stage, &["client", "kill", "type", "normal"])?;
    sleep(Duration::from_millis(500));
    let report = stage.finish_client()?;
    assert_eq!((report.lost, report.resets), (0, 1), "{:?}", report.trouble);
    Ok(())
}

#[test]
fn a_guest_that_steers_by_its_rtc_keeps_time_although_it_is_paused_forty_times_a_second() -> Result<()> {
    let slip = |clock_remedy: bool| -> Result<f64> {
        let guest = QemuConfig {
            clock_remedy,
            second_monitor: true,
            ..guest()
        };
        let config = StageConfig {
            guest: guest.into(),
            ..config()
        };
        let stage = Stage::raise(&Paths::here(), TEST_LAB, &config)?;
        let mut monitor = Qmp::connect(&stage.lab)?;
        let mut pause_for = |seconds: u64| -> Result<()> {
            let end = Instant::now() + Duration::from_secs(seconds);
            while Instant::now() < end {
                monitor.execute("stop")?;
                // The kernel can speed its clock up by a tenth at most: stay below.
                sleep(Duration::from_micros(300));
                monitor.execute("cont")?;
                sleep(Duration::from_millis(23));
            }
            Ok(())
        };
        // The controller needs a while to find the rate.
        pause_for(if clock_remedy { 25 } else { 2 })?;
        let (from, ahead) = (Stamp::now(), stage.clock_ahead_us()?);
        pause_for(if clock_remedy { 20 } else { 5 })?;
        Ok(slip_ratio(
            ahead,
            stage.clock_ahead_us()?,
            Stamp::now().ms_since(from) / 1e3,
        ))
    };
    let (without, with) = (slip(false)?, slip(true)?);
    println!(
        "the clock slips by {:.2} % without the remedy and by {:.3} % with it",
        without * 1e2,
        with * 1e2
    );
    // How long a pause takes depends on the machine; below this there would be nothing to correct.
    assert!(without > 0.01, "pauses that do not stop the clock: {without}");
    assert!(
        with.abs() < without / 10.0,
        "{with} with the remedy, {without} without"
    );
    Ok(())
}
