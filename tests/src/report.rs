//! What a run has shown, as text and as JSON.

use serde::Serialize;

use crate::accel::Accel;
use crate::probe::Quantiles;

/// One kill and what followed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Kill {
    /// `ok`, or what went wrong.
    pub verdict: String,
    /// Acknowledged writes that are not there any more.
    pub lost_acked_writes: u64,
    /// 1 when the client's connection was reset or closed.
    pub connection_resets: u64,
    /// The client's longest wait for an answer.
    pub outage_ms: Option<f64>,
    /// From the kill to the backup's suspicion.
    pub suspicion_ms: Option<f64>,
    /// From the kill to the witness's grant.
    pub grant_ms: Option<f64>,
    /// From the kill to the end of the activation.
    pub activated_ms: Option<f64>,
    /// From the kill to the first frame that the activated guest itself sent.
    pub first_frame_ms: Option<f64>,
    /// From the kill to the first frame in the guest's name, which may be the agent's announcement.
    pub first_announcement_ms: Option<f64>,
    /// From the kill to the first answer on the same connection.
    pub first_reply_ms: Option<f64>,
    /// Frames that came from the primary's port after the activation.
    pub late_frames: usize,
    /// Frames that left the primary's host while it was gated.
    pub gated_frames: usize,
    /// Of these, frames whose epoch the backup had not committed when they left.
    pub uncommitted_frames: usize,
    /// How long the guest had been protected.
    pub protected_s: f64,
    /// Epochs that were committed before the kill.
    pub epochs: u64,
    /// The pauses of the guest.
    pub pause_ms: Option<Quantiles>,
    /// The part of the epochs that began within 2 ms of their time.
    pub epoch_on_time_ratio: Option<f64>,
    /// The probe's latency, protected minus unprotected.
    pub added_latency_ms: Option<Quantiles>,
    /// The probe's latency before the guest was protected.
    pub unprotected_latency_ms: Quantiles,
    /// The probe's latency while it was.
    pub protected_latency_ms: Quantiles,
    /// By how much the guest's clock ran slow while protected, measured by its own answers.
    pub clock_slip_ratio: f64,
    /// The same, as `romulus status` has it.
    pub clock_slip_ratio_status: Option<f64>,
    /// Writes that the client had acknowledged in all.
    pub acked_writes: u64,
    /// The last status before the kill.
    pub status: Option<serde_json::Value>,
}

impl Kill {
    /// Whether nothing was lost.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.verdict == OK
    }
}

/// The verdict of a run in which nothing was lost.
pub const OK: &str = "ok";

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `ok`, or what went wrong first.
    pub verdict: String,
    /// The sum over all kills.
    pub lost_acked_writes: u64,
    /// The sum over all kills.
    pub connection_resets: u64,
    /// The sum over all kills.
    pub uncommitted_frames: usize,
    /// The worst of all kills, and so for the next ones.
    pub outage_ms: Option<f64>,
    /// The worst.
    pub suspicion_ms: Option<f64>,
    /// The worst.
    pub first_frame_ms: Option<f64>,
    /// The worst.
    pub first_reply_ms: Option<f64>,
    /// The sum.
    pub epochs: u64,
    /// The worst.
    pub pause_ms: Option<Quantiles>,
    /// The worst.
    pub epoch_on_time_ratio: Option<f64>,
    /// The worst.
    pub added_latency_ms: Option<Quantiles>,
    /// The worst.
    pub clock_slip_ratio: f64,
    /// What ran the guest, and why.
    pub accelerator: Accel,
    /// What the random moments were drawn from.
    pub seed: u64,
    /// Each kill.
    pub kills: Vec<Kill>,
}

impl Report {
    /// Sums up.
    #[must_use]
    pub fn of(kills: Vec<Kill>, accelerator: Accel, seed: u64) -> Report {
        let verdict = match kills.iter().find(|kill| !kill.is_ok()) {
            Some(bad) => bad.verdict.clone(),
            None if kills.is_empty() => "nothing was tried".to_owned(),
            None => OK.to_owned(),
        };
        let worst = |of: fn(&Kill) -> Option<f64>| kills.iter().filter_map(of).reduce(f64::max);
        let worst_of_both = |of: fn(&Kill) -> Option<Quantiles>| {
            kills.iter().filter_map(of).reduce(|a, b| Quantiles {
                p50: a.p50.max(b.p50),
                p99: a.p99.max(b.p99),
            })
        };
        Report {
            verdict,
            lost_acked_writes: kills.iter().map(|kill| kill.lost_acked_writes).sum(),
            connection_resets: kills.iter().map(|kill| kill.connection_resets).sum(),
            uncommitted_frames: kills.iter().map(|kill| kill.uncommitted_frames).sum(),
            outage_ms: worst(|kill| kill.outage_ms),
            suspicion_ms: worst(|kill| kill.suspicion_ms),
            first_frame_ms: worst(|kill| kill.first_frame_ms),
            first_reply_ms: worst(|kill| kill.first_reply_ms),
            epochs: kills.iter().map(|kill| kill.epochs).sum(),
            pause_ms: worst_of_both(|kill| kill.pause_ms),
            epoch_on_time_ratio: kills
                .iter()
                .filter_map(|kill| kill.epoch_on_time_ratio)
                .reduce(f64::min),
            added_latency_ms: worst_of_both(|kill| kill.added_latency_ms),
            clock_slip_ratio: kills.iter().map(|kill| kill.clock_slip_ratio).fold(0.0, f64::max),
            accelerator,
            seed,
            kills,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kill(verdict: &str, outage_ms: f64, on_time: f64) -> Kill {
        Kill {
            verdict: verdict.to_owned(),
            outage_ms: Some(outage_ms),
            epoch_on_time_ratio: Some(on_time),
            ..Kill::default()
        }
    }

    #[test]
    fn a_report_has_the_worst_of_its_kills_and_the_fields_that_were_promised() {
        let kills = vec![
            kill(OK, 100.0, 0.99),
            kill("2 acknowledged writes lost", 300.0, 0.97),
        ];
        let report = Report::of(kills, crate::accel::tcg("test"), 1);
        assert_eq!(report.verdict, "2 acknowledged writes lost");
        assert_eq!(report.outage_ms, Some(300.0));
        assert_eq!(report.epoch_on_time_ratio, Some(0.97));
        let json = serde_json::to_value(&report).unwrap();
        let promised = [
            "verdict",
            "lost_acked_writes",
            "connection_resets",
            "uncommitted_frames",
            "outage_ms",
            "suspicion_ms",
            "first_frame_ms",
            "epochs",
            "pause_ms",
            "epoch_on_time_ratio",
            "added_latency_ms",
            "clock_slip_ratio",
        ];
        for field in promised {
            assert!(json.get(field).is_some(), "{field}");
        }
    }

    #[test]
    fn a_run_without_a_kill_is_not_a_success() {
        assert_ne!(Report::of(Vec::new(), crate::accel::tcg("test"), 1).verdict, OK);
    }
}
