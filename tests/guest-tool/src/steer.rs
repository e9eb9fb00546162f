//! The remedy for a clock that pauses stop: follow the emulated RTC.
//!
//! A hypervisor that checkpoints a guest forty times a second stops its clocks each time. QEMU's RTC
//! (`-rtc clock=host`, the default) follows the host's clock and is not stopped, so the guest can measure by
//! how much its own clock lags and have its kernel run it faster: by whole ticks (100 ppm each, up to 10 %) and the rest
//! by frequency. The clock is slewed, never stepped, so time never jumps.
//!
//! More than 9 % can't be made up for: the kernel runs a clock by at most a tenth faster.
//!
//! The offset found at the first edge is kept, not removed: what is steered is the rate.

use std::error::Error;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const RTC_SECONDS: &str = "/sys/class/rtc/rtc0/since_epoch";
/// The kernel accepts ticks within 10 % of the nominal one.
const CORRECTION_MAX: f64 = 0.1;
const PROPORTIONAL: f64 = 0.3;
const INTEGRAL: f64 = 0.08;

/// A proportional-integral controller from the clock's error to its rate.
#[derive(Debug, Default)]
struct Controller {
    sum: f64,
}

impl Controller {
    /// `error_s` is the guest's clock minus the RTC, in seconds; the answer is by what fraction to speed up.
    fn correct(&mut self, error_s: f64, elapsed_s: f64) -> f64 {
        // Limiting the sum keeps a long stall from winding the controller up.
        self.sum = (self.sum - INTEGRAL * error_s * elapsed_s).clamp(-CORRECTION_MAX, CORRECTION_MAX);
        (self.sum - PROPORTIONAL * error_s).clamp(-CORRECTION_MAX, CORRECTION_MAX)
    }
}

/// Follows the RTC for ever.
pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    let (mut rtc_before, guest) = next_edge()?;
    let offset = guest - f64_of(rtc_before);
    let mut controller = Controller::default();
    let mut edges = 0_u64;
    loop {
        sleep(Duration::from_millis(800));
        let (rtc, guest) = next_edge()?;
        let error_s = guest - f64_of(rtc) - offset;
        let correction = controller.correct(error_s, f64_of(rtc - rtc_before));
        rtc_before = rtc;
        apply(correction)?;
        edges += 1;
        if edges.is_multiple_of(10) {
            crate::say(&format!(
                "steer error_us {:.0} correction_ppm {:.0}",
                error_s * 1e6,
                correction * 1e6
            ))?;
        }
    }
}

/// Whole seconds of the RTC at its next change, and the guest's clock at that moment.
fn next_edge() -> Result<(u64, f64), Box<dyn Error>> {
    let before = rtc_seconds()?;
    loop {
        let now = rtc_seconds()?;
        let guest = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        if now != before {
            return Ok((now, guest));
        }
        sleep(Duration::from_millis(1));
    }
}

fn rtc_seconds() -> Result<u64, Box<dyn Error>> {
    Ok(std::fs::read_to_string(RTC_SECONDS)?.trim().parse()?)
}

/// Sets the kernel's rate. busybox has the system call; this program stays without unsafe code.
fn apply(correction: f64) -> Result<(), Box<dyn Error>> {
    let ticks = (correction * 1e4).round();
    let rest_ppm = (correction - ticks * 1e-4) * 1e6;
    let status = Command::new("adjtimex")
        .args([
            "-q",
            "-t",
            &format!("{:.0}", 1e4 + ticks),
            "-f",
            &format!("{:.0}", rest_ppm * 65536.0),
        ])
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err("guest-tool: adjtimex failed".into())
    }
}

fn f64_of(seconds: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 are far below 2^53")]
    {
        seconds as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_loses_eight_percent_is_held_within_a_millisecond() {
        let mut controller = Controller::default();
        let (mut error_s, mut correction) = (0.0_f64, 0.0_f64);
        for second in 0..120 {
            error_s += (1.0 + correction) * 0.92 - 1.0;
            correction = controller.correct(error_s, 1.0);
            assert!(error_s > -0.25, "second {second}: error {error_s}");
        }
        assert!(error_s.abs() < 0.001, "error after two minutes: {error_s}");
    }
}
