//! The main job, once: a guest serves, is protected while it runs, its host dies, and its clients notice a stall.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::client::ClientReport;
use crate::daemons::ProtectConfig;
use crate::dashboard::{Dashboard, picture};
use crate::probe::{Quantiles, Random};
use crate::prometheus::Prometheus;
use crate::report::{Kill, OK};
use crate::stage::{Stage, StageConfig};
use crate::{Paths, Stamp, Vmm};

/// The client's retransmissions double, so an answer may come late although the guest is there.
const REPLY_AT_MOST: Duration = Duration::from_secs(60);

/// How long to do what.
#[derive(Clone, Debug)]
pub struct ScenarioConfig {
    /// What to run.
    pub stage: StageConfig,
    /// How to protect it.
    pub protect: ProtectConfig,
    /// Measure the latency without protection for so long.
    pub before: Duration,
    /// Stay protected for so long before the kill, and up to a second more, at random.
    pub protected: Duration,
    /// Go on for so long after the takeover.
    pub after: Duration,
    /// Have a Prometheus watch the daemons, and draw the dashboard of the run into this file.
    pub dashboard: Option<PathBuf>,
}

impl Default for ScenarioConfig {
    fn default() -> ScenarioConfig {
        ScenarioConfig {
            stage: StageConfig::default(),
            protect: ProtectConfig::default(),
            before: Duration::from_secs(5),
            protected: Duration::from_secs(10),
            after: Duration::from_secs(5),
            dashboard: None,
        }
    }
}

/// Runs it with a fresh pair in a lab named by `prefix`.
///
/// # Errors
/// When it does not come as far as a takeover, or nothing can be verified afterwards. A loss is no error but a verdict.
pub fn kill_once(paths: &Paths, prefix: &str, config: &ScenarioConfig) -> Result<Kill> {
    let mut stage = Stage::raise(paths, prefix, &config.stage)?;
    let watching = config.dashboard.as_ref().map(|_| Prometheus::start(&stage.lab));
    let watching = watching.transpose()?;
    let baseline_from = Stamp::now();
    sleep(config.before);
    let baseline_to = Stamp::now();
    let (unprotected, _) = stage.probe.quantiles(baseline_from, baseline_to);
    stage.protect(&config.protect)?;

    let protected_from = Stamp::now();
    let ahead_before = stage.clock_ahead_us()?;
    let clock_from = Stamp::now();
    sleep(config.protected + random_part(config.stage.seed));
    let clock_s = Stamp::now().ms_since(clock_from) / 1e3;
    let ahead_after = stage.clock_ahead_us()?;
    let status = stage.lab.status(crate::Host::Primary)?;

    let killed = stage.kill_primary()?;
    let (protected, _) = stage
        .probe
        .quantiles(protected_from, killed.minus(Duration::from_millis(200)));
    let answered = stage.wait_ack_after(killed.plus(Duration::from_millis(20)), REPLY_AT_MOST);
    sleep(config.after);
    if let Some((prometheus, file)) = watching.as_ref().zip(config.dashboard.as_ref()) {
        draw_dashboard(&stage, prometheus, (baseline_from, killed), file)?;
    }
    let whole = match stage.lab.vmm {
        Vmm::Qemu => Ok(()),
        Vmm::Testbed => stage.ensure_guest_is_whole(),
    };
    let loaded = match &mut stage.benchmark {
        Some(benchmark) => benchmark.ensure_it_goes_on(REPLY_AT_MOST),
        None => Ok(()),
    };
    let client = stage.finish_client()?;

    let mut kill = from_status(status);
    kill.unprotected_latency_ms = unprotected;
    kill.protected_latency_ms = protected;
    kill.added_latency_ms = Some(Quantiles {
        p50: protected.p50 - unprotected.p50,
        p99: protected.p99 - unprotected.p99,
    });
    kill.protected_s = killed.ms_since(protected_from) / 1e3;
    kill.clock_slip_ratio = slip_ratio(ahead_before, ahead_after, clock_s);
    after_kill(&mut kill, &stage, killed, &client);
    judge(
        &mut kill,
        &client,
        answered.err().or(whole.err()).or(loaded.err()),
    );
    stage.timeline.add(Stamp::now(), "lab", "verdict", &kill.verdict);
    Ok(kill)
}

