//! `[epochs]` of the replicator: how long they are, and what they may cost.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::check::{Checks, Invalid};
use crate::quantity::{duration, optional_duration};

const AUTO: &str = "auto";

/// Time from one checkpoint to the next: `"25ms"`, or `"auto"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EpochLength {
    /// Always the same.
    Fixed(Duration),
    /// Steered to the goal of [`AutoEpochs`].
    Auto,
}

/// A text is neither a time nor `auto`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no length of an epoch: write a time such as \"25ms\", or \"auto\"")]
pub struct EpochLengthError(String);

impl FromStr for EpochLength {
    type Err = EpochLengthError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == AUTO {
            return Ok(Self::Auto);
        }
        let fixed = humantime::parse_duration(text).map(Self::Fixed);
        fixed.map_err(|_| EpochLengthError(text.to_owned()))
    }
}

impl TryFrom<String> for EpochLength {
    type Error = EpochLengthError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for EpochLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(length) => humantime::format_duration(*length).fmt(f),
            Self::Auto => f.write_str(AUTO),
        }
    }
}

impl From<EpochLength> for String {
    fn from(length: EpochLength) -> Self {
        length.to_string()
    }
}

/// `[epochs]` of the replicator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Epochs {
    /// Time from one checkpoint to the next. Default 25 ms.
    pub length: EpochLength,
    /// What `length = "auto"` steers to.
    pub auto: AutoEpochs,
    /// Longest epoch of an idle guest, which as far as the epoch before shows writes to at most 64 pages in it: it ends as soon as the guest
    /// sends something, but not before `length`. At most half of `hold_max` and of `failover.mute_limit`. Not longer than `length`: all epochs are alike. Default 100 ms.
    #[serde(with = "duration")]
    pub idle_length: Duration,
    /// Most epochs sent and not yet acknowledged; past that an epoch stretches. Default 4.
    pub in_flight_max: u16,
    /// A pause that lasts longer kills its holder, so that the guest runs on. Default 1 s.
    #[serde(with = "duration")]
    pub pause_kill_limit: Duration,
    /// Output that is held for longer makes the primary give its backup up; so does a hand-over that takes longer.
    /// Default 10 s.
    #[serde(with = "duration")]
    pub hold_max: Duration,
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            length: EpochLength::Fixed(Duration::from_millis(25)),
            auto: AutoEpochs::default(),
            idle_length: Duration::from_millis(100),
            in_flight_max: 4,
            pause_kill_limit: Duration::from_secs(1),
            hold_max: Duration::from_secs(10),
        }
    }
}

/// `[epochs.auto]`: what `length = "auto"` steers to, and within which lengths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AutoEpochs {
    /// Output is to be held for so long at the median. No default; not together with `overhead_percent`.
    #[serde(with = "optional_duration", skip_serializing_if = "Option::is_none")]
    pub latency: Option<Duration>,
    /// Protection is to take at most this part of the guest's time, in percent. 10 when `latency` is not set either.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overhead_percent: Option<u16>,
    /// Shortest epoch. Default 5 ms.
    #[serde(with = "duration")]
    pub length_min: Duration,
    /// Longest epoch. Default 100 ms.
    #[serde(with = "duration")]
    pub length_max: Duration,
    /// What a guest's first write to a page in an epoch costs it beside the pause; `bench run kvm` shows it. Default 2 us.
    #[serde(with = "duration")]
    pub fault_cost: Duration,
}

impl Default for AutoEpochs {
    fn default() -> Self {
        Self {
            latency: None,
            overhead_percent: None,
            length_min: Duration::from_millis(5),
            length_max: Duration::from_millis(100),
            fault_cost: Duration::from_micros(2),
        }
    }
}

/// What the length of epochs is steered to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpochGoal {
    /// Output is held for so long at the median.
    Latency(Duration),
    /// Protection takes this part of the guest's time, in percent.
    OverheadPercent(u16),
}

impl AutoEpochs {
    /// What is steered to.
    pub fn goal(&self) -> EpochGoal {
        match (self.latency, self.overhead_percent) {
            (Some(latency), _) => EpochGoal::Latency(latency),
            (None, percent) => EpochGoal::OverheadPercent(percent.unwrap_or(10)),
        }
    }

    fn check(&self) -> Result<(), Invalid> {
        let (us, ms, s) = (Duration::from_micros, Duration::from_millis, Duration::from_secs);
        Checks::new("epochs.auto")
            .duration("latency", self.latency.unwrap_or(ms(10)), ms(1), s(1))?
            .duration("length_min", self.length_min, ms(1), s(10))?
            .duration("length_max", self.length_max, self.length_min, s(10))?
            .duration("fault_cost", self.fault_cost, us(0), ms(1))?
            .number(
                "overhead_percent",
                self.overhead_percent.unwrap_or(10).into(),
                1,
                90,
            )?;
        if self.latency.is_some() && self.overhead_percent.is_some() {
            let problem = "epochs.auto.latency is set as well: there is one goal";
            return Err(Invalid::new("epochs.auto.overhead_percent", problem));
        }
        Ok(())
    }
}

impl Epochs {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        let checks = Checks::new("epochs");
        let checks = match self.length {
            EpochLength::Fixed(length) => checks.duration("length", length, ms(1), s(10))?,
            EpochLength::Auto => checks,
        };
        checks
            .duration("idle_length", self.idle_length, ms(0), s(1))?
            .number("in_flight_max", self.in_flight_max.into(), 1, 256)?
            .duration("pause_kill_limit", self.pause_kill_limit, ms(50), s(60))?
            .duration("hold_max", self.hold_max, ms(100), s(3600))?;
        self.auto.check()
    }

    /// The length to begin with.
    pub fn first_length(&self) -> Duration {
        match self.length {
            EpochLength::Fixed(length) => length,
            EpochLength::Auto => Duration::from_millis(25).clamp(self.auto.length_min, self.auto.length_max),
        }
    }
}