/// Runs it, and wants a failover in which nothing was lost and something happened.
///
/// # Errors
/// As [`kill_once`], and when the verdict is another, something was lost or came late, or there was too little load to tell.
pub fn survive(paths: &Paths, prefix: &str, config: &ScenarioConfig) -> Result<Kill> {
    let kill = kill_once(paths, prefix, config)?;
    ensure!(kill.verdict == OK, "{kill:#?}");
    ensure!(
        (kill.lost_acked_writes, kill.connection_resets, kill.late_frames) == (0, 0, 0),
        "{kill:#?}"
    );
    ensure!(
        kill.epochs > 10,
        "only {} epochs in {} s",
        kill.epochs,
        kill.protected_s
    );
    ensure!(kill.acked_writes > 100, "only {} writes", kill.acked_writes);
    Ok(kill)
}

/// Draws what the dashboard shows of the run until now.
fn draw_dashboard(
    stage: &Stage,
    prometheus: &Prometheus,
    (began, killed): (Stamp, Stamp),
    file: &Path,
) -> Result<()> {
    let dashboard = Dashboard::shipped()?;
    let whole = (began, Stamp::now());
    let run = dashboard.ask(prometheus, &stage.lab, whole, &[(killed, "the host is killed")])?;
    let title = format!(
        "a run of `cargo xtask demo`: a guest in {}, protected, then its host killed",
        stage.lab.vmm.name()
    );
    std::fs::write(file, picture(&dashboard, &run, &title))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// What the status said before the kill.
fn from_status(status: Value) -> Kill {
    let number = |name: &str| status.get(name).and_then(Value::as_f64);
    let pause = status.get("pause_ms");
    let quantile = |name: &str| pause?.get(name)?.as_f64();
    Kill {
        epochs: status.get("epochs").and_then(Value::as_u64).unwrap_or(0),
        pause_ms: quantile("p50")
            .zip(quantile("p99"))
            .map(|(p50, p99)| Quantiles { p50, p99 }),
        epoch_on_time_ratio: number("epoch_on_time_ratio"),
        clock_slip_ratio_status: number("clock_slip_ratio"),
        status: Some(status),
        ..Kill::default()
    }
}

/// What happened after the kill, as the instruments and the daemons' logs have it.
fn after_kill(kill: &mut Kill, stage: &Stage, killed: Stamp, client: &ClientReport) {
    let since = |name: &str| {
        stage
            .timeline
            .first(name, killed)
            .map(|event| event.at.ms_since(killed))
    };
    kill.suspicion_ms = since("suspicion");
    kill.grant_ms = since("grant");
    kill.activated_ms = since("activated");
    if let Some(frame) = stage.from_backup.first_frame(killed) {
        kill.first_announcement_ms = Some(frame.at.ms_since(killed));
    }
    if let Some(frame) = stage.from_backup.first_guest_frame(killed) {
        kill.first_frame_ms = Some(frame.at.ms_since(killed));
        stage.timeline.add(
            frame.at,
            "backup",
            "first_frame",
            &format!("{} bytes from the guest itself", frame.bytes),
        );
        kill.late_frames = stage.from_primary.count_after(frame.at);
    }
    if let Some((from, to)) = client.longest_gap_after(killed) {
        kill.outage_ms = Some(to.ms_since(from));
        kill.first_reply_ms = Some(to.ms_since(killed));
        let text = format!(
            "on the same connection, {:.0} ms after the one before",
            to.ms_since(from)
        );
        stage.timeline.add(to, "client", "first_reply", &text);
    }
    let audit = stage.audit();
    kill.gated_frames = audit.gated_frames;
    kill.uncommitted_frames = audit.uncommitted_frames;
    kill.lost_acked_writes = client.lost;
    kill.connection_resets = client.resets;
    kill.acked_writes = client.acked;
}

fn judge(kill: &mut Kill, client: &ClientReport, unanswered: Option<anyhow::Error>) {
    let problem = if client.lost > 0 {
        Some(format!("{} acknowledged writes lost", client.lost))
    } else if client.resets > 0 {
        Some(format!(
            "the connection broke: {}",
            client.trouble.as_deref().unwrap_or("no reason known")
        ))
    } else if let Some(error) = unanswered {
        Some(format!("{error:#}"))
    } else if client.refused > 0 {
        Some(format!("{} writes refused", client.refused))
    } else if kill.first_frame_ms.is_none() {
        Some("no frame of the activated guest was seen".to_owned())
    } else if kill.late_frames > 0 {
        Some(format!(
            "{} frames came from the old primary after the takeover",
            kill.late_frames
        ))
    } else if kill.uncommitted_frames > 0 {
        Some(format!(
            "{} frames left the primary before their epoch was committed",
            kill.uncommitted_frames
        ))
    } else if kill.gated_frames == 0 {
        Some("no frame was seen to leave through the gate".to_owned())
    } else {
        None
    };
    kill.verdict = problem.unwrap_or_else(|| OK.to_owned());
}

/// The part of the time that the guest's clock lost; negative when it ran fast.
///
/// It was ahead of ours by so much before and after.
#[expect(
    clippy::cast_precision_loss,
    reason = "differences of seconds, in microseconds, are far below 2^53"
)]
#[must_use]
pub fn slip_ratio(ahead_before_us: i64, ahead_after_us: i64, elapsed_s: f64) -> f64 {
    ahead_before_us.saturating_sub(ahead_after_us) as f64 / 1e6 / elapsed_s
}

/// Up to a second, so that kills hit any moment of an epoch.
fn random_part(seed: u64) -> Duration {
    Duration::from_secs_f64(Random::new(seed ^ 0x6b69_6c6c).fraction())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(lost: u64, resets: u64) -> ClientReport {
        ClientReport {
            sent: 10,
            acked: 10,
            lost,
            resets,
            refused: 0,
            trouble: None,
            ack_times: Vec::new(),
        }
    }

    #[test]
    fn only_a_run_without_any_loss_is_ok() {
        let verdict = |lost, resets, first_frame_ms, late_frames| {
            let mut kill = Kill {
                gated_frames: 100,
                first_frame_ms,
                late_frames,
                ..Kill::default()
            };
            judge(&mut kill, &client(lost, resets), None);
            kill.verdict
        };
        assert_eq!(verdict(0, 0, Some(1.0), 0), OK);
        assert!(verdict(3, 0, Some(1.0), 0).contains("3 acknowledged writes lost"));
        assert!(verdict(0, 1, Some(1.0), 0).contains("connection broke"));
        assert!(verdict(0, 0, None, 0).contains("no frame"));
        assert!(verdict(0, 0, Some(1.0), 2).contains("old primary"));
        let audited = |gated_frames, uncommitted_frames| {
            let mut kill = Kill {
                first_frame_ms: Some(1.0),
                gated_frames,
                uncommitted_frames,
                ..Kill::default()
            };
            judge(&mut kill, &client(0, 0), None);
            kill.verdict
        };
        assert_eq!(audited(10, 0), OK);
        assert!(audited(10, 1).contains("1 frames left the primary before"));
        assert!(audited(0, 0).contains("no frame was seen"));
    }

    #[test]
    fn a_clock_that_falls_back_by_a_tenth_slips_by_a_tenth() {
        assert!((slip_ratio(5_000, -995_000, 10.0) - 0.1).abs() < 1e-9);
    }
}
